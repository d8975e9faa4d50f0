"""Forward of linear attention over both directions in Triton: two passes over memory, a small sum between them.

:func:`states_kernel` reads K and V once and leaves, for each part of a sequence, phi(k)^T v and the sum of phi(k) in
float32; :func:`mean_kernel` adds the parts in one order and divides by the number of keys; :func:`output_kernel` reads
Q, and V for its convolution, and writes the output. Only where a focused norm runs over more heads than one program
holds does :func:`norms_kernel` read Q and K once more.

Shapes and tiles as in ``triton_features.py``; P parts of a sequence, G groups of SIDE heads, K taps. What the passes
leave for one another is padded: E entries, H heads, W channels, and in memory all matrices stand before all sums.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.linear.triton_features import (
    UNIT,
    add_rows,
    aot_case,
    channels,
    entry_rows,
    features,
    load_tile,
    outer_product,
    part_of,
    per_head,
    row_product,
    spread,
    store_tile,
)


@triton.jit(do_not_specialize=["L", "TOTAL"])
def states_kernel(
    x,
    y,
    scale,
    norms,
    weight,
    shift,
    past,
    cu,
    lengths,
    parts,
    x_stride_b,
    x_stride_l: tl.constexpr,
    x_stride_h,
    x_stride_d,
    y_stride_b,
    y_stride_l: tl.constexpr,
    y_stride_h,
    y_stride_d,
    L,
    TOTAL,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """A part of a sequence and some heads: phi(x)^T y and sum phi(x) to parts (E, P, H * (W * W + W)).

    With ``weight`` and ``shift`` (TOTAL, H), for the backward, all rows count, whatever ``lengths`` says of the keys:
    (phi(x) * weight)^T y and -sum phi(x) * shift. With ``past`` (E,), for causal attention, the weights fall
    as 1 / (past + row), and are rounded to 16 bits times the number of keys up to the tile's end.
    """
    part = tl.program_id(0)
    group = tl.program_id(1)
    entry = tl.program_id(2)
    C: tl.constexpr = SIDE * W
    MASKED: tl.constexpr = H % SIDE != 0 or D != W
    batch, first_row, rows, flat = entry_rows(cu, lengths, entry, L, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L, cu is not None, lengths is not None)
    start, stop = part_of(part, tl.num_programs(0), rows, ROWS)
    if weight is None:
        stop = tl.minimum(stop, keys)
    head, within, real = channels(group, H, D, SIDE, W)
    row = tl.arange(0, ROWS)
    at_x = x + batch * x_stride_b
    at_y = y + batch * y_stride_b
    x_offset = row[:, None] * x_stride_l + (head * x_stride_h + within * x_stride_d)[None, :]
    y_offset = row[:, None] * y_stride_l + (head * y_stride_h + within * y_stride_d)[None, :]
    inverse = tl.zeros((C,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + head * D + within, mask=real, other=1.0)
    h = group * SIDE + tl.arange(0, SIDE)
    matrix = tl.zeros((SIDE, W, W), tl.float32)
    sums = tl.zeros((4, C), tl.float32)
    given_first = tl.zeros((ROWS, 1), tl.float32)
    given_second = tl.zeros((ROWS, 1), tl.float32)
    for at in range(start, stop, ROWS):
        inside = at + row < stop
        tile = load_tile(at_x, first_row, at, x_offset, row, stop, x_stride_l, real, MASKED).to(tl.float32)
        value = load_tile(at_y, first_row, at, y_offset, row, stop, y_stride_l, real, MASKED)
        if NORM == "given":
            given_first = tl.load(norms + flat + at + row, mask=inside, other=0.0)[:, None]
            given_second = tl.load(norms + TOTAL + flat + at + row, mask=inside, other=0.0)[:, None]
        keep = inside.to(tl.float32)[:, None]
        phi = features(tile, inverse, keep, real, given_first, given_second, KIND, POWER, NORM, MASKED, ROWS, SIDE, W)
        if weight is None:
            sums = add_rows(sums, phi, ROWS, C)
            matrix = outer_product(phi.to(value.dtype), value, matrix, ROWS, SIDE, W)
        else:
            of_row = (flat + at + row)[:, None] * H + h[None, :]
            there = inside[:, None] & (h < H)[None, :]
            factor = tl.load(weight + of_row, mask=there, other=0.0)
            less = tl.load(shift + of_row, mask=there, other=0.0)
            sums = add_rows(sums, -phi * spread(less, ROWS, SIDE, W), ROWS, C)
            if past is not None:
                count = tl.maximum(tl.load(past + entry) + tl.minimum(at + ROWS, keys), 1).to(tl.float32)
                weighted = (phi * spread(factor * count, ROWS, SIDE, W)).to(value.dtype)
                nothing = tl.zeros((SIDE, W, W), tl.float32)
                matrix += outer_product(weighted, value, nothing, ROWS, SIDE, W) * (1.0 / count)
            else:
                weighted = (phi * spread(factor, ROWS, SIDE, W)).to(value.dtype)
                matrix = outer_product(weighted, value, matrix, ROWS, SIDE, W)
    to = parts + (entry.to(tl.int64) * tl.num_programs(0) + part) * (H * (W * W + W))
    i = tl.arange(0, W)
    at_matrix = (h[:, None, None] * W + i[None, :, None]) * W + i[None, None, :]
    tl.store(to + at_matrix, matrix, mask=(h < H)[:, None, None])
    channel = group * C + tl.arange(0, C)
    tl.store(to + H * W * W + channel, tl.sum(sums, axis=0), mask=channel < H * W)


@triton.jit(do_not_specialize=["L", "P"])
def mean_kernel(
    parts,
    cu,
    lengths,
    matrix,
    sums,
    L,
    P,
    MATRIX: tl.constexpr,
    SUMS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """parts (E, P, MATRIX + SUMS), added in one order and divided by the rows of the sequence (0 without rows), to
    matrix (E, MATRIX) and sums (E, SUMS)."""
    entry = tl.program_id(1)
    _, _, rows, _ = entry_rows(cu, lengths, entry, L, cu is not None, lengths is not None)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, STEP)
    there = place < MATRIX + SUMS
    total = tl.zeros((STEP, BLOCK), tl.float32)
    first = parts + entry.to(tl.int64) * P * (MATRIX + SUMS)
    for p in range(0, P, STEP):
        at = first + (p + step)[:, None].to(tl.int64) * (MATRIX + SUMS) + place[None, :]
        total += tl.load(at, mask=(p + step < P)[:, None] & there[None, :], other=0.0)
    mean = tl.sum(total, axis=0) / tl.maximum(rows, 1).to(tl.float32)
    to = entry.to(tl.int64)
    tl.store(matrix + to * MATRIX + place, mean.to(matrix.dtype.element_ty), mask=place < MATRIX)
    tl.store(sums + to * SUMS + place - MATRIX, mean, mask=(place >= MATRIX) & there)


@triton.jit
def load_taps(conv, channel, HW: tl.constexpr, TAPS: tl.constexpr):
    """The rows of conv (TAPS, H, W), of some channels, as a tuple."""
    taps = ()
    for t in tl.static_range(TAPS):
        taps = taps + (tl.load(conv + t * HW + channel, mask=channel < HW, other=0.0),)  # noqa: RUF005
    return taps


@triton.jit
def add_convolution(
    out,
    taps,
    middle,
    at_v,
    first_row,
    at,
    offset,
    row,
    rows,
    stride_l,
    real,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    MASKED: tl.constexpr,
    INNER: tl.constexpr,
):
    """out (ROWS, C) + sum_t taps[t] * v[row + t - LEFT], of which ``middle`` is v[row]: that tile came from memory well
    before, and its neighbours lie in the cache. INNER: all these rows exist."""
    for t in tl.static_range(TAPS):
        if t == LEFT:
            out += middle.to(tl.float32) * taps[t][None, :]
        else:
            value = load_tile(at_v, first_row, at + t - LEFT, offset, row, rows, stride_l, real, MASKED, True, INNER)
            out += value.to(tl.float32) * taps[t][None, :]
    return out


@triton.jit
def _output_tile(
    at,
    middle,
    at_q,
    at_v,
    at_o,
    q_offset,
    v_offset,
    o_offset,
    q_stride_l: tl.constexpr,
    v_stride_l: tl.constexpr,
    o_stride_l: tl.constexpr,
    row,
    first_row,
    flat,
    stop,
    keys,
    real,
    inverse,
    norms,
    TOTAL,
    kv,
    k_mean,
    taps,
    bias,
    eps,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    MASKED: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """A tile of the output. ``middle`` are its rows of v, and those of the next tile are returned, on their way while
    this one is at work; 0 without a convolution."""
    ahead = middle
    if TAPS > 0:
        ahead = load_tile(at_v, first_row, at + ROWS, v_offset, row, keys, v_stride_l, real, MASKED)
    tile = load_tile(at_q, first_row, at, q_offset, row, stop, q_stride_l, real, MASKED, False, INNER).to(tl.float32)
    one = tl.zeros((ROWS, 1), tl.float32) + 1.0
    first = tl.zeros((ROWS, 1), tl.float32)
    second = tl.zeros((ROWS, 1), tl.float32)
    if NORM == "given":
        first = tl.load(norms + flat + at + row, mask=at + row < stop, other=0.0)[:, None]
        second = tl.load(norms + TOTAL + flat + at + row, mask=at + row < stop, other=0.0)[:, None]
    phi = features(tile, inverse, one, real, first, second, KIND, POWER, NORM, MASKED, ROWS, SIDE, W)
    below = per_head(phi * k_mean[None, :], ROWS, SIDE, W) + eps
    result = row_product(phi.to(kv.dtype), kv, ROWS, SIDE, W)
    factor = spread(tl.where(keys > 0, 1.0 / tl.where(keys > 0, below, 1.0), 0.0), ROWS, SIDE, W)
    result = result * factor + bias[None, :]
    if TAPS > 0:
        result = add_convolution(
            result, taps, middle, at_v, first_row, at, v_offset, row, keys, v_stride_l, real, TAPS, LEFT, MASKED, INNER
        )
    store_tile(at_o, first_row, result, at, o_offset, row, stop, o_stride_l, real, MASKED, INNER)
    return ahead


@triton.jit(do_not_specialize=["L_q", "L_k", "TOTAL"])
def output_kernel(
    q,
    v,
    scale,
    norms,
    matrix,
    sums,
    conv,
    bias,
    cu,
    lengths,
    out,
    q_stride_b,
    q_stride_l: tl.constexpr,
    q_stride_h,
    q_stride_d,
    v_stride_b,
    v_stride_l: tl.constexpr,
    v_stride_h,
    v_stride_d,
    o_stride_b,
    o_stride_l: tl.constexpr,
    o_stride_h,
    o_stride_d,
    L_q,
    L_k,
    TOTAL,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """Some tiles of queries and some heads: phi(q) matrix / (phi(q) . sums + eps) + convolution of v, to out."""
    part = tl.program_id(0)
    group = tl.program_id(1)
    entry = tl.program_id(2)
    C: tl.constexpr = SIDE * W
    MASKED: tl.constexpr = H % SIDE != 0 or D != W
    batch, first_row, rows, flat = entry_rows(cu, lengths, entry, L_q, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L_k, cu is not None, lengths is not None)
    start, stop = part_of(part, tl.num_programs(0), rows, ROWS)
    head, within, real = channels(group, H, D, SIDE, W)
    row = tl.arange(0, ROWS)
    at_q = q + batch * q_stride_b
    at_v = v + batch * v_stride_b
    at_o = out + batch * o_stride_b
    q_offset = row[:, None] * q_stride_l + (head * q_stride_h + within * q_stride_d)[None, :]
    v_offset = row[:, None] * v_stride_l + (head * v_stride_h + within * v_stride_d)[None, :]
    o_offset = row[:, None] * o_stride_l + (head * o_stride_h + within * o_stride_d)[None, :]
    inverse = tl.zeros((C,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + head * D + within, mask=real, other=1.0)
    h = group * SIDE + tl.arange(0, SIDE)
    i = tl.arange(0, W)
    channel = group * C + tl.arange(0, C)
    at_matrix = (h[:, None, None] * W + i[None, :, None]) * W + i[None, None, :]
    kv = tl.load(matrix + entry.to(tl.int64) * (H * W * W) + at_matrix, mask=(h < H)[:, None, None], other=0.0)
    k_mean = tl.load(sums + entry.to(tl.int64) * (H * W) + channel, mask=channel < H * W, other=0.0)
    left: tl.constexpr = (TAPS - 1) // 2 if TAPS > 0 else 0
    taps = ()
    middle = 0.0
    if TAPS > 0:
        taps = load_taps(conv, channel, H * W, TAPS)
    more = tl.zeros((C,), tl.float32)
    if bias is not None:
        more = tl.load(bias + channel, mask=channel < H * W, other=0.0)
    # All tiles whose neighbours exist, and then those at the ends, which must look.
    inner = tl.minimum(start + tl.where(start < left, ROWS, 0), stop)
    end = tl.maximum(tl.minimum(stop, keys - left) - inner, 0) // ROWS * ROWS + inner
    tiles = tl.cdiv(stop - end, ROWS) + (inner - start + ROWS - 1) // ROWS
    for edge in tl.static_range(2):
        if TAPS > 0:
            middle = load_tile(at_v, first_row, inner, v_offset, row, keys, v_stride_l, real, MASKED)
        for turn in range(0, tiles if edge else (end - inner) // ROWS):
            at = inner + turn * ROWS
            if edge:
                at = tl.where((turn == 0) & (inner > start), start, end + (turn - tl.where(inner > start, 1, 0)) * ROWS)
                if TAPS > 0:
                    middle = load_tile(at_v, first_row, at, v_offset, row, keys, v_stride_l, real, MASKED)
            middle = _output_tile(
                at,
                middle,
                at_q,
                at_v,
                at_o,
                q_offset,
                v_offset,
                o_offset,
                q_stride_l,
                v_stride_l,
                o_stride_l,
                row,
                first_row,
                flat,
                stop,
                keys,
                real,
                inverse,
                norms,
                TOTAL,
                kv,
                k_mean,
                taps,
                more,
                eps,
                KIND,
                POWER,
                NORM,
                TAPS,
                left,
                MASKED,
                edge == 0,
                ROWS,
                SIDE,
                W,
            )


def aot_cases() -> list[AotCase]:
    """Both passes at head size 64, on Hopper also at 16 (8 heads a program), and at 128
    (one), and what adds the parts."""
    wide = {"H": 8, "D": 64, "W": 64, "SIDE": 8, "ROWS": 16, "KIND": "focused", "POWER": 3, "NORM": "channels"}
    small = {**wide, "D": 16, "W": 16}
    single = {**wide, "D": 128, "W": 128, "SIDE": 1, "ROWS": 64, "NORM": "given"}
    conv = ("scale", "conv", "bias")
    mean = {"MATRIX": 8 * 64 * 64, "SUMS": 8 * 64, "STEP": 16, "BLOCK": 128}
    chips, two = (80, 90, 100, 120), (80, 90)
    return [
        aot_case("linear_states_64", states_kernel, (90,), (8, 2), wide, ("scale",)),
        aot_case("linear_states_64_others", states_kernel, (80, 100, 120), (8, 2), wide, ("scale",), spills=64),
        aot_case("linear_states_16", states_kernel, (90,), (4, 3), small, ("scale",)),
        aot_case("linear_states_128", states_kernel, two, (8, 2), single, ("norms",)),
        aot_case("linear_states_weighted", states_kernel, two, (8, 2), wide, ("weight", "shift"), spills=64),
        aot_case("linear_output_64", output_kernel, chips, (8, 2), {**wide, "TAPS": 5}, conv),
        aot_case("linear_output_16", output_kernel, (90,), (4, 3), {**small, "TAPS": 5}, conv),
        aot_case("linear_output_16_120", output_kernel, (120,), (4, 3), {**small, "TAPS": 5}, conv, 16),
        aot_case("linear_output_128", output_kernel, two, (8, 2), {**single, "TAPS": 0}, ("norms",)),
        aot_case("linear_mean", mean_kernel, chips, (4, 3), mean),
    ]
