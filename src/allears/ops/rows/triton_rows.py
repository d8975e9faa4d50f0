"""Backward passes over many short rows in Triton: a program takes some tiles of rows, keeps the sums over them in
registers, and writes them once.

Shapes: M rows, C channels, P programs. Tiles: ROWS rows, WIDTH channels, C of which are real.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase

_TILE = 2048
_PROGRAMS = 1024


@triton.jit(do_not_specialize=["M", "tiles"])
def column_sum_kernel(x, partial, M, tiles, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """x (M, C) to partial (P, C): the sums over the tiles of each program."""
    part = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    real = (channel < C)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(tiles):
        row = (part * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (row < M)[:, None] & real
        total += tl.load(x + row[:, None] * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(partial + part * C + channel, tl.sum(total, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["M", "tiles"])
def scale_kernel(grad, y, gain, d_y, partial, M, tiles, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """d_y = grad * gain (M, C), and the sums of grad * y, (P, C)."""
    part = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    real = (channel < C)[None, :]
    factor = tl.load(gain + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(tiles):
        row = (part * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (row < M)[:, None] & real
        place = row[:, None] * C + channel[None, :]
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        total += g * tl.load(y + place, mask=there, other=0.0).to(tl.float32)
        tl.store(d_y + place, (g * factor).to(d_y.dtype.element_ty), mask=there)
    tl.store(partial + part * C + channel, tl.sum(total, axis=0), mask=channel < C)


@triton.jit(do_not_specialize=["M", "tiles"])
def norm_backward_kernel(
    grad, x, weight, d_x, partial, M, tiles, eps, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Of a layer norm: d_x (M, C), and the sums for weight and bias, (P, 2, C). Mean and deviation are made again."""
    part = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    real = (channel < C)[None, :]
    gain = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros((ROWS, WIDTH), tl.float32)
    of_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for tile in range(tiles):
        row = (part * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there = (row < M)[:, None] & real
        place = row[:, None] * C + channel[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=there, other=0.0).to(tl.float32)
        value = tl.where(real, value - (tl.sum(value, axis=1) / C)[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) / C + eps)[:, None]
        value = value * inverse
        of_weight += g * value
        of_bias += g
        g = g * gain
        along = (tl.sum(g * value, axis=1) / C)[:, None]
        d = (g - (tl.sum(g, axis=1) / C)[:, None] - value * along) * inverse
        tl.store(d_x + place, d.to(d_x.dtype.element_ty), mask=there)
    tl.store(partial + part * 2 * C + channel, tl.sum(of_weight, axis=0), mask=channel < C)
    tl.store(partial + part * 2 * C + C + channel, tl.sum(of_bias, axis=0), mask=channel < C)


def column_sum(x: Tensor) -> Tensor:
    """x (M, C) to its sums over the rows, (C,) in float32."""
    x = x.contiguous()
    sizes, programs, tiles = _plan(x)
    partial = torch.empty(programs, x.shape[1], device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        column_sum_kernel[(programs,)](x, partial, x.shape[0], tiles, num_warps=4, **sizes)
    return partial.sum(0)


def scale_backward(grad: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Of gain * y: the gradient of y (..., C) in its dtype, and of gain (C,) in float32."""
    grad, y = grad.contiguous(), y.contiguous()
    flat = y.view(-1, y.shape[-1])
    sizes, programs, tiles = _plan(flat)
    d_y = torch.empty_like(y)
    partial = torch.empty(programs, flat.shape[1], device=y.device, dtype=torch.float32)
    with torch.cuda.device_of(y):
        scale_kernel[(programs,)](grad, y, gain, d_y, partial, flat.shape[0], tiles, num_warps=4, **sizes)
    return d_y, partial.sum(0)


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (..., C) in its dtype, and of weight and bias (C,) in float32."""
    grad, x = grad.contiguous(), x.contiguous()
    flat = x.view(-1, x.shape[-1])
    sizes, programs, tiles = _plan(flat)
    d_x = torch.empty_like(x)
    partial = torch.empty(programs, 2, flat.shape[1], device=x.device, dtype=torch.float32)
    with torch.cuda.device_of(x):
        norm_backward_kernel[(programs,)](
            grad, x, weight, d_x, partial, flat.shape[0], tiles, eps, num_warps=4, **sizes
        )
    of_weight, of_bias = partial.sum(0).unbind(0)
    return d_x, of_weight, of_bias


def _plan(x: Tensor) -> tuple[dict[str, int], int, int]:
    """Sizes of a tile of x (M, C), the number of programs, and of tiles that each one takes."""
    width = triton.next_power_of_2(x.shape[1])
    rows = max(1, _TILE // width)
    tiles = triton.cdiv(x.shape[0], rows)
    each = triton.cdiv(tiles, min(tiles, _PROGRAMS)) if tiles else 1
    return {"C": x.shape[1], "ROWS": rows, "WIDTH": width}, max(1, triton.cdiv(tiles, each)), each


def aot_cases() -> list[AotCase]:
    """Each kernel for a number of channels that is no power of 2, and on Hopper for 64, which needs no masks."""
    counts = {"M": "i32", "tiles": "i32"}
    kernels = {
        "column_sum": (column_sum_kernel, {"x": "*bf16", "partial": "*fp32", **counts}),
        "scale": (
            scale_kernel,
            {"grad": "*fp32", "y": "*bf16", "gain": "*fp32", "d_y": "*bf16", "partial": "*fp32", **counts},
        ),
        "norm_backward": (
            norm_backward_kernel,
            {
                "grad": "*bf16",
                "x": "*fp32",
                "weight": "*fp32",
                "d_x": "*fp32",
                "partial": "*fp32",
                **counts,
                "eps": "fp32",
            },
        ),
    }
    return [
        AotCase(
            f"{name}_{channels}",
            kernel,
            signature,
            {"C": channels, "ROWS": rows, "WIDTH": width},
            dict.fromkeys((90,) if channels == width else (80, 90, 100, 120), ()),
            aligned=tuple(argument for argument, kind in signature.items() if kind.startswith("*")),
        )
        for name, (kernel, signature) in kernels.items()
        for channels, rows, width in ((64, 32, 64), (96, 16, 128))
    ]
