"""Rotary position embedding in Triton, with the RMS norm before it (over all heads, as Wan has it) in the same pass.

Shapes: B entries, L rows of an entry, H heads, D head size, C = H * D channels, M = B * L. Tiles: WIDTH channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase


@triton.jit(do_not_specialize=["L"])
def rope_kernel(
    x,
    cos,
    sin,
    weight,
    out,
    L,
    eps,
    x_stride_b,
    x_stride_l,
    C: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A row of x (B, L, C) to out (B, L, C); cos and sin (L, D / 2). The two numbers of a pair lie side by side if
    INTERLEAVED, else in the two halves of a head."""
    inside = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, WIDTH // 2)
    half: tl.constexpr = D // 2
    there = pair < C // 2
    channel = tl.arange(0, WIDTH)  # of pairs side by side
    first = pair // half * D + pair % half  # of pairs in halves
    at = x + entry * x_stride_b + inside * x_stride_l
    if INTERLEAVED:
        both = tl.load(at + channel, mask=channel < C, other=0.0).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(both, (WIDTH // 2, 2)))
    else:
        real = tl.load(at + first, mask=there, other=0.0).to(tl.float32)
        imaginary = tl.load(at + first + half, mask=there, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt((tl.sum(real * real, axis=0) + tl.sum(imaginary * imaginary, axis=0)) / C + eps)
        real, imaginary = real * inverse, imaginary * inverse
        if weight is not None:
            if INTERLEAVED:
                gain = tl.load(weight + channel, mask=channel < C, other=0.0).to(tl.float32)
                gain_real, gain_imaginary = tl.split(tl.reshape(gain, (WIDTH // 2, 2)))
            else:
                gain_real = tl.load(weight + first, mask=there, other=0.0).to(tl.float32)
                gain_imaginary = tl.load(weight + first + half, mask=there, other=0.0).to(tl.float32)
            real, imaginary = real * gain_real, imaginary * gain_imaginary
    angle = inside * half + pair % half
    c = tl.load(cos + angle, mask=there, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=there, other=0.0).to(tl.float32)
    turned_real, turned_imaginary = real * c - imaginary * s, real * s + imaginary * c
    to = out + (entry * L + inside) * C
    kind = out.dtype.element_ty
    if INTERLEAVED:
        turned = tl.reshape(tl.join(turned_real, turned_imaginary), (WIDTH,))
        tl.store(to + channel, turned.to(kind), mask=channel < C)
    else:
        tl.store(to + first, turned_real.to(kind), mask=there)
        tl.store(to + first + half, turned_imaginary.to(kind), mask=there)


def rotate_forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, norm: bool, interleaved: bool
) -> Tensor:
    """See :func:`~allears.ops.norm.rope.rotate`: x (B, L, H, D) to the same, contiguous."""
    batch, length, heads, size = x.shape
    channels = heads * size
    flat = x.reshape(batch, length, channels)
    flat = flat if flat.stride(2) == 1 else flat.contiguous()
    out = x.new_empty(x.shape)
    if not out.numel():
        return out
    width = max(16, triton.next_power_of_2(channels))
    with torch.cuda.device_of(x):
        rope_kernel[length, batch](
            flat,
            cos.contiguous(),
            sin.contiguous(),
            None if weight is None else weight.contiguous(),
            out,
            length,
            eps,
            flat.stride(0),
            flat.stride(1),
            C=channels,
            D=size,
            NORM=norm,
            INTERLEAVED=interleaved,
            WIDTH=width,
            num_warps=min(16, max(1, width // 512)),
        )
    return out


def aot_cases() -> list[AotCase]:
    """Both layouts at 12 heads of 128, and on Hopper one at 40."""
    signature = {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "weight": "*bf16", "out": "*bf16", "L": "i32"}
    signature |= {"eps": "fp32", "x_stride_b": "i32", "x_stride_l": "i32"}
    return [
        AotCase(
            f"rope_{channels}_{'pairs' if pairs else 'halves'}",
            rope_kernel,
            signature,
            {"C": channels, "D": 128, "NORM": True, "INTERLEAVED": pairs, "WIDTH": width},
            dict.fromkeys((80, 90, 100, 120) if channels == 1536 else (90,), ()),
            num_warps=width // 512,
            aligned=("x", "cos", "sin", "weight", "out", "x_stride_b", "x_stride_l"),
        )
        for channels, width, pairs in ((1536, 2048, True), (5120, 8192, True), (1536, 2048, False))
    ]
