"""Low-delay conversion: its delay to the sample, its response, and the same output for any chunks."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.low_delay import AtRate, LowDelayResampler, LowDelaySession, least_delay_s, round_trip_samples

CORE = 16_000
USUAL = [8_000, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000]
PAIRS = [(rate, CORE) for rate in USUAL] + [(CORE, rate) for rate in USUAL]
RATES = st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 15_997, 44_099])


def convert(x, from_hz, to_hz, **options):
    stream = LowDelayResampler(len(x), from_hz, to_hz, **options)
    return np.concatenate([stream.push(x), stream.flush()], axis=1)


def tone(hz, times):
    return np.sin(2 * np.pi * hz * times + 0.4)


def fitted(y, hz, times):
    """Amplitudes of the tone that was sent and of its quadrature in ``y``, and the rms of all else over that of it."""
    basis = np.stack([tone(hz, times), tone(hz, times + 0.25 / hz)], axis=1)
    found, *_ = np.linalg.lstsq(basis, y, rcond=None)
    return found, np.sqrt(2.0) * (y - basis @ found).std()


class Hops:
    """A core that answers hop by hop, in time, and late by a hop, as a network does; it keeps the first channels."""

    def __init__(self, hop, channels):
        self.hop, self.channels = hop, channels
        self.pending, self.got, self.given = np.zeros((channels, 0), np.float32), 0, 0

    def push(self, x):
        self.got += x.shape[1]
        self.pending = np.concatenate([self.pending, x[: self.channels]], axis=1)
        return self._give(max(0, (self.got // self.hop - 1) * self.hop - self.given))

    def flush(self):
        return self._give(self.got - self.given)

    def _give(self, count):
        y, self.pending = self.pending[:, :count], self.pending[:, count:]
        self.given += count
        return y


@pytest.mark.parametrize(("from_hz", "to_hz"), PAIRS)
def test_what_both_rates_hold_passes_with_the_delay_that_is_told(from_hz, to_hz):
    half = min(from_hz, to_hz) / 2
    for share in (0.05, 0.4, 0.75, 0.8, 0.8125):
        stream = LowDelayResampler(1, from_hz, to_hz)
        y = stream.push(tone(share * half, np.arange(from_hz // 4) / from_hz)[None].astype(np.float32))[0]
        times = np.arange(len(y)) / to_hz - float(stream.delay_s)
        settled = slice(len(y) // 4, None)
        (same, quadrature), rest = fitted(y[settled], share * half, times[settled])
        assert abs(20 * np.log10(same)) < 0.03 and abs(quadrature) < 4e-3, share
        assert 20 * np.log10(rest) < (-67 if share <= 0.8 else -58), share  # images


@pytest.mark.parametrize(("from_hz", "to_hz"), [pair for pair in PAIRS if pair[0] > pair[1]])
def test_nothing_folds_back(from_hz, to_hz):
    for hz in np.linspace(to_hz / 2 + 1, from_hz / 2 - 1, 9):
        x = tone(hz, np.arange(from_hz // 4) / from_hz)[None].astype(np.float32)
        y = LowDelayResampler(1, from_hz, to_hz).push(x)[0]
        assert 20 * np.log10(np.abs(y[len(y) // 4 :]).max()) < -60, hz


def test_delays_are_what_they_were_said_to_be():
    assert least_delay_s(48_000, CORE) == Fraction(1, 1200) and least_delay_s(CORE, 48_000) == Fraction(1, 2000)
    assert least_delay_s(CORE, CORE) == 0 and round_trip_samples(CORE, CORE) == 0
    wanted_ms = {8_000: 2.75, 11_025: 2.0, 22_050: 1.36, 24_000: 1.33, 32_000: 1.34, 44_100: 1.34, 48_000: 1.33}
    for rate, ms in wanted_ms.items():
        assert 1000 * round_trip_samples(rate, CORE) / rate == pytest.approx(ms, abs=0.005), rate


@given(
    length=st.integers(0, 3000),
    from_hz=RATES,
    to_hz=RATES,
    channels=st.integers(1, 3),
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_chunks_do_not_matter(length, from_hz, to_hz, channels, sizes):
    x = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    stream, out, at = LowDelayResampler(channels, from_hz, to_hz), [], 0
    for size in [*sizes, length]:
        out.append(stream.push(x[:, at : at + size]))
        at = min(length, at + size)
        assert stream.received == at and stream.emitted == ceil(Fraction(at * to_hz, from_hz))
    out.append(stream.flush())
    y = np.concatenate(out, axis=1)
    assert y.dtype == np.float32
    assert y.shape[1] == (ceil((Fraction(length, from_hz) + stream.delay_s) * to_hz) if length else 0)
    np.testing.assert_allclose(y, convert(x, from_hz, to_hz), atol=2e-6, rtol=0)
    for row in range(channels):
        np.testing.assert_allclose(y[row : row + 1], convert(x[row : row + 1], from_hz, to_hz), atol=2e-6, rtol=0)


def test_the_future_does_not_matter():
    x = np.random.default_rng(0).uniform(-1, 1, (1, 4000)).astype(np.float32)
    changed = x.copy()
    changed[:, 2000:] = 0
    for from_hz, to_hz in PAIRS:
        until = ceil(Fraction(2000 * to_hz, from_hz))
        a, b = convert(x, from_hz, to_hz), convert(changed, from_hz, to_hz)
        np.testing.assert_array_equal(a[:, :until], b[:, :until])
        assert np.abs(a - b)[:, until : until + 60].max() > 0.05


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44_099, 16_000), (16_000, 44_099), (16_001, 16_000), (95_999, 16_000)])
def test_rates_with_many_phases_do_not_drift(from_hz, to_hz):
    y = convert(tone(6000.0, np.arange(5 * from_hz) / from_hz)[None].astype(np.float32), from_hz, to_hz)[0]
    times = np.arange(len(y)) / to_hz - float(least_delay_s(from_hz, to_hz))
    late = slice(-to_hz, -to_hz // 10)
    (same, quadrature), rest = fitted(y[late], 6000.0, times[late])
    assert same == pytest.approx(1.0, abs=3e-3) and abs(quadrature) < 3e-3 and 20 * np.log10(rest) < -66


def test_a_longer_delay_may_be_wished():
    delay = Fraction(1, 1000)
    x = tone(500.0, np.arange(4800) / 48_000)[None].astype(np.float32)
    y = convert(x, 48_000, CORE, delay_s=delay)[0]
    np.testing.assert_allclose(y[200:1500], tone(500.0, (np.arange(200, 1500) - 16) / CORE), atol=1e-3)


def test_a_constant_stays_and_equal_rates_pass_all():
    for from_hz, to_hz in PAIRS:
        y = convert(np.ones((1, 2000), np.float32), from_hz, to_hz)[0]
        np.testing.assert_allclose(y[len(y) // 2 : -len(y) // 4], 1.0, atol=2e-6)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 50)).astype(np.float32)
    np.testing.assert_array_equal(convert(x, CORE, CORE), x)


@pytest.mark.parametrize("rate", [4_000, *USUAL, 44_099])
def test_an_impulse_comes_back_in_its_place_as_late_as_is_told(rate):
    """Through a core without a network that answers 20 ms late, sample by sample: which output sample the impulse is,
    and how many input samples had gone in by then."""
    at = round(0.0537 * rate)
    live = AtRate(Hops(160, 1), 2, 1, rate, CORE)
    x = np.zeros((2, round(0.11 * rate)), np.float32)
    x[:, at] = 1.0
    y, came = [], []
    for n in range(x.shape[1]):
        part = live.push(x[:, n : n + 1])[0]
        y.append(part)
        came += [n + 1] * len(part)
    y = np.concatenate(y)
    assert np.abs(y).argmax() == at
    assert np.abs(y[: at - rate // 100]).max() < 1e-6  # nothing comes before the earliest tap
    latency = np.array(came) - np.arange(len(came))
    told = 0.020 * rate + round_trip_samples(rate, CORE)
    assert told - max(1, rate / CORE) - 1 <= latency.max() <= told + 1


def test_both_channels_are_in_step():
    rng = np.random.default_rng(1)
    both = np.repeat(rng.uniform(-1, 1, (1, 3000)).astype(np.float32), 2, axis=0)
    for rate in USUAL:
        y = convert(both, rate, CORE)
        np.testing.assert_array_equal(y[0], y[1])


@given(
    rate=st.sampled_from([4_000, 8_000, 16_000, 44_100, 48_000, 44_099]),
    length=st.integers(0, 2500),
    sizes=st.lists(st.integers(0, 900), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_a_session_gives_as_much_as_it_got_in_time(rate, length, sizes):
    low = np.minimum(4_000, 0.7 * min(rate, CORE) / 2)
    x = tone(low / 3, np.arange(length) / rate)[None].astype(np.float32)
    session, out, at = LowDelaySession(Hops(160, 1), 1, 1, rate, CORE), [], 0
    for size in [*sizes, length]:
        out.append(session.push(x[:, at : at + size]))
        at = min(length, at + size)
    y = np.concatenate([*out, session.flush()], axis=1)
    assert y.shape == x.shape
    edge = rate // 100
    np.testing.assert_allclose(y[:, edge:-edge], x[:, edge:-edge], atol=5e-3)


def test_bad_arguments_are_named():
    bad = {
        "^from_hz: got 0": (1, 0, CORE),
        "^to_hz: got 44100.5": (1, CORE, 44_100.5),
        "^to_hz: got 100 from 16000 Hz, wanted a ratio of at most 64": (1, CORE, 100),
        "^channels: got 0": (0, CORE, 8_000),
        r"^delay_s: got 0.0001, wanted 0.000833333 to 0.00166667 s": (1, 48_000, CORE, Fraction(1, 10_000)),
        r"^delay_s: got 1, wanted": (1, 48_000, CORE, Fraction(1)),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            LowDelayResampler(*arguments)
    stream = LowDelayResampler(2, 8_000, CORE)
    for shape in ((4,), (1, 4)):
        with pytest.raises(ValueError, match=r"^x: got shape .* with C = 2"):
            stream.push(np.zeros(shape, np.float32))
    assert stream.push(np.ones((2, 3), np.float32)).shape == (2, 6)  # what was refused changed nothing
    stream.flush()
    for call in (lambda: stream.push(np.zeros((2, 1), np.float32)), stream.flush):
        with pytest.raises(ValueError, match="flushed"):
            call()
    with pytest.raises(ValueError, match="sample_rate_hz: 3999 given"):
        LowDelaySession(Hops(160, 1), 1, 1, 3_999, CORE)
