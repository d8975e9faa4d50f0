"""The feed-forward's two products in Triton: rows to hidden rows, and hidden rows to rows.

All sequences stand one after another in one axis of R rows, so that short ones fill a tile too; a tap of a row looks
whether its neighbour is of the same sequence.

Shapes: A, B outer sizes, L rows of a sequence, R = A * B * L rows, D channels, C hidden channels, K taps, G groups.
Tiles: ROWS rows, COLUMNS hidden channels, SPREAD * WIDE channels: G padded to SPREAD groups, D / G to WIDE channels.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.conv_glu.builds import BUILDS, COUNTS, MODELS, STRIDES, aot_case, constants
from allears.ops.conv_glu.sizes import tiles


@triton.jit
def locate(row, L, B):
    """Of flat rows: their first and second outer index (int64), and their place in the sequence."""
    sequence = row // L
    outer = sequence // B
    return outer.to(tl.int64), (sequence - outer * B).to(tl.int64), row - sequence * L


@triton.jit
def below(index, END: tl.constexpr, STEP: tl.constexpr):
    """Whether ``index``, of a block of STEP, is below END; known without a look where STEP divides END."""
    if END % STEP == 0:
        return tl.full(index.shape, 1, tl.int1)
    else:
        return index < END


@triton.jit
def group_columns(D: tl.constexpr, GROUPS: tl.constexpr, SPREAD: tl.constexpr, WIDE: tl.constexpr):
    """The channel of each column of a tile whose groups are padded, and whether there is one."""
    column = tl.arange(0, SPREAD * WIDE)
    if SPREAD * WIDE == D:
        return column, tl.full(column.shape, 1, tl.int1)
    else:
        group, inside = column // WIDE, column % WIDE
        return group * (D // GROUPS) + inside, (inside < D // GROUPS) & (group < GROUPS)


@triton.jit
def load_rows(x, begin, place, shift, stride_l, L, there, channel, real):
    """The tile of the rows ``shift`` further on in their sequence, zero outside it."""
    at = place + shift
    mask = (there & (at >= 0) & (at < L))[:, None] & real[None, :]
    return tl.load(x + (begin + at.to(tl.int64) * stride_l)[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def by_group(tile, eps, SIZE: tl.constexpr, SPREAD: tl.constexpr, WIDE: tl.constexpr):
    """A tile (ROWS, SPREAD * WIDE) over the root mean square of each group of SIZE channels, as (ROWS, SPREAD, WIDE);
    and the inverse root, (ROWS, SPREAD)."""
    parts = tl.reshape(tile.to(tl.float32), (tile.shape[0], SPREAD, WIDE))
    inverse = tl.rsqrt(tl.sum(parts * parts, axis=2) / SIZE + eps)
    return parts * inverse[:, :, None], inverse


@triton.jit
def normalised(tile, eps, SIZE: tl.constexpr, SPREAD: tl.constexpr, WIDE: tl.constexpr):
    """A tile (ROWS, SPREAD * WIDE) over the root mean square of each group, in float32."""
    parts, _ = by_group(tile, eps, SIZE, SPREAD, WIDE)
    return tl.reshape(parts, (tile.shape[0], SPREAD * WIDE))


@triton.jit
def widened(
    x,
    weight,
    bias,
    begin,
    place,
    there,
    column,
    inside,
    stride_l,
    L,
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
    """Value and gate of a tile, each (ROWS, COLUMNS) in float32; weight is (K, D, 2 C)."""
    channel, real = group_columns(D, GROUPS, SPREAD, WIDE)
    value = tl.zeros((ROWS, COLUMNS), tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    at_weight = weight + channel[:, None] * (2 * C) + column[None, :]
    mask = real[:, None] & inside[None, :]
    for k in range(K):
        tile = load_rows(x, begin, place, k - BEFORE, stride_l, L, there, channel, real)
        tile = normalised(tile, eps, D // GROUPS, SPREAD, WIDE).to(weight.dtype.element_ty)
        value = tl.dot(tile, tl.load(at_weight + k * (D * 2 * C), mask=mask, other=0.0), value)
        gate = tl.dot(tile, tl.load(at_weight + k * (D * 2 * C) + C, mask=mask, other=0.0), gate)
    value += tl.load(bias + column, mask=inside, other=0.0)[None, :]
    gate += tl.load(bias + C + column, mask=inside, other=0.0)[None, :]
    return value, gate


@triton.jit(do_not_specialize=["rows", "L", "B"])
def widen_kernel(
    x,
    weight,
    bias,
    h,
    stride_a,
    stride_b,
    stride_l,
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
    """x (A, B, L, D), weight (K, D, 2 C), bias (2 C,) float32 to h (R, C). Programs: tiles of rows times blocks of
    columns, the blocks next to each other in time."""
    BLOCKS: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // BLOCKS) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    there, inside = row < rows, below(column, C, COLUMNS)
    outer, inner, place = locate(row, L, B)
    begin = outer * stride_a + inner * stride_b
    value, gate = widened(
        x,
        weight,
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
    value = value * gate * tl.sigmoid(gate)
    at = h + row.to(tl.int64)[:, None] * C + column[None, :]
    tl.store(at, value.to(h.dtype.element_ty), mask=there[:, None] & inside[None, :])


@triton.jit
def taps_product(
    left,
    weight,
    row,
    place,
    there,
    L,
    channel,
    real,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    Q: tl.constexpr,
    stride_k: tl.constexpr,
    stride_q: tl.constexpr,
    stride_d: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    PADDED: tl.constexpr,
):
    """sum_k left[row + BEFORE - k] weight[k] for left (R, Q), and weight (K, Q, D) by its strides: (ROWS, PADDED)."""
    STEPS: tl.constexpr = (Q + STEP - 1) // STEP
    total = tl.zeros((ROWS, PADDED), tl.float32)
    for step in range(K * STEPS):
        k = step // STEPS
        middle = (step % STEPS) * STEP + tl.arange(0, STEP)
        inside = below(middle, Q, STEP)
        at = place + (BEFORE - k)
        mask = (there & (at >= 0) & (at < L))[:, None] & inside[None, :]
        source = (row + (BEFORE - k)).to(tl.int64)[:, None] * Q
        tile = tl.load(left + source + middle[None, :], mask=mask, other=0.0)
        at_weight = weight + k * stride_k + middle[:, None] * stride_q + channel[None, :] * stride_d
        total = tl.dot(tile, tl.load(at_weight, mask=inside[:, None] & real[None, :], other=0.0), total)
    return total


@triton.jit(do_not_specialize=["rows", "L", "B"])
def narrow_kernel(
    h,
    weight,
    bias,
    x,
    y,
    stride_a,
    stride_b,
    stride_l,
    y_stride_a,
    y_stride_b,
    y_stride_l,
    rows,
    L,
    B,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """h (R, C), weight (K, C, D), bias (D,) float32, x (A, B, L, D) to y, as x, strides of its own. COLUMNS is the step
    of the sum over C."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    outer, inner, place = locate(row, L, B)
    channel = tl.arange(0, PADDED)
    real = below(channel, D, PADDED)
    total = taps_product(
        h, weight, row, place, there, L, channel, real, K, BEFORE, C, C * D, D, 1, ROWS, COLUMNS, PADDED
    )
    total += tl.load(bias + channel, mask=real, other=0.0)[None, :]
    total += load_rows(x, outer * stride_a + inner * stride_b, place, 0, stride_l, L, there, channel, real)
    at = y + (outer * y_stride_a + inner * y_stride_b + place.to(tl.int64) * y_stride_l)[:, None] + channel[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=there[:, None] & real[None, :])


def aot_cases() -> list[AotCase]:
    """Both kernels for :data:`BUILDS`."""
    return [case for build in BUILDS for case in cases_of(*build)]


def cases_of(name: str, chip: int, kind: str) -> list[AotCase]:
    """Both kernels for a network of :data:`MODELS`, a chip, and x of ``kind``."""
    channels, hidden, taps, groups = MODELS[name]
    shared = constants(channels, hidden, taps, groups, (taps - 1) // 2)
    padded = {**{key: shared[key] for key in ("K", "BEFORE", "D", "C")}, "PADDED": shared["SPREAD"] * shared["WIDE"]}
    sizes = tiles(chip, channels, kind != "fp32")
    common = {"weight": "*bf16", "h": "*bf16", "bias": "*fp32", "x": f"*{kind}", **STRIDES, **COUNTS}
    output = {"y": f"*{kind}", **{f"y_{stride}": "i32" for stride in STRIDES}}
    return [
        aot_case(name, chip, kind, widen_kernel, {**common, "eps": "fp32"}, shared, sizes.widen),
        aot_case(name, chip, kind, narrow_kernel, {**common, **output}, padded, sizes.narrow),
    ]
