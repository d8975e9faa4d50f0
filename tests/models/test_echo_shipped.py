import numpy as np
import pytest
from tests.conftest import voice_like

from allears.audio.metrics import si_sdr_db
from allears.audio.resample import resample
from allears.models.echo import EchoCanceller

RATE = 16_000
CANCELLER = EchoCanceller.from_pretrained(device="cpu")


def scene(delay_ms, seconds=4.0):
    """Near end, the far end that is played, and its echo by way of a small room."""
    rng = np.random.default_rng(0)
    near, far = voice_like(rng, seconds, 110), voice_like(rng, seconds, 190)
    room = rng.standard_normal(1600) * np.exp(-np.arange(1600) / 300.0)
    late = np.concatenate([np.zeros(delay_ms * RATE // 1000), far])[: len(far)]
    echo = np.convolve(late, room)[: len(far)]
    echo *= np.sqrt(np.mean(near**2) / np.mean(echo**2))
    return near.astype(np.float32), far.astype(np.float32), echo.astype(np.float32)


def energy_db(x):
    return 10 * np.log10(np.mean(np.square(x, dtype=np.float64)) + 1e-12)


def test_the_far_end_alone_goes_whatever_its_delay():
    assert CANCELLER.name == "echo-16k" and CANCELLER.parameters < 1.5e6
    for delay_ms in (0, 150, 700):
        _, far, echo = scene(delay_ms)
        left = CANCELLER(echo, far, RATE)
        assert energy_db(echo[RATE:]) - energy_db(left[RATE:]) > 25


def test_the_near_end_alone_stays():
    near, _, _ = scene(0)
    assert si_sdr_db(CANCELLER(near, np.zeros_like(near), RATE), near) > 15


def test_both_at_once_near_end_comes_out_ahead():
    near, far, echo = scene(150)
    out = CANCELLER(near + echo, far, RATE)
    assert si_sdr_db(out[RATE:], near[RATE:]) > si_sdr_db((near + echo)[RATE:], near[RATE:]) + 3


@pytest.mark.parametrize("delay_ms", [0, 150, 700])
def test_a_stream_at_48_khz_cancels_as_the_network_does_at_its_rate(delay_ms):
    """Echo alone, and both at once: beside 16 kHz, and beside conversion of the whole signal by soxr, which lacks what
    is above 7.2 kHz (with no delay, 1.03 dB of the echo that is left)."""
    near, far, echo = scene(delay_ms)
    wide = [resample(x[None], RATE, 48_000)[0] for x in (near, far, echo)]

    def scores(cancel, near, far, echo, rate):
        left, out = cancel(echo, far, rate)[rate:], cancel(near + echo, far, rate)[rate:]
        return energy_db(echo[rate:]) - energy_db(left), si_sdr_db(out, near[rate:])

    def live(mic, reference, rate):
        session = CANCELLER.stream(rate)
        return np.concatenate([session.push(mic, reference), session.flush()])

    ours = scores(live, *wide, 48_000)
    assert ours == pytest.approx(scores(CANCELLER, near, far, echo, RATE), abs=0.5)
    assert ours == pytest.approx(scores(CANCELLER, *wide, 48_000), abs=1.1 if delay_ms == 0 else 1.0)
