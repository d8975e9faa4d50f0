"""Launches of the feed-forward's kernels. Nothing waits for the GPU, and sums over programs are made in one order.

Shapes: A, B outer sizes, L rows of a sequence, R = A * B * L rows, D channels, C hidden channels, K taps, N tiles of
rows, P parts of the rows. Weights arrive as PyTorch's modules hold them: (2 C, D, K) and (C, D, K).
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from allears.ops.conv_glu import sizes
from allears.ops.conv_glu.builds import constants
from allears.ops.conv_glu.sizes import PROGRAMS, Tile, Tiles
from allears.ops.conv_glu.triton_backward import hidden_backward_kernel, input_backward_kernel, weights_kernel
from allears.ops.conv_glu.triton_forward import narrow_kernel, widen_kernel
from allears.ops.triton_here import interpreted


class Call:
    """One feed-forward on rows x: its weights in the layout and the dtype of the products, and its sizes.

    Args:
        x: (A, B, L, D), channels next to each other in memory.
        dtype: of the products; that of what lies between the kernels.
        tiles: other sizes than those of the chip, to try them.
    """

    def __init__(
        self,
        x: Tensor,
        widen_weight: Tensor,
        widen_bias: Tensor,
        narrow_weight: Tensor,
        groups: int,
        eps: float,
        before: int,
        dtype: torch.dtype,
        tiles: Tiles | None = None,
    ) -> None:
        self.x, self.eps, self.dtype = x, eps, dtype
        self.widen = widen_weight.permute(2, 1, 0).to(dtype).contiguous()
        self.narrow = narrow_weight.permute(2, 0, 1).to(dtype).contiguous()
        self.bias = widen_bias.float().contiguous()
        taps, channels, wide = self.widen.shape
        self.hidden = wide // 2
        self.constants = constants(channels, self.hidden, taps, groups, before)
        self.rows = x.numel() // channels
        self.counts = self.rows, x.shape[2], x.shape[1]
        narrow = x.dtype.itemsize < 4
        self.tiles = sizes.tiles(_chip(x.device), channels, narrow) if tiles is None else tiles

    def hidden_rows(self) -> Tensor:
        """h (R, C)."""
        tile = self.tiles.widen
        h = self.x.new_empty((self.rows, self.hidden), dtype=self.dtype)
        grid = triton.cdiv(self.rows, tile.rows) * triton.cdiv(self.hidden, tile.columns)
        tensors = self.x, self.widen, self.bias, h
        widen_kernel[(grid,)](*tensors, *_strides(self.x), *self.counts, self.eps, **self.constants, **_launch(tile))
        return h

    def output(self, h: Tensor, bias: Tensor) -> Tensor:
        """y, as x: of h (R, C) and the bias (D,) of the second product."""
        tile, y = self.tiles.narrow, torch.empty_like(self.x)
        fixed = {key: self.constants[key] for key in ("K", "BEFORE", "D", "C")}
        padded = triton.next_power_of_2(self.constants["D"])
        tensors = h, self.narrow, bias.float().contiguous(), self.x, y
        narrow_kernel[(triton.cdiv(self.rows, tile.rows),)](
            *tensors, *_strides(self.x), *_strides(y), *self.counts, **fixed, PADDED=padded, **_launch(tile)
        )
        return y

    def hidden_backward(self, d_y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """h (R, C), d_u (R, 2 C), the normalised x and d_y (R, D), and sums of d_u (N, 2 C) float32."""
        tile, channels = self.tiles.hidden_backward, self.constants["D"]
        high = triton.cdiv(self.rows, tile.rows)

        def rows(columns: int) -> Tensor:
            return self.x.new_empty((self.rows, columns), dtype=self.dtype)

        made = rows(self.hidden), rows(2 * self.hidden), rows(channels), rows(channels)
        sums = self.x.new_empty((high, 2 * self.hidden), dtype=torch.float32)
        tensors = self.x, d_y, self.widen, self.bias, self.narrow, *made, sums
        strides = *_strides(self.x), *_strides(d_y)
        hidden_backward_kernel[(high * triton.cdiv(self.hidden, tile.columns),)](
            *tensors, *strides, *self.counts, self.eps, **self.constants, **_launch(tile)
        )
        return *made, sums

    def input_backward(self, d_u: Tensor, d_y: Tensor) -> tuple[Tensor, Tensor]:
        """d_x, as x, and sums of d_y (N, D) float32; of d_u (R, 2 C)."""
        tile, d_x = self.tiles.input_backward, torch.empty_like(self.x)
        high = triton.cdiv(self.rows, tile.rows)
        sums = self.x.new_empty((high, self.constants["D"]), dtype=torch.float32)
        tensors = d_u, self.widen, self.x, d_y, d_x, sums
        strides = *_strides(self.x), *_strides(d_y), *_strides(d_x)
        input_backward_kernel[(high,)](*tensors, *strides, *self.counts, self.eps, **self.constants, **_launch(tile))
        return d_x, sums

    def products_of_taps(self, left: Tensor, right: Tensor) -> Tensor:
        """(K, D, Q) float32: for each tap k the sum over rows of left[row + k - before]^T right[row], of left (R, D)
        and right (R, Q)."""
        tile, wide = self.tiles.weights, right.shape[1]
        taps, channels = self.constants["K"], self.constants["D"]
        blocks = triton.cdiv(taps * channels, tile.left) * triton.cdiv(wide, tile.columns)
        steps = triton.cdiv(self.rows, tile.rows)
        span = triton.cdiv(steps, max(1, min(steps, PROGRAMS // blocks))) * tile.rows
        many = triton.cdiv(self.rows, span)
        parts = self.x.new_empty((many, taps, channels, wide), dtype=torch.float32)
        fixed = {"K": taps, "BEFORE": self.constants["BEFORE"], "D": channels, "Q": wide, "LEFT": tile.left}
        counts = self.rows, self.x.shape[2], span
        weights_kernel[(many * blocks,)](left, right, parts, *counts, **fixed, **_launch(tile))
        return parts.sum(0)


def conv_swiglu_forward(
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    narrow_bias: Tensor,
    groups: int,
    eps: float,
    before: int,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """See :func:`~allears.ops.conv_glu.call.conv_swiglu`; x (A, B, L, D), ``dtype`` of the products."""
    if not x.numel():
        return torch.empty_like(x)
    with torch.cuda.device_of(x):
        call = Call(_adjoining(x), widen_weight, widen_bias, narrow_weight, groups, eps, before, dtype, tiles)
        y = call.output(call.hidden_rows(), narrow_bias)
    return y if x is call.x else torch.empty_like(x).copy_(y)


def conv_swiglu_backward(
    d_y: Tensor,
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    groups: int,
    eps: float,
    before: int,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, as x, and in float32 of widen (2 C, D, K) and (2 C,), narrow (C, D, K) and (D,)."""
    if not x.numel():
        shapes = widen_weight.shape, widen_bias.shape, narrow_weight.shape, (x.shape[-1],)
        nothing = [x.new_zeros(shape, dtype=torch.float32) for shape in shapes]
        return torch.empty_like(x), *nothing  # type: ignore
    with torch.cuda.device_of(x):
        call = Call(_adjoining(x), widen_weight, widen_bias, narrow_weight, groups, eps, before, dtype, tiles)
        d_y = _adjoining(d_y)
        h, d_u, normed, d_flat, of_widen = call.hidden_backward(d_y)
        d_x, of_narrow = call.input_backward(d_u, d_y)
        d_widen = call.products_of_taps(normed, d_u).permute(2, 1, 0).contiguous()
        d_narrow = call.products_of_taps(d_flat, h).permute(2, 1, 0).contiguous()
    d_x = d_x if x is call.x else torch.empty_like(x).copy_(d_x)
    return d_x, d_widen, of_widen.sum(0), d_narrow, of_narrow.sum(0)


def _launch(tile: Tile) -> dict[str, Any]:
    return {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.warps, "num_stages": tile.stages}


def _strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def _adjoining(x: Tensor) -> Tensor:
    """x whose channels adjoin in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache
def _chip(device: torch.device) -> int:
    """Its compute capability times ten, of those for which there are sizes."""
    if interpreted():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80 if (major, minor) == (8, 0) else 120)
