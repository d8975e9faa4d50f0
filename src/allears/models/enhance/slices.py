"""The enhancer's prediction on a CPU in little memory: the network's parts run on slices, between buffers that stay.

A part whose frames (or bands) meet only their neighbours, or not at all, runs on a few of them at a time and writes
into one block of memory that is made once and serves every window. Beside that block only the temporaries of a slice
are alive, a few MB each. So the peak of resident memory follows from the shapes and not from what the allocator keeps,
and no window waits for fresh pages.

Shapes: B batch, T frames, F bins, R = T / 2 rows, C channels; states are (B, T, F, 2).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from allears.models.enhance.model import HALO_ROWS, DualPathBlock, EnhanceNet, pad_to_even

_FREED_BYTES = 30_000_000
"""Asked for and given back, untouched, before the block is made. glibc's malloc takes the largest piece that it saw
freed (up to 32 MB) as the measure of what to keep rather than to return to the system; without it the temporaries of a
slice are returned and asked for again at each step, and a tenth of the time goes to fresh pages.
"""


class SlicedNet:
    """Gives what ``net(x_t, y, t)`` gives, without gradients.

    It holds buffers: one for each session, not to be shared by threads. They grow to the largest shape seen: for the
    shipped network and a window of 6 s, 62 MB.

    Args:
        net: the network, on a CPU; the parameters stay its own.
        rows: rows, of two frames, in a slice of time.
        bands: bands in a slice of frequency.
    """

    def __init__(self, net: EnhanceNet, rows: int = 32, bands: int = 8) -> None:
        self._net, self._rows, self._bands = net, rows, bands
        self._block = torch.empty(0)

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """x_t and y (B, T, F, 2), t (B,) in [0, 1]; returns (B, T, F, 2) in float32, which is the caller's to keep."""
        net, frames = self._net, y.shape[1]
        x_t, y = pad_to_even(x_t), pad_to_even(y)
        batch, even, bins, _ = y.shape
        rows, (wide_c, half_c, core_c) = even // 2, net.config.widths
        full, halved, core = (
            (batch, even, bins, wide_c),
            (batch, rows, bins // 2, half_c),
            (batch, rows, bins // 4, core_c),
        )
        roomy = max(halved, core, key=math.prod)
        wide, half, here, there = self._buffers(full, halved, roomy, roomy)
        by_rows = partial(_by_rows, rows=rows, step=self._rows)
        time = net.embed(t)
        by_rows(lambda x_t, y: net.enter_wide(x_t, y, time), (x_t, y), wide, halo=HALO_ROWS)
        by_rows(lambda wide: net.enter_half(wide, time), (wide,), half, halo=HALO_ROWS)
        by_rows(net.enter_core, (half,), _front(here, core))
        for block in cast(list[DualPathBlock], net.blocks):
            h = _front(here, core)
            h.add_(block.shift(h, time))
            for piece in h.split(self._bands, dim=2):
                piece.add_(block.look_along_time(piece))
            for piece in h.split(self._rows, dim=1):
                piece.add_(block.look_along_frequency(piece))
            by_rows(lambda h, block=block: h + block.look_around(h), (h,), _front(there, core), halo=1)
            here, there = there, here
        h, up = _front(here, core), _front(there, halved)
        by_rows(lambda h, half: net.leave_core(h, half, time), (h, half), up, halo=HALO_ROWS)
        clean = torch.empty(y.shape)
        by_rows(lambda up, wide, y: net.leave_wide(up, wide, y, time), (up, wide, y), clean, halo=HALO_ROWS)
        return clean[:, :frames]

    def _buffers(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Tensors of these shapes in one block, which grows if it must and is kept. What they hold is undefined."""
        sizes = [math.prod(shape) for shape in shapes]
        if self._block.numel() < sum(sizes):
            self._block = torch.empty(0)  # so that the old one goes first
            torch.empty(_FREED_BYTES, dtype=torch.uint8)
            with torch.inference_mode(False):
                self._block = torch.empty(sum(sizes))
        parts = self._block[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _by_rows(
    part: Callable[..., Tensor], given: tuple[Tensor, ...], out: Tensor, rows: int, step: int, halo: int = 0
) -> None:
    """``part`` of every ``step`` rows of ``given``, with so many more of a ``halo`` on either side, written to ``out``.

    Each tensor has one or more frames a row.
    """
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        first, last = max(begin - halo, 0), min(end + halo, rows)
        y = part(*(_stretch(x, first, last, rows) for x in given))
        _stretch(out, begin, end, rows).copy_(_stretch(y, begin - first, end - first, last - first))


def _front(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The first values of the buffer, in this shape."""
    return buffer.flatten()[: math.prod(shape)].view(shape)


def _stretch(x: Tensor, begin: int, end: int, rows: int) -> Tensor:
    """From row ``begin`` to ``end`` of x, which has ``rows`` of them."""
    frames = x.shape[1] // rows
    return x[:, begin * frames : end * frames]
