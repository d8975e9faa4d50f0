"""Wide layers on a slice of the rows at a time, where no gradient is wanted: the same result, and the widest tensor,
which sets the peak of memory, is never whole. On a CPU a slice also stays in the cache.

Shapes: B batch, L rows, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from allears.ops.rows.functions import add_scaled

SLICE_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
"""How large the widest tensor of a slice gets on a device; one that is not named takes what the CPU does."""


def rows_per_slice(x: Tensor, width: int, dim: int = 1, times: int = 1) -> int:
    """How many rows of x, counted along ``dim``, a slice has; all of them where gradients are wanted, and in a graph
    that is compiled or exported, which should not depend on the length.

    Args:
        x: (B, L, C).
        width: numbers that the widest tensor has for each row of C numbers.
        dim: 0 or 1.
        times: how many times :data:`SLICE_BYTES` the widest tensor may have.
    """
    rows = x.shape[dim]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return rows
    budget = times * SLICE_BYTES.get(x.device.type, SLICE_BYTES["cpu"])
    across = x.shape[1 - dim] * width * x.element_size()
    return min(rows, max(1 if dim == 0 else 64, budget // max(1, across)))


def map_slices(part: Callable[[Tensor], Tensor], x: Tensor, width: int, dim: int = 1, times: int = 1) -> Tensor:
    """``part(x)`` for a part in which rows do not meet along ``dim``; see :func:`rows_per_slice`."""
    step = rows_per_slice(x, width, dim, times)
    if step >= x.shape[dim]:
        return part(x)
    return torch.cat([part(piece) for piece in x.split(step, dim)], dim)


def add_slices(part: Callable[[Tensor], Tensor], x: Tensor, gain: Tensor, width: int, halo: int = 0) -> Tensor:
    """``x + gain * part(x)`` for a part in which rows of L meet only those up to ``halo`` away.

    Args:
        part: (B, L, C) to (B, L, C). Beyond the first and the last row of what it gets it must take the same for
            granted as beyond those of x (a convolution: zeros).
        x: (B, L, C).
        gain: (C,).
        width: see :func:`rows_per_slice`.
        halo: rows on either side of a slice that ``part`` sees too.
    """
    rows, step = x.shape[1], rows_per_slice(x, width)
    if step >= rows:
        return add_scaled(x, part(x), gain)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        first, last = max(begin - halo, 0), min(end + halo, rows)
        y = part(x[:, first:last])[:, begin - first : end - first]
        torch.addcmul(x[:, begin:end], y.to(x.dtype), gain, out=out[:, begin:end])
    return out
