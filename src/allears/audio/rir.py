"""What an impulse response tells: where the direct sound is, its early part, how fast it decays.

Shapes: rir is (..., L), a float tensor on any device; every leading dimension is measured by itself.
"""

import torch
from torch import Tensor


def direct_delay(rir: Tensor, sample_rate_hz: int) -> Tensor:
    """The sample at which the direct sound has its peak, (...), int64.

    That is the largest absolute sample within 1 ms of the first one that reaches 30 % of the response's largest.
    """
    size = rir.abs()
    first = (size >= 0.3 * size.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1, keepdim=True)
    time = torch.arange(rir.shape[-1], device=rir.device)
    window = (time >= first) & (time < first + max(1, sample_rate_hz // 1000))
    return torch.where(window, size, -1.0).argmax(-1)


def early_part(
    rir: Tensor,
    sample_rate_hz: int,
    early_ms: float = 50.0,
    fade_ms: float = 5.0,
    direct_ms: Tensor | float | None = None,
) -> Tensor:
    """The direct sound and the reflections up to ``early_ms`` after it, faded out over ``fade_ms`` more, (..., L).

    Args:
        rir: (..., L).
        sample_rate_hz: of ``rir``.
        early_ms: what counts as early: it helps speech to be understood, and a listener hears it as one with the direct
            sound (50 ms in ISO 3382's D50).
        fade_ms: length of the half-cosine fade.
        direct_ms: when the direct sound comes, one number or (...); found by :func:`direct_delay` by default.
    """
    if early_ms < 0 or fade_ms < 0:
        raise ValueError(f"early_ms, fade_ms: got {early_ms} and {fade_ms}, wanted 0 or more")
    if direct_ms is None:
        direct = direct_delay(rir, sample_rate_hz).to(rir.dtype)
    else:
        direct = torch.as_tensor(direct_ms, dtype=rir.dtype, device=rir.device) * sample_rate_hz / 1000
    end = direct + early_ms * sample_rate_hz / 1000
    time = torch.arange(rir.shape[-1], device=rir.device, dtype=rir.dtype)
    fade = max(1.0, fade_ms * sample_rate_hz / 1000)
    phase = ((time - end.unsqueeze(-1)) / fade).clamp(0, 1)
    return rir * (0.5 + 0.5 * torch.cos(torch.pi * phase))


def decay_curve_db(rir: Tensor) -> Tensor:
    """The energy still to come in dB below the whole, (..., L): Schroeder's backward integral (JASA 37, 1965)."""
    energy = rir.double().square().flip(-1).cumsum(-1).flip(-1)
    return 10 * torch.log10((energy / energy[..., :1].clamp_min(1e-300)).clamp_min(1e-30))


def rt60_of(rir: Tensor, sample_rate_hz: int, from_db: float = -5.0, to_db: float = -35.0) -> Tensor:
    """Reverberation time in seconds, (...): a line through the decay curve between two levels, drawn to -60 dB.

    -5 to -35 dB is ISO 3382's T30; a noisy recording wants -5 to -25. A response that does not decay by ``to_db`` gives
    NaN, as does one with fewer than 2 samples between.
    """
    if not 0 >= from_db > to_db:
        raise ValueError(f"from_db, to_db: got {from_db} and {to_db}, wanted 0 >= from_db > to_db")
    curve = decay_curve_db(rir)
    inside = ((curve <= from_db) & (curve >= to_db)).double()
    time = torch.arange(curve.shape[-1], device=curve.device, dtype=torch.float64) / sample_rate_hz
    count = inside.sum(-1)
    mean_time = (inside * time).sum(-1) / count
    mean_level = (inside * curve).sum(-1) / count
    centred = (time - mean_time.unsqueeze(-1)) * inside
    slope = (centred * (curve - mean_level.unsqueeze(-1))).sum(-1) / centred.square().sum(-1)
    measured = (curve[..., -1] < to_db) & (count >= 2) & (slope < 0)
    return torch.where(measured, -60 / slope, torch.nan).to(rir.dtype)
