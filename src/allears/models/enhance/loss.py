"""Training loss of the enhancer: flow matching written on the predicted clean state, with terms on its waveform.

Shapes: B clips, S samples, T frames, F bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from allears.audio.stft import Stft
from allears.diffusion.path import LinearPath
from allears.models.enhance.config import EnhanceConfig
from allears.models.enhance.loudness import loudness_cost
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.state import level_of, to_state, to_waveform

_RESOLUTIONS = (Stft(256, 64), Stft(512, 128), Stft(1024, 256))


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, and how flow times are drawn.

    Args:
        complex: squared error of the state: with the weight 1 / (t + 0.1) this is flow matching (velocity and x_0
            errors differ by 1 / t).
        magnitude: squared error of the state's magnitude.
        wave: absolute error of the waveform at level 1.
        spectra: absolute error of |X|^0.3 at three resolutions.
        snr_db: error-to-signal ratio of the waveform in dB, floored at -30.
        at_prior: share of clips drawn at t = 1, where the first step starts.
        loudness: points of raw PESQ that the waveform loses (``loudness.py``); not computed at 0.
    """

    complex: float = 1.0
    magnitude: float = 1.0
    wave: float = 0.1
    spectra: float = 0.5
    snr_db: float = 0.005
    at_prior: float = 0.4
    loudness: float = 0.0


def draw_times(batch: int, at_prior: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """(B,) in (0, 1]: 1 with probability ``at_prior``, else uniform in 0.02 to 1."""
    draws = torch.rand(2, batch, generator=generator, device=generator.device).to(device)
    return torch.where(draws[0] < at_prior, torch.ones_like(draws[1]), 0.02 + 0.98 * draws[1])


def _magnitudes(x: Tensor, stft: Stft) -> Tensor:
    parts = torch.view_as_real(stft.forward(x))
    return (parts.square().sum(-1) + 1e-5).pow(0.15)


def waveform_terms(estimate: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """Per-clip terms (B,) between waveforms (B, S) at level 1."""
    wave = (estimate - clean).abs().mean(-1)
    spectra = torch.stack(
        [(_magnitudes(estimate, s) - _magnitudes(clean, s)).abs().mean((-1, -2)) for s in _RESOLUTIONS]
    ).mean(0)
    signal, error = clean.square().mean(-1), (estimate - clean).square().mean(-1)
    ratio = 10 * torch.log10(error / (signal + 1e-3) + 1e-3)
    return {"wave": wave, "spectra": spectra, "snr_db": ratio}


def flow_loss(
    net: EnhanceNet | torch.nn.Module,
    config: EnhanceConfig,
    noisy: Tensor,
    clean: Tensor,
    generator: torch.Generator,
    weights: LossWeights = LossWeights(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of a batch of waveforms (B, S), and its terms averaged over clips."""
    device = noisy.device
    with torch.autocast(device.type, enabled=False):
        level = level_of(noisy)
        clean = clean / level
        y, x0 = to_state(noisy / level, config), to_state(clean, config)
        path = LinearPath(config.sigma)
        t = draw_times(noisy.shape[0], weights.at_prior, generator, device)
        mean = y if config.prior == "noisy" else torch.zeros_like(y)
        x_t = path.sample(x0, mean, t, path.noise(y, generator))
    estimate = net(x_t, y, t)
    with torch.autocast(device.type, enabled=False):
        estimate = estimate.to(torch.float32)
        difference = (estimate - x0).square().sum(-1).mean((-1, -2))
        sizes = ((s.square().sum(-1) + 1e-6).sqrt() for s in (estimate, x0))
        magnitude = (next(sizes) - next(sizes)).square().mean((-1, -2))
        wave = to_waveform(estimate, clean.shape[-1], config)
        terms = {"complex": difference, "magnitude": magnitude, **waveform_terms(wave, clean)}
        if weights.loudness:
            terms["loudness"] = loudness_cost(wave, clean)
        emphasis = 1.1 / (t + 0.1)
        total = sum(
            getattr(weights, name) * value * (emphasis if name in ("complex", "magnitude") else 1.0)
            for name, value in terms.items()
        )
    return total.mean(), {name: value.mean().detach() for name, value in terms.items()}  # type: ignore[union-attr]
