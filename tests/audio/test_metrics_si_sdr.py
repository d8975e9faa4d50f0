import numpy as np
import pytest
import torch

from allears.audio.metrics import collect_reasons, si_sdr_db


def orthogonal(length: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Two signals of equal power whose inner product is zero."""
    t = np.arange(length)
    return np.sin(2 * np.pi * 10 * t / length), np.cos(2 * np.pi * 10 * t / length)


@pytest.mark.parametrize("ratio_db", [-20.0, 0.0, 13.5])
def test_orthogonal_noise_gives_the_power_ratio(ratio_db):
    speech, noise = orthogonal()
    assert si_sdr_db(speech + noise * 10 ** (-ratio_db / 20), speech) == pytest.approx(ratio_db, abs=1e-9)


def test_scale_of_either_does_not_matter():
    speech, noise = orthogonal()
    value = si_sdr_db(speech + 0.1 * noise, speech)
    assert si_sdr_db(-7 * (speech + 0.1 * noise), speech * 1e-4) == pytest.approx(value, abs=1e-9)


def test_extremes():
    speech, noise = orthogonal()
    assert si_sdr_db(2 * speech, speech) == np.inf
    assert si_sdr_db(np.zeros_like(speech), speech) == -np.inf
    assert si_sdr_db(noise, speech) < -250
    with collect_reasons() as reasons:
        assert np.isnan(si_sdr_db(speech, np.zeros_like(speech)))
    assert reasons == {"si_sdr_db": "the reference is silent"}


def test_batch_equals_single_clips_and_torch_equals_numpy():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((2, 3, 500)).astype(np.float32)
    estimate = reference + rng.standard_normal((2, 3, 500)).astype(np.float32)
    batch = si_sdr_db(estimate, reference)
    assert batch.shape == (2, 3) and batch.dtype == np.float64
    assert batch[1, 2] == si_sdr_db(estimate[1, 2], reference[1, 2])
    np.testing.assert_allclose(si_sdr_db(torch.from_numpy(estimate), torch.from_numpy(reference)), batch, rtol=1e-12)


def test_float32_input_is_summed_in_float64():
    speech = np.ones(1_000_000, dtype=np.float32)
    error = np.tile(np.array([1, -1], np.float32), 500_000) * np.float32(1e-3)
    assert si_sdr_db(speech + error, speech) == pytest.approx(60, abs=1e-3)


def test_torch_gradient_matches_finite_differences():
    rng = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 20, generator=rng, dtype=torch.float64)
    estimate = torch.randn(2, 20, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: si_sdr_db(x, reference), estimate)


def test_torch_extremes_match_numpy():
    speech, _ = orthogonal()
    clean = torch.from_numpy(speech)
    assert si_sdr_db(torch.zeros_like(clean), clean) == -torch.inf
    assert si_sdr_db(2 * clean, clean) == torch.inf
    assert torch.isnan(si_sdr_db(clean, torch.zeros_like(clean)))


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(5,\).*\(6,\)"):
        si_sdr_db(np.ones(5), np.ones(6))
    with pytest.raises(ValueError, match="at least one sample"):
        si_sdr_db(np.ones((2, 0)), np.ones((2, 0)))
