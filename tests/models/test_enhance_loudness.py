import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from allears.models.enhance import loudness
from allears.models.enhance.loss import LossWeights, flow_loss
from allears.models.enhance.loudness import disturbance, loudness_cost

SNRS_DB = (-5.0, 0.0, 5.0, 10.0, 20.0, 40.0)


def voice(seconds: float = 2.0, pitch_hz: float = 120.0) -> torch.Tensor:
    """(1, S): harmonics with a syllable rhythm and a vibrato."""
    time = torch.arange(int(seconds * 16_000), dtype=torch.float64) / 16_000
    phase = 2 * torch.pi * pitch_hz * time + 0.3 * torch.sin(2 * torch.pi * 5 * time)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 40))
    return (0.12 * tone * torch.sin(2 * torch.pi * 3 * time + 0.4).clamp_min(0)).float()[None]


def with_noise(clean: torch.Tensor, snr_db: float, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return clean + noise * clean.square().mean().sqrt() * 10 ** (-snr_db / 20)


def test_equal_signals_have_no_disturbance_and_the_highest_score():
    both = disturbance(voice(), voice())
    assert both.symmetric < 1e-6 and both.asymmetric < 1e-6
    assert both.score().item() == pytest.approx(0.999 + 4 / (1 + np.exp(3.8224 - 1.3669 * 4.5)), abs=1e-5)


def test_score_falls_with_the_noise():
    clean = voice().expand(len(SNRS_DB), -1)
    noisy = torch.cat([with_noise(voice(), snr) for snr in SNRS_DB])
    found = disturbance(noisy, clean)
    for value in (found.score(), -found.symmetric, -found.cost()):
        assert (value.diff() > 0).all(), value


def test_noise_added_disturbs_more_than_speech_missing():
    """The asymmetric part is for what was added: leaving half of the signal's spectrum out has next to none."""
    clean = with_noise(voice(), 10)
    spectrum = torch.fft.rfft(clean)
    spectrum[..., spectrum.shape[-1] // 2 :] = 0
    missing = disturbance(torch.fft.irfft(spectrum, n=clean.shape[-1]), clean)
    added = disturbance(clean, torch.fft.irfft(spectrum, n=clean.shape[-1]))
    assert added.asymmetric > 5 * missing.asymmetric and missing.symmetric > 1


@pytest.mark.parametrize(("of_estimate", "of_clean"), [(0.01, 0.01), (7.0, 1.0), (1.0, 0.2)])
def test_gain_does_not_matter(of_estimate, of_clean):
    clean = voice()
    noisy = with_noise(clean, 5)
    for a, b in zip(disturbance(of_estimate * noisy, of_clean * clean), disturbance(noisy, clean), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_an_estimate_near_silence_is_not_raised_to_full_level():
    """Down to 20 dB below the clean speech its gain is made up for; from there on it costs, with bounded gradients."""
    clean = voice()
    costs = [disturbance(10 ** (-down_db / 20) * clean, clean).cost().item() for down_db in (0, 19, 40, 60)]
    assert costs[1] == pytest.approx(costs[0], abs=1e-3) and 0.02 < costs[2] < costs[3]


def test_a_tone_of_40_db_has_the_density_and_the_loudness_of_the_standard():
    """P.862: a 1 kHz tone at 40 dB SPL has a pitch power density of 1e4 and a loudness of 1 sone."""
    ear = loudness._ear(torch.device("cpu"), torch.float64)
    tone = loudness.TONE_40_DB * torch.sin(2 * torch.pi * 1000 * torch.arange(16_000, dtype=torch.float64) / 16_000)
    power = torch.fft.rfft(tone[None].unfold(-1, 512, 256) * ear.window).abs().square()
    assert (power @ ear.speech).mean().item() == pytest.approx(loudness.TONE_40_DB**2 / 2, rel=0.02)
    at_filter = ((1000 / 200) ** 4 * 10**0.9) / (1 + (1000 / 200) ** 4)
    density = power @ ear.bands / at_filter
    assert density.max().item() == pytest.approx(1e4, rel=0.2)
    sones = loudness._loudness(density, ear)[0, 10].sum() * ear.width_bark
    assert sones.item() == pytest.approx(1.0, rel=0.05)


def test_bands_share_out_the_whole_spectrum():
    """Each bin but the constant one and the top half-bin lies wholly in the bands; the input filter passes 9 dB."""
    ear = loudness._ear(torch.device("cpu"), torch.float64)
    shares = ear.bands.sum(1) / (1e4 / (loudness.TONE_40_DB * 128) ** 2)
    assert shares[0] == 0
    assert 10 * torch.log10(shares[200]).item() == pytest.approx(9.0, abs=0.01)
    at_200_hz = 10 ** (0.9) * (187.5 / 200) ** 4 / (1 + (187.5 / 200) ** 4)
    assert shares[6].item() == pytest.approx(at_200_hz, rel=1e-6)


def test_gradient_matches_finite_differences():
    clean = voice(0.35).double()
    start = with_noise(clean, 5).double()
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loudness_cost(x / 0.1, clean / 0.1).sum(), x)
    step = 1e-7
    ahead, behind = (loudness_cost((start + s * direction) / 0.1, clean / 0.1).sum() for s in (step, -step))
    slope = (ahead - behind) / (2 * step)
    assert slope.abs() > 1e-3
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("silent", ["estimate", "clean", "both", "none, equal"])
def test_gradients_are_finite_at_silence(silent):
    nothing, speech = torch.zeros(2, 6000), voice(0.375).expand(2, -1)
    estimate = (nothing if silent in ("estimate", "both") else speech).clone().requires_grad_()
    cost = loudness_cost(estimate, nothing if silent in ("clean", "both") else speech)
    cost.sum().backward()
    assert torch.isfinite(cost).all() and torch.isfinite(estimate.grad).all()
    if silent != "estimate":
        assert (cost < 1e-6).all()
    else:
        assert (cost > 0.5).all()


def test_a_step_down_the_gradient_of_one_clip_leaves_the_other():
    clean = voice(0.5).expand(2, -1)
    estimate = torch.cat([with_noise(voice(0.5), snr) for snr in (0, 10)]).requires_grad_()
    loudness_cost(estimate, clean)[0].backward()
    assert (estimate.grad[1] == 0).all() and estimate.grad[0].abs().max() > 0
    before = loudness_cost(estimate, clean).detach()
    after = loudness_cost(estimate - 1e-5 * estimate.grad / estimate.grad.norm(), clean).detach()
    assert after[0] < before[0] and after[1] == before[1]


def test_autocast_changes_nothing():
    clean, noisy = voice(), with_noise(voice(), 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = disturbance(noisy, clean)
    assert inside.cost() == disturbance(noisy, clean).cost() and inside.cost().dtype == torch.float32


@pytest.mark.parametrize("samples", [1, 63, 1000, 5121])
def test_any_length_and_padding_with_silence_lowers_the_mean(samples):
    clean = voice()[:, 4000 : 4000 + samples]
    found = disturbance(with_noise(clean, 0), clean)
    assert torch.isfinite(found.cost()).all() and found.cost() >= 0
    longer = disturbance(pad(with_noise(clean, 0), (0, 16_000)), pad(clean, (0, 16_000)))
    assert longer.symmetric <= found.symmetric + 1e-4


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"estimate: got \(1, 5\) beside \(1, 6\)"):
        disturbance(torch.zeros(1, 5), torch.zeros(1, 6))


def test_score_follows_pesq():
    """Made-up voices in noise, low-passed, and clipped: the order of PESQ-WB, and its size to half a point."""
    pytest.importorskip("pesq")
    from allears.audio.metrics.pesq import pesq_wb

    ours, theirs = [], []
    for pitch in (110.0, 170.0):
        clean = with_noise(voice(3.0, pitch), 45, seed=9)
        damaged = [with_noise(clean, snr, seed=int(pitch)) for snr in (5, 15, 25, 35)]
        damaged += [clean.clamp(-level, level) for level in (0.02, 0.1)]
        for estimate in damaged:
            ours.append(disturbance(estimate, clean).score().item())
            theirs.append(pesq_wb(estimate[0].numpy(), clean[0].numpy()))
    ranks = [np.argsort(np.argsort(values)) for values in (ours, theirs)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9, (ours, theirs)
    assert np.abs(np.subtract(ours, theirs)).mean() < 0.5, (ours, theirs)


def test_the_loss_counts_the_term_only_where_it_has_a_weight(perturbed_net):
    clean = voice(0.5)
    noisy = with_noise(clean, 5)
    results = [
        flow_loss(perturbed_net, perturbed_net.config, noisy, clean, torch.Generator().manual_seed(0), weights)
        for weights in (LossWeights(), LossWeights(loudness=0.2))
    ]
    (plain, plain_terms), (total, terms) = results
    assert "loudness" not in plain_terms and terms["loudness"] > 0
    assert (total - plain).item() == pytest.approx(0.2 * terms["loudness"].item(), rel=1e-4)
