"""The peers that are installed here: in time with their input, of its length, and of use against noise."""

import numpy as np
import pytest
from benchmarks.enhance import check_alignment
from benchmarks.registry import systems_for
from benchmarks.speed import synthetic_voice
from benchmarks.systems.frames import through_48_khz

from allears.audio.metrics import delay_samples, si_sdr_db

PEERS = ("rnnoise", "nsnet2", "deepfilternet3")


@pytest.mark.parametrize(("delay", "length"), [(0, 16_000), (960, 16_000), (1440, 12_345)])
def test_a_perfect_but_late_denoiser_gives_its_input_back(delay, length):
    audio = (0.1 * np.random.default_rng(0).standard_normal(length)).astype(np.float32)
    audio = np.convolve(audio, np.hanning(9) / 4, "same").astype(np.float32)  # within the resampler's pass band
    waiting = np.zeros(delay, np.float32)

    def process(frame):
        nonlocal waiting
        joined = np.concatenate([waiting, frame])
        waiting = joined[480:]
        return joined[:480]

    output = through_48_khz(audio, 480, delay, process)
    assert output.shape == audio.shape and output.dtype == np.float32
    np.testing.assert_allclose(output[200:-200], audio[200:-200], atol=1e-4)
    assert delay_samples(output, audio, 100) == 0


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_aligned_and_reduce_noise(name):
    (system,) = systems_for("enhance", (name,))
    if missing := system.missing():
        pytest.skip(f"not installed: {', '.join(missing)}")
    enhance = system.load()
    clean = synthetic_voice(4.0, noise_level=0.0)
    noisy = clean + 0.03 * np.random.default_rng(1).standard_normal(len(clean)).astype(np.float32)
    before = noisy.copy()
    assert abs(check_alignment(name, enhance, clean)) <= 1
    output = enhance(noisy)
    assert output.dtype == np.float32
    assert si_sdr_db(output, clean) > si_sdr_db(noisy, clean) + 1
    np.testing.assert_array_equal(noisy, before)
    assert enhance(noisy[:1]).shape == (1,)
    np.testing.assert_array_equal(enhance(noisy), output)  # no state is left from clip to clip
