"""Sample-rate conversion: streaming equals offline, lengths are exact, nothing moves in time."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.resample import StreamResampler, fit_length, resample, resampled_length

RATES = st.sampled_from([8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 15997])


@given(
    length=st.integers(0, 6000),
    from_hz=RATES,
    to_hz=RATES,
    channels=st.integers(1, 3),
    sizes=st.lists(st.integers(0, 2500), min_size=1, max_size=5),
    quality=st.sampled_from(["HQ", "VHQ"]),
)
@settings(max_examples=80, deadline=None)
def test_the_stream_equals_the_offline_conversion(length, from_hz, to_hz, channels, sizes, quality):
    x = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    stream = StreamResampler(channels, from_hz, to_hz, quality)
    out, at, turn = [], 0, 0
    while at < length:
        size = sizes[turn % len(sizes)] if turn < len(sizes) else max(1, sizes[turn % len(sizes)])
        out.append(stream.push(x[:, at : at + size]))
        assert stream.owed >= 0
        at, turn = at + size, turn + 1
    out.append(stream.flush())
    want = resample(x, from_hz, to_hz, quality)
    assert want.shape == (channels, floor(Fraction(length * to_hz, from_hz) + Fraction(1, 2)))
    np.testing.assert_allclose(np.concatenate(out, axis=1), want, atol=1e-6, rtol=0)


@given(length=st.integers(0, 10**9), from_hz=RATES, to_hz=RATES)
def test_length_is_the_nearest_whole_number(length, from_hz, to_hz):
    assert abs(resampled_length(length, from_hz, to_hz) - Fraction(length * to_hz, from_hz)) <= Fraction(1, 2)


@given(length=st.integers(1, 5000), from_hz=RATES, to_hz=RATES)
@settings(max_examples=40, deadline=None)
def test_there_and_back_is_fitted_by_a_few_samples(length, from_hz, to_hz):
    there = resampled_length(length, from_hz, to_hz)
    back = resampled_length(there, to_hz, from_hz)
    assert abs(back - length) <= from_hz / (2 * to_hz) + 0.5
    assert fit_length(np.zeros((2, back), np.float32), length).shape == (2, length)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44100, 16000), (16000, 48000), (48000, 44100), (8000, 44100)])
def test_a_tone_stays_where_it_was(from_hz, to_hz):
    def tone(rate):
        return np.sin(2 * np.pi * 997.0 * np.arange(rate) / rate + 0.3)[None].astype(np.float32)

    got, want = resample(tone(from_hz), from_hz, to_hz), tone(to_hz)
    middle = slice(to_hz // 10, -to_hz // 10)
    assert np.abs(got - want)[:, middle].max() < 2e-5


def test_what_the_lower_rate_cannot_hold_is_removed():
    tone = np.sin(2 * np.pi * 9000.0 * np.arange(44100) / 44100)[None].astype(np.float32)
    assert np.abs(resample(tone, 44100, 16000)[:, 1000:-1000]).max() < 1e-4


def test_there_and_back_keeps_a_low_tone():
    x = np.sin(2 * np.pi * 440.0 * np.arange(44101) / 44100)[None].astype(np.float32)
    back = fit_length(resample(resample(x, 44100, 16000), 16000, 44100), 44101)
    assert np.abs(back - x)[:, 2000:-2000].max() < 2e-5


def test_a_long_odd_ratio_does_not_drift():
    length = 3_000_000
    x = np.sin(2 * np.pi * 300.0 * np.arange(length) / 44099)[None].astype(np.float32)
    y = resample(x, 44099, 15997)
    want = np.sin(2 * np.pi * 300.0 * np.arange(y.shape[1]) / 15997)
    assert y.shape[1] == resampled_length(length, 44099, 15997)
    assert np.abs(y[0] - want)[-20000:-1000].max() < 1e-4


def test_equal_rates_give_a_copy():
    x = np.ones((2, 5), np.float32)
    y = resample(x, 16000, 16000)
    y[:] = 0
    assert x.sum() == 10


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^from_hz: got 0"):
        resample(np.zeros((1, 4), np.float32), 0, 16000)
    with pytest.raises(ValueError, match=r"^to_hz: got 44100.5"):
        resample(np.zeros((1, 4), np.float32), 16000, 44100.5)
    with pytest.raises(ValueError, match=r"^x: got shape \(4,\)"):
        resample(np.zeros(4, np.float32), 8000, 16000)
    with pytest.raises(ValueError, match=r"^quality:"):
        StreamResampler(1, 8000, 16000, "best")
    with pytest.raises(ValueError, match=r"^channels: got 0"):
        StreamResampler(0, 8000, 16000)
    stream = StreamResampler(2, 8000, 16000)
    with pytest.raises(ValueError, match="with C = 2"):
        stream.push(np.zeros((1, 4), np.float32))
    stream.flush()
    with pytest.raises(ValueError, match="flushed"):
        stream.push(np.zeros((2, 4), np.float32))
