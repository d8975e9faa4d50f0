"""A training term that hears like PESQ: the disturbance of loudness between two waveforms, with gradients.

After ITU-T P.862 (2001) and its wide-band form P.862.2 (2007), as a loss after PMSQE (Martin-Donas et al., "A deep
learning loss function based on the perceptual evaluation of the speech quality", IEEE SPL, 2018). Signals must be in
time. Left out: time alignment, the search for badly aligned stretches, and weights for files over 16 s.
Softened, so that gradients reach everywhere: the gate of the asymmetric disturbance, and the ceiling of a frame.

Shapes: B clips, S samples, N frames, F bins, K Bark bands.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

RATE_HZ = 16_000
FRAME, HOP = 512, 256
BANDS = 49
POWER_AT_LEVEL = 1e7
"""Mean square between 350 and 3250 Hz that both signals are brought to (samples of 16 bit)."""
TONE_40_DB = 29.54
"""Amplitude of the 1 kHz tone that stands for 40 dB SPL: pitch power density 1e4, loudness 1 sone."""
SONE = 0.2
EXPONENT = 0.23
SILENT = 1e-3
"""A clip whose clean speech has a mean square below this, relative to a recording of level 1, costs nothing."""

LOWEST = 1e-2
"""An estimate is brought to level as far as 20 dB below the clean speech: gradients stay bounded near silence."""


class Disturbance(NamedTuple):
    """Symmetric and asymmetric disturbance (B,) of P.862, from 0 (no difference) to some 45."""

    symmetric: Tensor
    asymmetric: Tensor

    def cost(self) -> Tensor:
        """(B,): what the disturbances take off the raw PESQ score of 4.5."""
        return 0.1 * self.symmetric + 0.0309 * self.asymmetric

    def score(self) -> Tensor:
        """(B,): MOS-LQO, 1.04 to 4.64, by the wide-band mapping of P.862.2."""
        return 0.999 + 4 / (1 + torch.exp(3.8224 - 1.3669 * (4.5 - self.cost())))


class _Ear(NamedTuple):
    window: Tensor  # (512,)
    bands: Tensor  # (F, K): share of a bin's power that belongs to a band, with the input filter, in power density
    speech: Tensor  # (F,): 1 between 350 and 3250 Hz, scaled to give mean squares
    threshold: Tensor  # (K,): power density of the threshold in quiet
    exponent: Tensor  # (K,): Zwicker's exponent, raised below 4 Bark
    width_bark: float


def _bark(hertz: Tensor) -> Tensor:
    return 6 * torch.asinh(hertz / 600)


@lru_cache(maxsize=8)
def _ear(device: torch.device, dtype: torch.dtype) -> _Ear:
    with torch.inference_mode(False), torch.no_grad():
        window = torch.hann_window(FRAME, periodic=True, dtype=torch.float64)
        bins = torch.arange(FRAME // 2 + 1, dtype=torch.float64)
        step_hz = RATE_HZ / FRAME
        width = float(_bark(torch.tensor(RATE_HZ / 2, dtype=torch.float64))) / BANDS
        edges = 600 * torch.sinh(torch.arange(BANDS + 1, dtype=torch.float64) * width / 6) / step_hz
        low, high = edges[:-1], edges[1:]
        overlap = torch.minimum(bins[:, None] + 0.5, high) - torch.maximum(bins[:, None] - 0.5, low)
        share = overlap.clamp(0, 1)
        share[0] = 0  # no constant part
        ratio = (bins * step_hz / 200) ** 4
        high_pass = 10**0.9 * ratio / (1 + ratio)  # second-order Butterworth at 200 Hz, 9 dB: the wide-band input
        density = 1e4 / (TONE_40_DB * FRAME / 4) ** 2
        middle_bark = (torch.arange(BANDS, dtype=torch.float64) + 0.5) * width
        kilohertz = 0.6 * torch.sinh(middle_bark / 6)
        quiet_db = (  # Terhardt (1979)
            3.64 * kilohertz**-0.8 - 6.5 * torch.exp(-0.6 * (kilohertz - 3.3) ** 2) + 1e-3 * kilohertz**4
        )
        raised = (6 / (middle_bark + 2)).clamp(1, 2) ** 0.15
        hertz = bins * step_hz
        inside = ((hertz >= 350) & (hertz <= 3250)) * 2 / (FRAME * window.square().sum())
        bands, threshold = density * high_pass[:, None] * share, 10 ** (quiet_db / 10)
        window, bands, inside, threshold, exponent = (
            tensor.to(device, dtype) for tensor in (window, bands, inside, threshold, EXPONENT * raised)
        )
        return _Ear(window, bands, inside, threshold, exponent, width)


def _spectrum(x: Tensor, ear: _Ear, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Power spectra (B, N, F) of x (B, S), brought to the level at which PESQ listens, and the mean square (B,) before.

    Args:
        floor: (B,) mean squares; x is raised no more than if it had this much.
    """
    frames = functional.pad(x, (HOP, HOP + -x.shape[-1] % HOP)).unfold(-1, FRAME, HOP)
    parts = torch.view_as_real(torch.fft.rfft(frames * ear.window))
    power = parts.square().sum(-1)
    mean_square = (power @ ear.speech).mean(-1).clamp_min(1e-12)
    if floor is not None:
        mean_square = torch.maximum(mean_square, floor)
    return power * (POWER_AT_LEVEL / mean_square)[:, None, None], mean_square


def _loudness(power: Tensor, ear: _Ear) -> Tensor:
    """Sones per Bark (B, N, K) of power densities (B, N, K); Zwicker's law, as P.862 states it."""
    ratio = power / ear.threshold
    scale = SONE * (2 * ear.threshold) ** ear.exponent
    return scale * ((0.5 + 0.5 * ratio.clamp_min(1)) ** ear.exponent - 1)


def _audible(power: Tensor, ear: _Ear, factor: float = 1.0) -> Tensor:
    """(B, N): power that stands out of ``factor`` times the threshold; the lowest band does not count."""
    return (power - factor * ear.threshold).clamp_min(0)[..., 1:].sum(-1)


def _compensated(clean: Tensor, estimate: Tensor, ear: _Ear) -> tuple[Tensor, Tensor]:
    """Both (B, N, K) after partial compensation: of the colour, on the clean side; of slow gain, on the estimate's."""
    heard = (_audible(clean, ear, 100) > 1e7).to(clean.dtype)[..., None]
    means = [((x * (x > 100 * ear.threshold)) * heard).sum(1, keepdim=True) / clean.shape[1] for x in (clean, estimate)]
    clean = clean * ((means[1] + 1e3) / (means[0] + 1e3)).clamp(0.01, 100)
    gain = (_audible(clean, ear) + 5e3) / (_audible(estimate, ear) + 5e3)
    past = functional.pad(gain[:, None], (3, 0), mode="replicate")
    taps = torch.tensor([[[0.008, 0.032, 0.16, 0.8]]], dtype=gain.dtype).to(gain.device)
    return clean, estimate * functional.conv1d(past, taps)[:, 0, :, None].clamp(3e-4, 5)


def _norm(x: Tensor, power: float, dim: int, floor: float = 1e-3) -> Tensor:
    """Power mean of x >= 0 along ``dim``; smooth at 0, and 0 for zeros."""
    return ((x + floor) ** power).mean(dim) ** (1 / power) - floor


def _ceiling(x: Tensor, top: float = 45.0) -> Tensor:
    """x up to ``top``, then slowly on: as a hard ceiling, but with a gradient left."""
    return torch.where(x > top, top * (1 + 0.1 * torch.log(x.clamp_min(top) / top)), x)


def _over_time(frames: Tensor) -> Tensor:
    """(B, N) to (B,): sixth-power mean in stretches of 20 frames, every 10; root mean square over stretches."""
    count = frames.shape[1]
    missing = 20 - count if count < 20 else -count % 10
    pieces = functional.pad(frames, (0, missing)).unfold(1, 20, 10)
    return _norm(_norm(pieces, 6, -1), 2, -1)


def disturbance(estimate: Tensor, clean: Tensor) -> Disturbance:
    """Disturbances (B,) between waveforms (B, S) at 16 kHz, in time with each other.

    The gain of either signal does not matter, unless the estimate is over 20 dB too quiet. Computed in float32 or more,
    also under autocast.

    Raises:
        ValueError: the shapes differ.
    """
    if estimate.shape != clean.shape or estimate.dim() != 2:
        raise ValueError(f"estimate: got {tuple(estimate.shape)} beside {tuple(clean.shape)}, wanted twice (B, S)")
    with torch.autocast(estimate.device.type, enabled=False):
        kind = torch.promote_types(estimate.dtype, torch.float32)
        ear = _ear(estimate.device, kind)
        reference, level = _spectrum(clean.to(kind), ear)
        degraded, _ = _spectrum(estimate.to(kind), ear, LOWEST * level)
        reference, degraded = _compensated(reference @ ear.bands, degraded @ ear.bands, ear)
        loud = _loudness(reference, ear), _loudness(degraded, ear)
        difference = (loud[1] - loud[0]).abs() - 0.25 * torch.minimum(*loud)
        difference = difference.clamp_min(0)[..., 1:]
        ratio = ((degraded + 50) / (reference + 50))[..., 1:] ** 1.2
        added = ratio.clamp_max(12) * (ratio - 2.5).clamp(0, 1)
        total_bark = (BANDS - 1) * ear.width_bark
        # P.862 sums (D w)^p, divides by the sum of w, takes the root and multiplies by the sum of w
        symmetric = _norm(difference, 2, -1) * total_bark * math.sqrt(ear.width_bark)
        asymmetric = _norm(difference * added, 1, -1) * total_bark
        weight = ((_audible(reference, ear) + 1e5) / 1e7) ** 0.04
        return Disturbance(*(_over_time(_ceiling(x / weight)) for x in (symmetric, asymmetric)))


def loudness_cost(estimate: Tensor, clean: Tensor) -> Tensor:
    """The term (B,): points of raw PESQ lost, 0 to some 6. Clips of silent clean speech cost nothing.

    Args:
        estimate, clean: (B, S), 16 kHz, in time, scaled so that the recording has level 1.
    """
    speaks = clean.square().mean(-1) > SILENT
    return disturbance(estimate, clean).cost() * speaks
