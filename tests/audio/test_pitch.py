import numpy as np
import pytest
from tests.conftest import voice_like

from allears.audio.pitch import pitch_hz

RATE = 16_000


def harmonics(f0, seconds=0.5, rate=RATE, count=12):
    t = np.arange(int(seconds * rate)) / rate
    return sum(np.cos(2 * np.pi * f0 * k * t + k) / k for k in range(1, count + 1) if k * f0 < rate / 2)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("f0", [75.0, 120.0, 211.3, 300.0])
def test_harmonics_have_their_pitch(f0, rate):
    found = pitch_hz(harmonics(f0, rate=rate), rate)
    np.testing.assert_allclose(found, f0, rtol=0.01)


def test_the_fundamental_may_be_missing():
    t = np.arange(RATE // 2) / RATE
    x = sum(np.cos(2 * np.pi * 150 * k * t) for k in (3, 4, 5, 6))
    np.testing.assert_allclose(pitch_hz(x, RATE), 150, rtol=0.01)


def test_a_voice_at_another_speed_has_another_pitch():
    voice = voice_like(np.random.default_rng(0), 1.0, 140)
    before, after = (np.nanmedian(pitch_hz(x, RATE)) for x in (voice, voice[::2]))
    assert before == pytest.approx(140, rel=0.05) and after == pytest.approx(2 * before, rel=0.02)


def test_noise_and_silence_have_none():
    assert np.isnan(pitch_hz(np.random.default_rng(0).standard_normal(RATE), RATE)).mean() > 0.97
    assert np.isnan(pitch_hz(np.zeros(RATE), RATE)).all() and not len(pitch_hz(np.zeros(100), RATE))
    quiet = np.concatenate([harmonics(200.0), 0.01 * harmonics(200.0)])
    assert np.isnan(pitch_hz(quiet, RATE)[-20:]).all()


def test_bad_input_is_told():
    with pytest.raises(ValueError, match=r"shape \(2, 10\) given"):
        pitch_hz(np.zeros((2, 10)), RATE)
    with pytest.raises(ValueError, match="at least 2000"):
        pitch_hz(np.zeros(10), 1_000)
