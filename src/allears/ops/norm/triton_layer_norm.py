"""Layer norm over the channels of (B, L, C) in Triton: a block holds as many rows as fill it.

Shapes: B batch, L rows, C channels. Tiles: ROWS rows, WIDTH channels, C of which are real.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase

_TILE = 4096


@triton.jit(do_not_specialize=["L"])
def norm_kernel(
    x, weight, bias, out, x_stride_b, x_stride_l, L, eps, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """x (B, L, C) to out (B, L, C), contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entry = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real = channel < C
    there = (row < L)[:, None] & real[None, :]
    wide = row.to(tl.int64)[:, None]
    value = tl.load(x + entry * x_stride_b + wide * x_stride_l + channel[None, :], mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(value, axis=1) / C
    value = tl.where(real[None, :], value - mean[:, None], 0.0)
    variance = tl.sum(value * value, axis=1) / C
    value = value * tl.rsqrt(variance + eps)[:, None]
    gain = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    value = value * gain[None, :] + shift[None, :]
    tl.store(out + (entry * L + wide) * C + channel[None, :], value.to(out.dtype.element_ty), mask=there)


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See :func:`~allears.ops.norm.layer_norm.layer_norm`; the output has ``dtype``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, rows, channels = x.shape
    out = torch.empty(x.shape, device=x.device, dtype=dtype)
    if not out.numel():
        return out
    width = triton.next_power_of_2(channels)
    high = max(1, _TILE // width)
    with torch.cuda.device_of(x):
        norm_kernel[(triton.cdiv(rows, high), batch)](
            x,
            weight,
            bias,
            out,
            x.stride(0),
            x.stride(1),
            rows,
            eps,
            C=channels,
            ROWS=high,
            WIDTH=width,
            num_warps=4,
        )
    return out


def aot_cases() -> list[AotCase]:
    """Of a number of channels that is no power of 2, and on Hopper of 64 and of 1024, which need no masks."""
    kinds = {"x": "*fp32", "weight": "*fp32", "bias": "*fp32", "out": "*fp32", "eps": "fp32"}
    signature = {**kinds, "x_stride_b": "i32", "x_stride_l": "i32", "L": "i32"}
    aligned = ("x", "weight", "bias", "out", "x_stride_b", "x_stride_l")
    sizes = {64: (64, 64), 96: (32, 128), 1024: (4, 1024)}
    return [
        AotCase(
            f"layer_norm_{channels}",
            norm_kernel,
            signature,
            {"C": channels, "ROWS": rows, "WIDTH": width},
            dict.fromkeys((90,) if channels == width else (80, 90, 100, 120), ()),
            aligned=aligned,
        )
        for channels, (rows, width) in sizes.items()
    ]
