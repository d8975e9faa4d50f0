"""Audio read between its samples in PyTorch: the definition, and what runs on CPUs.

Shapes: S stretches, R rows, T samples of a row, N samples of the longest stretch of a group.
"""

import math

import torch
from torch import Tensor

from allears.core.host_arrays import on_device
from allears.ops.resample.stretches import Stretches

TAPS = 16
FADE = 80
"""Samples over which a stretch fades in and out."""
QUIETEST = 1e-5
"""RMS to which a stretch counts as raised at least, where all are brought to one level."""

_GROUP = 48


def read_reference(flat: Tensor, first: Tensor, last: Tensor, position: Tensor, speed: Tensor) -> Tensor:
    """See :func:`~allears.ops.resample.call.read_at`."""
    base = position.floor()
    fraction = (position - base).to(torch.float32)
    base = base.to(torch.int64)
    cutoff = torch.where(speed > 1, 0.97 / speed, torch.ones_like(speed)).to(torch.float32)[:, None]
    total = torch.zeros_like(fraction)
    for tap in range(1 - TAPS // 2, TAPS // 2 + 1):
        index = base + tap
        inside = (index >= first[:, None]) & (index < last[:, None])
        distance = tap - fraction
        window = torch.cos(distance * (math.pi / (TAPS + 1))).square()
        weight = cutoff * torch.sinc(cutoff * distance) * window
        total += torch.where(inside, flat[index.clamp(0, flat.shape[0] - 1)].to(torch.float32), 0.0) * weight
    return total


def lay_reference(flat: Tensor, stretches: Stretches, rows: int, frames: int, even_level: bool) -> Tensor:
    """See :func:`~allears.ops.resample.call.lay`. On a GPU the order of the sums, and so their rounding, may vary."""
    out = torch.zeros(rows * frames, device=flat.device)
    # Small groups waste no time on padding, which on a CPU costs; but how far a row is padded decides how a sum rounds.
    size = 2 if flat.device.type == "cpu" and not even_level else _GROUP
    for at in range(0, len(stretches.table), size):
        table = stretches.table[at : at + size]
        first, last, begin, length, row, place = on_device(flat.device, table[:, :6].T, "int64")
        speed, gain = on_device(flat.device, table[:, 6:].T)
        n = torch.arange(int(table[:, 3].max()), device=flat.device)
        inside = n < length[:, None]
        position = begin[:, None].to(torch.float64) + speed[:, None].to(torch.float64) * n
        values = read_reference(flat, first, last, position, speed) / 32768.0 * inside
        ramp = torch.minimum(n + 1, length[:, None] - n).clamp(0, FADE).to(torch.float32) / FADE
        values = values * ramp
        if even_level:
            power = values.square().sum(-1, keepdim=True) / length[:, None]
            values = values / power.sqrt().clamp_min(QUIETEST)
        values = values * gain[:, None]
        where = (row * frames + place)[:, None] + n
        out.index_add_(0, where.clamp_max(rows * frames - 1).flatten(), values.flatten())  # zeros beyond its end
    return out.view(rows, frames)
