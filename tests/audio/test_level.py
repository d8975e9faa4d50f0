"""Levels of signals whose level is known, and clipping."""

import numpy as np
import pytest
import torch

from allears.audio.level import active_level_db, gain, hard_clip, normalise, peak_db, rms_db, soft_clip

SINE = np.sin(2 * np.pi * np.arange(16000) / 16).astype(np.float32)


def test_levels_of_a_sine():
    both = np.stack([SINE, 0.1 * SINE])
    np.testing.assert_allclose(rms_db(both), [-3.0103, -23.0103], atol=1e-3)
    np.testing.assert_allclose(peak_db(both), [0, -20], atol=1e-3)
    assert rms_db(np.zeros(5, np.float32)) == -200
    assert peak_db(np.zeros(5, np.float32)) == -200


def test_numpy_stays_numpy_and_torch_stays_torch():
    for function in (rms_db, peak_db, lambda x: normalise(x, -20), hard_clip, soft_clip, lambda x: gain(x, 6)):
        from_numpy, from_torch = function(SINE), function(torch.from_numpy(SINE))
        assert isinstance(from_torch, torch.Tensor) and not isinstance(from_numpy, torch.Tensor)
        assert from_numpy.dtype == np.float32 and from_torch.dtype == torch.float32
        np.testing.assert_array_equal(from_numpy, from_torch.numpy())


def test_pauses_do_not_lower_the_active_level():
    speech = np.concatenate([SINE, np.zeros(48000, np.float32), 1e-3 * SINE, SINE[:5003]])
    assert rms_db(speech) < -8
    np.testing.assert_allclose(active_level_db(speech, 16000), -3.0103, atol=0.05)
    np.testing.assert_allclose(active_level_db(np.stack([speech, speech / 10]), 16000), [-3.01, -23.01], atol=0.05)
    np.testing.assert_allclose(active_level_db(SINE[:7], 16000), rms_db(SINE[:7]), atol=1e-4)


def test_steady_noise_is_active_throughout():
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    np.testing.assert_allclose(active_level_db(noise, 16000), rms_db(noise), atol=1e-3)


@pytest.mark.parametrize(("measure", "level"), [("rms", rms_db), ("peak", peak_db)])
def test_normalise_reaches_the_level_in_each_channel(measure, level):
    x = np.stack([SINE, 0.01 * SINE, 0 * SINE])
    y = normalise(x, -26.0, measure)
    np.testing.assert_allclose(level(y[:2]), -26.0, atol=1e-3)
    assert not y[2].any()


def test_normalise_by_active_level():
    x = np.concatenate([SINE, np.zeros_like(SINE)])
    np.testing.assert_allclose(rms_db(normalise(x, -20, "active", 16000)[:16000]), -20, atol=0.05)
    with pytest.raises(ValueError, match=r"^sample_rate_hz:"):
        normalise(x, -20, "active")
    with pytest.raises(ValueError, match=r"^measure: got 'loud'"):
        normalise(x, -20, "loud")


def test_hard_clip_cuts_at_the_limit():
    np.testing.assert_allclose(hard_clip(np.array([-2.0, -0.5, 0.5, 2.0]), 1.0), [-1, -0.5, 0.5, 1])


def test_soft_clip_is_the_identity_below_the_knee_and_bounded_above():
    x = torch.linspace(-5, 5, 10001, dtype=torch.float64)
    y = soft_clip(x, limit=0.8, knee=0.5)
    low = x.abs() <= 0.4
    torch.testing.assert_close(y[low], x[low], atol=0, rtol=0)
    assert y.abs().max() <= 0.8 and y.abs().max() > 0.79
    slope = y.diff() / x.diff()
    assert slope.min() >= 0 and slope.max() <= 1 + 1e-9  # rises throughout, without a step
    assert slope.diff().abs().max() < 5e-3  # and without a corner


def test_gain_per_signal():
    y = gain(torch.ones(2, 3), torch.tensor([0.0, -20.0]))
    torch.testing.assert_close(y, torch.tensor([[1.0] * 3, [0.1] * 3]))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"^limit:"):
        hard_clip(SINE, 0)
    with pytest.raises(ValueError, match=r"^knee:"):
        soft_clip(SINE, 1, 1)
    with pytest.raises(ValueError, match=r"^x: got shape \(2, 0\)"):
        rms_db(np.zeros((2, 0), np.float32))
