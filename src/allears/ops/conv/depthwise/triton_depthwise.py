"""Depthwise convolution over (B, L, C) in Triton, forward and backward.

Shapes: B batch, L rows in, M rows out, C channels (of the output), K taps. Tiles: ROWS rows, WIDTH channels, TAPS taps;
P parts of the rows of all entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase

_PARTS = 512


@triton.jit
def _sum_taps(
    total,
    at_x,
    weight,
    first,
    channel,
    real,
    x_stride_l,
    L,
    ALL,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TURNED: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """total (ROWS, WIDTH) + sum_k weight[k] x[row(k)] for the rows from ``first`` on; weight is (K, ALL).

    TURNED: the rows of the gradient of x out of those of y. MASKED: some rows may not exist.
    """
    row = first + tl.arange(0, ROWS)
    step = -1 if TURNED else 1
    begin = row + PAD if TURNED else row * STRIDE - PAD
    at_first = at_x + begin.to(tl.int64)[:, None] * x_stride_l
    for k in tl.range(0, K, loop_unroll_factor=4):
        tap = tl.load(weight + k * ALL + channel, mask=real, other=0.0).to(tl.float32)
        source = begin + k * step
        there = (source >= 0) & (source < L * STRIDE if TURNED else source < L)
        if TURNED and STRIDE > 1:
            there &= source % STRIDE == 0
            at = at_x + (source // STRIDE).to(tl.int64)[:, None] * x_stride_l
        else:
            at = at_first + k * step * x_stride_l
        if MASKED:
            value = tl.load(at, mask=there[:, None] & real[None, :], other=0.0)
        else:
            value = tl.load(at, mask=real[None, :], other=0.0)
        total += value.to(tl.float32) * tap[None, :]
    return total


@triton.jit
def _convolve(
    at_x,
    weight,
    bias,
    first,
    channel,
    real,
    x_stride_l,
    L,
    ALL,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TURNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The rows from ``first`` on, (ROWS, WIDTH)."""
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if bias is not None:
        total += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)[None, :]
    if TURNED:
        low, high = first + PAD - (K - 1), first + ROWS - 1 + PAD
    else:
        low, high = first * STRIDE - PAD, (first + ROWS - 1) * STRIDE + K - 1 - PAD
    if (low >= 0) & (high < L * (TURNED == False or STRIDE == 1)):  # noqa: E712
        total = _sum_taps(
            total, at_x, weight, first, channel, real, x_stride_l, L, ALL, K, STRIDE, PAD, TURNED, False, ROWS
        )
    else:
        total = _sum_taps(
            total, at_x, weight, first, channel, real, x_stride_l, L, ALL, K, STRIDE, PAD, TURNED, True, ROWS
        )
    return total


@triton.jit(do_not_specialize=["L", "M"])
def conv_kernel(
    x,
    weight,
    bias,
    out,
    x_stride_b,
    x_stride_l,
    L,
    M,
    C,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TURNED: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """x (B, L, C or 2 C) with weight (K, C or 2 C) to out (B, M, C), contiguous."""
    first = tl.program_id(0) * ROWS
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    entry = tl.program_id(2).to(tl.int64)
    real = channel < C
    at_x = x + entry * x_stride_b + channel[None, :]
    ALL = C * 2 if GATED else C
    y = _convolve(at_x, weight, bias, first, channel, real, x_stride_l, L, ALL, K, STRIDE, PAD, TURNED, ROWS, WIDTH)
    if GATED:
        gate = _convolve(
            at_x + C,
            weight + C,
            bias + C,
            first,
            channel,
            real,
            x_stride_l,
            L,
            ALL,
            K,
            STRIDE,
            PAD,
            TURNED,
            ROWS,
            WIDTH,
        )
        y = y / (1.0 + tl.exp(-gate))
    row = first + tl.arange(0, ROWS)
    at = out + (entry * M + row.to(tl.int64))[:, None] * C + channel[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=(row < M)[:, None] & real[None, :])


@triton.jit(do_not_specialize=["L", "M"])
def gate_kernel(
    x,
    weight,
    bias,
    d_out,
    d_wide,
    x_stride_b,
    x_stride_l,
    L,
    M,
    C,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Out of d_out (B, M, C) of the gated form the gradient of the convolution, d_wide (B, M, 2 C); both contiguous.

    The convolution is made again, which costs less than keeping it.
    """
    first = tl.program_id(0) * ROWS
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    entry = tl.program_id(2).to(tl.int64)
    real = channel < C
    at_x = x + entry * x_stride_b + channel[None, :]
    value = _convolve(
        at_x, weight, bias, first, channel, real, x_stride_l, L, C * 2, K, STRIDE, PAD, False, ROWS, WIDTH
    )
    gate = _convolve(
        at_x + C, weight + C, bias + C, first, channel, real, x_stride_l, L, C * 2, K, STRIDE, PAD, False, ROWS, WIDTH
    )
    gate = 1.0 / (1.0 + tl.exp(-gate))
    row = first + tl.arange(0, ROWS)
    there = (row < M)[:, None] & real[None, :]
    place = entry * M + row.to(tl.int64)[:, None]
    slope = tl.load(d_out + place * C + channel[None, :], mask=there, other=0.0).to(tl.float32)
    at = d_wide + place * (2 * C) + channel[None, :]
    tl.store(at, (slope * gate).to(d_wide.dtype.element_ty), mask=there)
    tl.store(at + C, (slope * value * gate * (1.0 - gate)).to(d_wide.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["L", "M", "span", "parts_each"])
def weight_kernel(
    x,
    d_out,
    parts,
    x_stride_b,
    x_stride_l,
    L,
    M,
    C,
    span,
    parts_each,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """A part of the rows of an entry, some channels and taps: sums of d_out x, and of d_out as tap K, to parts
    (P, K + 1, C). d_out (B, M, C) is contiguous."""
    part = tl.program_id(0)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tap = tl.program_id(2) * TAPS + tl.arange(0, TAPS)
    entry = (part // parts_each).to(tl.int64)
    start = (part % parts_each) * span
    stop = tl.minimum(start + span, M)
    real = channel < C
    at_x = x + entry * x_stride_b + channel[None, None, :]
    at_d = d_out + entry * M * C + channel[None, :]
    total = tl.zeros((TAPS, ROWS, WIDTH), tl.float32)
    of_bias = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < stop
        slope = tl.load(at_d + row.to(tl.int64)[:, None] * C, mask=inside[:, None] & real[None, :], other=0.0)
        source = row[None, :] * STRIDE + tap[:, None] - PAD
        there = inside[None, :] & (source >= 0) & (source < L) & (tap < K)[:, None]
        at = at_x + source.to(tl.int64)[:, :, None] * x_stride_l
        value = tl.load(at, mask=there[:, :, None] & real[None, None, :], other=0.0)
        total += value.to(tl.float32) * slope.to(tl.float32)[None, :, :]
        of_bias += slope.to(tl.float32)
    to = parts + part.to(tl.int64) * (K + 1) * C
    at = to + tap[:, None] * C + channel[None, :]
    tl.store(at, tl.sum(total, axis=1), mask=(tap < K)[:, None] & real[None, :])
    if tl.program_id(2) == 0:
        tl.store(to + K * C + channel, tl.sum(of_bias, axis=0), mask=real)


def _tile(rows: int, channels: int, gated: bool) -> tuple[int, int]:
    """ROWS and WIDTH: a warp reads whole lines, and a thread has 16 or 32 sums."""
    width = min(64, max(16, triton.next_power_of_2(channels)))
    most = (1024 if gated else 4096) // width
    return min(most, max(8, triton.next_power_of_2(rows))), width


def _adjoining(x: Tensor) -> Tensor:
    """x (B, L, C) whose channels adjoin in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _taps_first(weight: Tensor) -> Tensor:
    """(C, 1, K) to (K, C)."""
    return weight[:, 0].t().contiguous()


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, gated: bool) -> Tensor:
    """See :func:`~allears.ops.conv.depthwise.call.depthwise_conv`. x has 16 or 32 bits a number."""
    batch, rows, channels = x.shape
    taps = weight.shape[-1]
    made = (rows + 2 * padding - taps) // stride + 1
    if gated and bias is None:
        bias = weight.new_zeros(channels)
    shape = (batch, made, channels // (2 if gated else 1))
    return _launch(_adjoining(x), _taps_first(weight), bias, shape, (taps, stride, padding), False, gated)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int],
    sizes: tuple[int, int, int],
    turned: bool,
    gated: bool,
) -> Tensor:
    out = torch.empty(shape, device=x.device, dtype=x.dtype)
    if not out.numel():
        return out
    batch, rows, channels = shape
    high, width = _tile(rows, channels, gated)
    grid = (triton.cdiv(rows, high), triton.cdiv(channels, width), batch)
    with torch.cuda.device_of(x):
        conv_kernel[grid](
            x,
            weight,
            bias,
            out,
            x.stride(0),
            x.stride(1),
            x.shape[1],
            rows,
            channels,
            *sizes,
            TURNED=turned,
            GATED=gated,
            ROWS=high,
            WIDTH=width,
            num_warps=4,
        )
    return out


def gate_backward(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Out of the gradient (B, M, C / 2) of the gated form that of the convolution, (B, M, C)."""
    x, d_out = _adjoining(x), d_out.contiguous()
    batch, made, half = d_out.shape
    d_wide = torch.empty(batch, made, 2 * half, device=x.device, dtype=d_out.dtype)
    if not d_out.numel():
        return d_wide
    bias = weight.new_zeros(2 * half) if bias is None else bias
    high, width = _tile(made, half, True)
    grid = (triton.cdiv(made, high), triton.cdiv(half, width), batch)
    with torch.cuda.device_of(x):
        gate_kernel[grid](
            x,
            _taps_first(weight),
            bias,
            d_out,
            d_wide,
            x.stride(0),
            x.stride(1),
            x.shape[1],
            made,
            half,
            weight.shape[-1],
            stride,
            padding,
            ROWS=high,
            WIDTH=width,
            num_warps=4,
        )
    return d_wide


def conv_backward(d_out: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in its dtype, and of weight and bias, in float32. Nothing waits for the GPU."""
    x, d_out = _adjoining(x), d_out.contiguous()
    batch, rows, channels = x.shape
    made, taps = d_out.shape[1], weight.shape[-1]
    sizes = (taps, stride, padding)
    d_x = _launch(d_out, _taps_first(weight), None, (batch, rows, channels), sizes, True, False)
    if not d_out.numel():
        nothing = torch.zeros(channels, taps + 1, device=x.device)
        return d_x, nothing[:, None, :taps].contiguous(), nothing[:, taps].contiguous()
    high, width, side = 8, _tile(8, channels, True)[1], 8 if taps > 4 else 4
    each = max(1, min(_PARTS // batch, triton.cdiv(made, 4 * high)))
    span = triton.cdiv(triton.cdiv(made, each), high) * high
    each = triton.cdiv(made, span)
    parts = torch.empty(batch * each, taps + 1, channels, device=x.device)
    grid = (batch * each, triton.cdiv(channels, width), triton.cdiv(taps, side))
    with torch.cuda.device_of(x):
        weight_kernel[grid](
            x,
            d_out,
            parts,
            x.stride(0),
            x.stride(1),
            rows,
            made,
            channels,
            span,
            each,
            *sizes,
            ROWS=high,
            WIDTH=width,
            TAPS=side,
            num_warps=4,
        )
    total = parts.sum(0).t()
    return d_x, total[:, None, :taps].contiguous(), total[:, taps].contiguous()


def aot_cases() -> list[AotCase]:
    """A long convolution in 16 bits, and on Hopper in 32, a short gated one, one with a stride and its gradients."""

    pointers = ("x", "weight", "bias", "out", "d_out", "d_wide", "parts")

    def case(name: str, kernel, kind: str, **constants) -> AotCase:
        fixed = {key: value for key, value in constants.items() if key in kernel.arg_names}
        signature = {}
        for argument in kernel.arg_names:
            if argument not in fixed:
                pointer = {"weight": "*fp32", "bias": "*fp32", "parts": "*fp32"}.get(argument, f"*{kind}")
                signature[argument] = pointer if argument in pointers else "i32"
        lengths = ("L", "M", "span", "parts_each")
        aligned = tuple(argument for argument in signature if argument not in lengths)
        chips = dict.fromkeys((90,) if name == "depthwise_65" else (80, 90, 100, 120), ())
        spills = fixed.get("GATED", False)  # 8 bytes a thread on Ampere
        return AotCase(name, kernel, signature, fixed, chips, num_warps=4, aligned=aligned, spills=spills)

    long = {"K": 65, "STRIDE": 1, "PAD": 32, "TURNED": False, "GATED": False, "ROWS": 64, "WIDTH": 64}
    gated = {**long, "K": 3, "PAD": 1, "GATED": True, "ROWS": 16}
    down = {**long, "K": 5, "PAD": 2, "STRIDE": 2}
    return [
        case("depthwise_65", conv_kernel, "fp32", **long),
        case("depthwise_65_bf16", conv_kernel, "bf16", **long),
        case("depthwise_3_gated", conv_kernel, "fp32", **gated),
        case("depthwise_3_gate_backward", gate_kernel, "bf16", **gated),
        case("depthwise_5_down", conv_kernel, "fp32", **down),
        case("depthwise_5_down_turned", conv_kernel, "fp32", **{**down, "TURNED": True, "bias": None}),
        case("depthwise_65_weight", weight_kernel, "fp32", **{**long, "ROWS": 8, "TAPS": 8}),
    ]
