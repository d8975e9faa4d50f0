"""Levels in dB relative to full scale, and clipping, for numpy arrays and torch tensors alike.

Shapes: x is (..., T); a level is (...), one number a signal. 0 dB is a constant of 1: a full-scale sine has -3 dB RMS.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional

Signal = TypeVar("Signal", np.ndarray, torch.Tensor)

FLOOR_DB = -200.0  # what silence measures, so that a level is always finite


def _as_tensor(x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x if x.is_floating_point() else x.to(torch.float32)
    array = np.asarray(x)
    return torch.as_tensor(array if np.issubdtype(array.dtype, np.floating) else array.astype(np.float32))


def _like(value: torch.Tensor, x: Any) -> Any:
    return value if isinstance(x, torch.Tensor) else value.numpy()


def _db(power: torch.Tensor) -> torch.Tensor:
    return 10 * torch.log10(power.clamp_min(10 ** (FLOOR_DB / 10)))


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] == 0:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted 1 sample or more")
    return x.double().square().mean(-1)


def rms_db(x: Signal) -> Signal:
    """Root mean square level in dB, (...); silence gives -200."""
    tensor = _as_tensor(x)
    return _like(_db(_mean_square(tensor)).to(tensor.dtype), x)


def peak_db(x: Signal) -> Signal:
    """Level of the largest absolute sample in dB, (...); silence gives -200."""
    tensor = _as_tensor(x)
    return _like(_db(tensor.double().abs().amax(-1).square()).to(tensor.dtype), x)


def active_level_db(x: Signal, sample_rate_hz: int, gate_db: float = 25.0, block_ms: float = 20.0) -> Signal:
    """RMS level in dB of the parts that are active, (...): pauses do not lower it.

    Blocks of ``block_ms`` count as active when they lie within ``gate_db`` of the loud blocks' level (the mean power of
    the loudest tenth). A plain energy gate; ITU-T P.56 tracks an envelope instead and differs by a dB or so.
    """
    tensor = _as_tensor(x)
    _mean_square(tensor[..., :1])
    block = max(1, round(sample_rate_hz * block_ms / 1000))
    count = -(-tensor.shape[-1] // block)
    padded = functional.pad(tensor, (0, count * block - tensor.shape[-1])).double()
    energy = padded.unflatten(-1, (count, block)).square().sum(-1)
    sizes = torch.full((count,), float(block), dtype=energy.dtype, device=energy.device)
    sizes[-1] -= count * block - tensor.shape[-1]
    power = energy / sizes
    loud = power.topk(-(-count // 10), dim=-1).values.mean(-1, keepdim=True)
    active = power >= loud * 10 ** (-gate_db / 10)
    level = _db((energy * active).sum(-1) / (sizes * active).sum(-1))
    return _like(level.to(tensor.dtype), x)


def gain(x: Signal, gain_db: Any) -> Signal:
    """``x`` times 10 ** (gain_db / 20); ``gain_db`` is a number or one a signal, (...)."""
    tensor = _as_tensor(x)
    factor = 10 ** (torch.as_tensor(gain_db, dtype=torch.float64, device=tensor.device) / 20)
    return _like(tensor * factor.to(tensor.dtype).unsqueeze(-1), x)


def normalise(x: Signal, target_db: float, measure: str = "rms", sample_rate_hz: int | None = None) -> Signal:
    """``x`` scaled, each signal by itself, to ``target_db``. Silence (below -100 dB) stays as it is.

    Args:
        x: (..., T).
        target_db: the level wanted.
        measure: ``rms``, ``peak`` or ``active`` (the last needs ``sample_rate_hz``).
        sample_rate_hz: of ``x``.
    """
    if measure == "active":
        if sample_rate_hz is None:
            raise ValueError("sample_rate_hz: missing, and measure='active' needs it")
        level = active_level_db(x, sample_rate_hz)
    elif measure in ("rms", "peak"):
        level = rms_db(x) if measure == "rms" else peak_db(x)
    else:
        raise ValueError(f"measure: got {measure!r}, wanted 'rms', 'peak' or 'active'")
    levels = _as_tensor(level)
    return gain(x, torch.where(levels < -100.0, torch.zeros_like(levels), target_db - levels))


def hard_clip(x: Signal, limit: float = 1.0) -> Signal:
    """``x`` held within [-limit, limit], as an overdriven converter does."""
    if not limit > 0:
        raise ValueError(f"limit: got {limit}, wanted a number above 0")
    tensor = _as_tensor(x)
    return _like(tensor.clamp(-limit, limit), x)


def soft_clip(x: Signal, limit: float = 1.0, knee: float = 0.5) -> Signal:
    """``x`` unchanged up to ``knee * limit``, bent smoothly above it, and never beyond ``limit``.

    Above the knee a hyperbolic tangent takes over with the same value and slope, as an overdriven analogue stage.
    """
    if not limit > 0:
        raise ValueError(f"limit: got {limit}, wanted a number above 0")
    if not 0 <= knee < 1:
        raise ValueError(f"knee: got {knee}, wanted 0 up to (not with) 1")
    tensor = _as_tensor(x)
    start, room = knee * limit, (1 - knee) * limit
    bent = start + room * torch.tanh((tensor.abs() - start) / room)
    return _like(torch.where(tensor.abs() <= start, tensor, torch.sign(tensor) * bent), x)
