"""The feed-forward's gradients in Triton. What the forward pass had in between is made again: from x in one kernel,
which leaves in 16 bits what the two others read.

Shapes: A, B outer sizes, L rows of a sequence, R = A * B * L rows, D channels, C hidden channels, K taps, G groups,
N tiles of rows, P parts of the rows. Tiles: see ``triton_forward.py``.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.conv_glu.builds import BUILDS, COUNTS, MODELS, STRIDES, aot_case, constants
from allears.ops.conv_glu.sizes import tiles
from allears.ops.conv_glu.triton_forward import (
    below,
    by_group,
    group_columns,
    load_rows,
    locate,
    normalised,
    taps_product,
    widened,
)


@triton.jit(do_not_specialize=["rows", "L", "B"])
def hidden_backward_kernel(
    x,
    d_y,
    widen,
    bias,
    narrow,
    h,
    d_u,
    normed,
    d_flat,
    bias_parts,
    stride_a,
    stride_b,
    stride_l,
    d_stride_a,
    d_stride_b,
    d_stride_l,
    rows,
    L,
    B,
    eps,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SPREAD: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x and d_y (A, B, L, D), widen (K, D, 2 C), narrow (K, C, D) and bias (2 C,) to h (R, C), d_u (R, 2 C), and the
    sums of d_u over the rows of each tile, (N, 2 C); the programs of the first columns also write the rows of x over
    their roots, and those of d_y, (R, D)."""
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    tile_index, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    row = tile_index * ROWS + tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = row < rows, below(column, C, COLUMNS)
    outer, inner, place = locate(row, L, B)
    begin = outer * stride_a + inner * stride_b
    d_begin = outer * d_stride_a + inner * d_stride_b
    channel, real = group_columns(D, GROUPS, SPREAD, WIDE)
    kind = h.dtype.element_ty

    d_h = tl.zeros((ROWS, COLUMNS), tl.float32)
    known = real[:, None] & inside[None, :]
    at_weight = narrow + column[None, :] * D + channel[:, None]
    for k in range(K):
        tile = load_rows(d_y, d_begin, place, k - BEFORE, d_stride_l, L, there, channel, real)
        d_h = tl.dot(tile.to(kind), tl.load(at_weight + k * (C * D), mask=known, other=0.0), d_h)
    value, gate = widened(
        x,
        widen,
        bias,
        begin,
        place,
        there,
        column,
        inside,
        stride_l,
        L,
        eps,
        K,
        BEFORE,
        D,
        C,
        GROUPS,
        SPREAD,
        WIDE,
        ROWS,
        COLUMNS,
    )
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    mask = there[:, None] & inside[None, :]
    wide = row.to(tl.int64)[:, None]
    tl.store(h + wide * C + column[None, :], (value * silu).to(kind), mask=mask)
    d_gate = d_h * value * (sigmoid + silu * (1.0 - sigmoid))
    d_value = d_h * silu
    at = d_u + wide * (2 * C) + column[None, :]
    tl.store(at, d_value.to(kind), mask=mask)
    tl.store(at + C, d_gate.to(kind), mask=mask)
    at = bias_parts + tile_index.to(tl.int64) * (2 * C) + column
    tl.store(at, tl.sum(tl.where(mask, d_value, 0.0), axis=0), mask=inside)
    tl.store(at + C, tl.sum(tl.where(mask, d_gate, 0.0), axis=0), mask=inside)
    if block == 0:
        both = there[:, None] & real[None, :]
        flat = wide * D + channel[None, :]
        own = load_rows(x, begin, place, 0, stride_l, L, there, channel, real)
        tl.store(normed + flat, normalised(own, eps, D // GROUPS, SPREAD, WIDE).to(kind), mask=both)
        slope = load_rows(d_y, d_begin, place, 0, d_stride_l, L, there, channel, real)
        tl.store(d_flat + flat, slope.to(kind), mask=both)


@triton.jit(do_not_specialize=["rows", "L", "B"])
def input_backward_kernel(
    d_u,
    widen,
    x,
    d_y,
    d_x,
    bias_parts,
    stride_a,
    stride_b,
    stride_l,
    d_stride_a,
    d_stride_b,
    d_stride_l,
    x_stride_a,
    x_stride_b,
    x_stride_l,
    rows,
    L,
    B,
    eps,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SPREAD: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_u (R, 2 C), widen (K, D, 2 C), x and d_y (A, B, L, D) to d_x, with the strides ``x_stride_*``, and the sums of
    d_y over the rows of each tile, (N, D). COLUMNS is the step of the sum over 2 C."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    outer, inner, place = locate(row, L, B)
    channel, real = group_columns(D, GROUPS, SPREAD, WIDE)
    PADDED: tl.constexpr = SPREAD * WIDE
    slope = taps_product(
        d_u, widen, row, place, there, L, channel, real, K, BEFORE, 2 * C, D * 2 * C, 1, 2 * C, ROWS, COLUMNS, PADDED
    )
    tile = load_rows(x, outer * stride_a + inner * stride_b, place, 0, stride_l, L, there, channel, real)
    parts, inverse = by_group(tile, eps, D // GROUPS, SPREAD, WIDE)
    slope = tl.reshape(slope, (ROWS, SPREAD, WIDE))
    along = tl.sum(slope * parts, axis=2) / (D // GROUPS)
    slope = tl.reshape((slope - parts * along[:, :, None]) * inverse[:, :, None], (ROWS, PADDED))
    tile = load_rows(d_y, outer * d_stride_a + inner * d_stride_b, place, 0, d_stride_l, L, there, channel, real)
    tile = tile.to(tl.float32)
    at = d_x + (outer * x_stride_a + inner * x_stride_b + place.to(tl.int64) * x_stride_l)[:, None] + channel[None, :]
    tl.store(at, (slope + tile).to(d_x.dtype.element_ty), mask=there[:, None] & real[None, :])
    tl.store(bias_parts + tl.program_id(0).to(tl.int64) * D + channel, tl.sum(tile, axis=0), mask=real)


@triton.jit(do_not_specialize=["rows", "L", "span"])
def weights_kernel(
    left,
    right,
    parts,
    rows,
    L,
    span,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    D: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    LEFT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """left (R, D) and right (R, Q) to parts (P, K, D, Q) float32: for each tap k the sum over a part of the rows of
    left[row + k - BEFORE]^T right[row], within sequences.

    The taps stand next to each other, as further columns of left: one product makes several. Programs: the blocks of a
    result next to each other in time, which read the same rows.
    """
    ACROSS: tl.constexpr = (Q + COLUMNS - 1) // COLUMNS
    BLOCKS: tl.constexpr = (K * D + LEFT - 1) // LEFT * ACROSS
    part, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    high = (block // ACROSS) * LEFT + tl.arange(0, LEFT)
    shift = high // D - BEFORE
    column = (block % ACROSS) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = below(high, K * D, LEFT), below(column, Q, COLUMNS)
    total = tl.zeros((LEFT, COLUMNS), tl.float32)
    start = part * span
    stop = tl.minimum(start + span, rows)
    at_left = left + (high % D + shift * D)[None, :]
    for first in range(start, stop, ROWS):
        row = first + tl.arange(0, ROWS)
        wide, there = row.to(tl.int64)[:, None], row < stop
        at = (row % L)[:, None] + shift[None, :]
        mask = there[:, None] & real[None, :] & (at >= 0) & (at < L)
        a = tl.load(at_left + wide * D, mask=mask, other=0.0)
        b = tl.load(right + wide * Q + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    at = parts + part.to(tl.int64) * (K * D * Q) + high[:, None] * Q + column[None, :]
    tl.store(at, total, mask=real[:, None] & inside[None, :])


def aot_cases() -> list[AotCase]:
    """All three kernels for :data:`~allears.ops.conv_glu.builds.BUILDS`."""
    return [case for build in BUILDS for case in cases_of(*build)]


def cases_of(name: str, chip: int, kind: str) -> list[AotCase]:
    """All three kernels for a network, a chip, and x of ``kind``; of the weights' gradients the larger one."""
    channels, hidden, taps, groups = MODELS[name]
    shared = constants(channels, hidden, taps, groups, (taps - 1) // 2)
    sizes = tiles(chip, channels, kind != "fp32")
    common = {**COUNTS, **STRIDES, **{f"d_{stride}": "i32" for stride in STRIDES}, "eps": "fp32"}
    common.update({"x": f"*{kind}", "d_y": f"*{kind}", "d_u": "*bf16", "widen": "*bf16", "bias_parts": "*fp32"})
    made = {**dict.fromkeys(("narrow", "h", "normed", "d_flat"), "*bf16"), "bias": "*fp32"}
    output = {"d_x": f"*{kind}", **{f"x_{stride}": "i32" for stride in STRIDES}}
    weights = {"left": "*bf16", "right": "*bf16", "parts": "*fp32", "rows": "i32", "L": "i32", "span": "i32"}
    sums = {"K": taps, "BEFORE": shared["BEFORE"], "D": channels, "Q": 2 * hidden, "LEFT": sizes.weights.left}
    runs = (
        (hidden_backward_kernel, {**common, **made}, shared, sizes.hidden_backward),
        (input_backward_kernel, {**common, **output}, shared, sizes.input_backward),
        (weights_kernel, weights, sums, sizes.weights),
    )
    return [aot_case(name, chip, kind, *run) for run in runs if kind != "fp32" or run[0] is not weights_kernel]
