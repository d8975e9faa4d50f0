"""Backward of linear attention over both directions in Triton, in as many passes as the forward.

With A = mean(phi(k)^T v), z = mean phi(k), s = phi(q) . z + eps, and everything per head:

- X = dO A^T; t = phi(q) . X / s (which is dO . O); d phi(q) = (X - t z) / s;
- dA = sum (phi(q) / s)^T dO; dz = -sum phi(q) * t / s: by the forward's :func:`states_kernel` and :func:`mean_kernel`,
  from Q, dO and 1 / s and t / s of each query, which are 8 bytes a head and query;
- d phi(k) = (v dA^T + dz) / n; dV = phi(k) dA / n + the convolution's, of dO.

The feature maps are undone in the same pass. Sums for the scale and the convolution's weights leave each program
apart, to be added in one order. Where a focused norm runs over more heads than one program holds, each of the two
kernels runs twice: with DOTS it writes its heads' part of sum(d phi * base^p) of each row (G, TOTAL), and the second
run reads their sum (TOTAL,).

Shapes as in ``triton_fwd.py``.
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
    feature_dot,
    features,
    features_gradient,
    load_tile,
    part_of,
    per_head,
    row_product,
    spread,
    store_tile,
)
from allears.ops.attention.linear.triton_fwd import load_taps


@triton.jit(do_not_specialize=["L_q", "L_k", "TOTAL"])
def queries_gradient_kernel(
    q,
    d_out,
    scale,
    norms,
    dots,
    matrix,
    sums,
    cu,
    lengths,
    d_q,
    weight,
    shift,
    d_scale,
    q_stride_b,
    q_stride_l: tl.constexpr,
    q_stride_h,
    q_stride_d,
    do_stride_b,
    do_stride_l: tl.constexpr,
    do_stride_h,
    do_stride_d,
    dq_stride_b,
    dq_stride_l: tl.constexpr,
    dq_stride_h,
    dq_stride_d,
    L_q,
    L_k,
    TOTAL,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """Some tiles of queries and some heads: d_q, weight = 1 / s and shift = t / s (TOTAL, H), and to d_scale (E * P,
    H * W) the gradient of log(1 / scale)."""
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
    at_do = d_out + batch * do_stride_b
    at_dq = d_q + batch * dq_stride_b
    q_offset = row[:, None] * q_stride_l + (head * q_stride_h + within * q_stride_d)[None, :]
    do_offset = row[:, None] * do_stride_l + (head * do_stride_h + within * do_stride_d)[None, :]
    dq_offset = row[:, None] * dq_stride_l + (head * dq_stride_h + within * dq_stride_d)[None, :]
    inverse = tl.zeros((C,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + head * D + within, mask=real, other=1.0)
    h = group * SIDE + tl.arange(0, SIDE)
    i = tl.arange(0, W)
    channel = group * C + tl.arange(0, C)
    at_matrix = (h[:, None, None] * W + i[None, None, :]) * W + i[None, :, None]
    kv_t = tl.load(matrix + entry.to(tl.int64) * (H * W * W) + at_matrix, mask=(h < H)[:, None, None], other=0.0)
    k_mean = tl.load(sums + entry.to(tl.int64) * (H * W) + channel, mask=channel < H * W, other=0.0)
    one = tl.zeros((ROWS, 1), tl.float32) + 1.0
    given_first = tl.zeros((ROWS, 1), tl.float32)
    given_second = tl.zeros((ROWS, 1), tl.float32)
    given_dot = tl.zeros((ROWS, 1), tl.float32)
    of_scale = tl.zeros((4, C), tl.float32)
    for at in range(start, stop, ROWS):
        inside = at + row < stop
        of_row = flat + at + row
        tile = load_tile(at_q, first_row, at, q_offset, row, stop, q_stride_l, real, MASKED).to(tl.float32)
        error = load_tile(at_do, first_row, at, do_offset, row, stop, do_stride_l, real, MASKED)
        if NORM == "given":
            given_first = tl.load(norms + of_row, mask=inside, other=0.0)[:, None]
            given_second = tl.load(norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
        phi = features(tile, inverse, one, real, given_first, given_second, KIND, POWER, NORM, MASKED, ROWS, SIDE, W)
        below = per_head(phi * k_mean[None, :], ROWS, SIDE, W) + eps
        norm = tl.where(keys > 0, 1.0 / tl.where(keys > 0, below, 1.0), 0.0)
        towards = row_product(error, kv_t, ROWS, SIDE, W)
        along = per_head(phi * towards, ROWS, SIDE, W) * norm
        d_phi = (towards - spread(along, ROWS, SIDE, W) * k_mean[None, :]) * spread(norm, ROWS, SIDE, W)
        if DOTS:
            dot = feature_dot(tile, d_phi, inverse, real, given_first, given_second, POWER, MASKED, ROWS, SIDE, W)
            tl.store(dots + group * TOTAL + of_row, dot, mask=inside)
        else:
            if NORM == "given":
                given_dot = tl.load(dots + of_row, mask=inside, other=0.0)[:, None]
            d_x, d_log = features_gradient(
                tile, phi, d_phi, inverse, real, given_first, given_second, given_dot, KIND, POWER, NORM, MASKED, ROWS,
                SIDE, W,
            )  # fmt: skip
            store_tile(at_dq, first_row, d_x, at, dq_offset, row, stop, dq_stride_l, real, MASKED)
            there = inside[:, None] & (h < H)[None, :]
            tl.store(weight + of_row[:, None] * H + h[None, :], norm, mask=there)
            tl.store(shift + of_row[:, None] * H + h[None, :], along * norm, mask=there)
            if d_scale is not None:
                of_scale = add_rows(of_scale, d_log, ROWS, C)
    if d_scale is not None and not DOTS:
        to = (entry.to(tl.int64) * tl.num_programs(0) + part) * (H * W)
        tl.store(d_scale + to + channel, tl.sum(of_scale, axis=0), mask=channel < H * W)


@triton.jit
def add_convolution_gradient(
    d_v,
    of_conv,
    value,
    at_do,
    first_row,
    at,
    offset,
    row,
    rows,
    stride_l,
    taps,
    real,
    TAPS: tl.constexpr,
    LEFT: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    C: tl.constexpr,
):
    """d_v (ROWS, C) + sum_t taps[t] * d_out[row - t + LEFT], and the taps' sums of_conv plus those of value * d_out."""
    added = ()
    for t in tl.static_range(TAPS):
        error = load_tile(at_do, first_row, at - t + LEFT, offset, row, rows, stride_l, real, MASKED, True).to(
            tl.float32
        )
        d_v += error * taps[t][None, :]
        added = added + (add_rows(of_conv[t], value * error, ROWS, C),)  # noqa: RUF005
    return d_v, added


@triton.jit(do_not_specialize=["L_q", "L_k", "TOTAL"])
def keys_gradient_kernel(
    k,
    v,
    d_out,
    scale,
    norms,
    dots,
    d_matrix,
    d_sums,
    conv,
    cu,
    lengths,
    d_k,
    d_v,
    d_scale,
    d_conv,
    k_stride_b,
    k_stride_l: tl.constexpr,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l: tl.constexpr,
    v_stride_h,
    v_stride_d,
    do_stride_b,
    do_stride_l: tl.constexpr,
    do_stride_h,
    do_stride_d,
    dk_stride_b,
    dk_stride_l: tl.constexpr,
    dk_stride_h,
    dk_stride_d,
    dv_stride_b,
    dv_stride_l: tl.constexpr,
    dv_stride_h,
    dv_stride_d,
    L_q,
    L_k,
    TOTAL,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    DOTS: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """Some tiles of keys and some heads: d_k, d_v; to d_scale (E * P, H * W) the gradient of log(1 / scale), to d_conv
    (E * P, TAPS, H * W) that of the convolution's weights. d_matrix and d_sums are dA / n and dz / n."""
    part = tl.program_id(0)
    group = tl.program_id(1)
    entry = tl.program_id(2)
    C: tl.constexpr = SIDE * W
    MASKED: tl.constexpr = H % SIDE != 0 or D != W
    batch, first_row, rows, flat = entry_rows(cu, lengths, entry, L_k, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L_k, cu is not None, lengths is not None)
    _, _, queries, _ = entry_rows(cu, lengths, entry, L_q, cu is not None, False)
    start, stop = part_of(part, tl.num_programs(0), rows, ROWS)
    head, within, real = channels(group, H, D, SIDE, W)
    row = tl.arange(0, ROWS)
    at_k = k + batch * k_stride_b
    at_v = v + batch * v_stride_b
    at_do = d_out + batch * do_stride_b
    at_dk = d_k + batch * dk_stride_b
    at_dv = d_v + batch * dv_stride_b
    k_offset = row[:, None] * k_stride_l + (head * k_stride_h + within * k_stride_d)[None, :]
    v_offset = row[:, None] * v_stride_l + (head * v_stride_h + within * v_stride_d)[None, :]
    do_offset = row[:, None] * do_stride_l + (head * do_stride_h + within * do_stride_d)[None, :]
    dk_offset = row[:, None] * dk_stride_l + (head * dk_stride_h + within * dk_stride_d)[None, :]
    dv_offset = row[:, None] * dv_stride_l + (head * dv_stride_h + within * dv_stride_d)[None, :]
    inverse = tl.zeros((C,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + head * D + within, mask=real, other=1.0)
    h = group * SIDE + tl.arange(0, SIDE)
    i = tl.arange(0, W)
    channel = group * C + tl.arange(0, C)
    there = (h < H)[:, None, None]
    of_head = d_matrix + entry.to(tl.int64) * (H * W * W) + h[:, None, None] * (W * W)
    d_kv = tl.load(of_head + i[None, :, None] * W + i[None, None, :], mask=there, other=0.0)
    d_kv_t = tl.load(of_head + i[None, None, :] * W + i[None, :, None], mask=there, other=0.0)
    d_mean = tl.load(d_sums + entry.to(tl.int64) * (H * W) + channel, mask=channel < H * W, other=0.0)
    given_first = tl.zeros((ROWS, 1), tl.float32)
    given_second = tl.zeros((ROWS, 1), tl.float32)
    given_dot = tl.zeros((ROWS, 1), tl.float32)
    of_scale = tl.zeros((4, C), tl.float32)
    of_conv = ()
    for _ in tl.static_range(TAPS):
        of_conv = of_conv + (tl.zeros((4, C), tl.float32),)  # noqa: RUF005
    taps = ()
    if conv is not None:
        taps = load_taps(conv, channel, H * W, TAPS)
    for at in range(start, stop, ROWS):
        inside = at + row < stop
        of_row = flat + at + row
        keep = (at + row < keys).to(tl.float32)[:, None]
        tile = load_tile(at_k, first_row, at, k_offset, row, keys, k_stride_l, real, MASKED).to(tl.float32)
        value = load_tile(at_v, first_row, at, v_offset, row, keys, v_stride_l, real, MASKED)
        if NORM == "given":
            given_first = tl.load(norms + of_row, mask=inside, other=0.0)[:, None]
            given_second = tl.load(norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
        phi = features(tile, inverse, keep, real, given_first, given_second, KIND, POWER, NORM, MASKED, ROWS, SIDE, W)
        d_phi = (row_product(value, d_kv_t, ROWS, SIDE, W) + d_mean[None, :]) * keep
        if DOTS:
            dot = feature_dot(tile, d_phi, inverse, real, given_first, given_second, POWER, MASKED, ROWS, SIDE, W)
            tl.store(dots + group * TOTAL + of_row, dot, mask=inside)
        else:
            if NORM == "given":
                given_dot = tl.load(dots + of_row, mask=inside, other=0.0)[:, None]
            d_x, d_log = features_gradient(
                tile, phi, d_phi, inverse, real, given_first, given_second, given_dot, KIND, POWER, NORM, MASKED, ROWS,
                SIDE, W,
            )  # fmt: skip
            store_tile(at_dk, first_row, d_x, at, dk_offset, row, stop, dk_stride_l, real, MASKED)
            if d_scale is not None:
                of_scale = add_rows(of_scale, d_log, ROWS, C)
            d_value = row_product(phi.to(value.dtype), d_kv, ROWS, SIDE, W)
            if conv is not None:
                left: tl.constexpr = (TAPS - 1) // 2
                d_value, of_conv = add_convolution_gradient(
                    d_value, of_conv, value.to(tl.float32), at_do, first_row, at, do_offset, row, queries, do_stride_l,
                    taps, real, TAPS, left, MASKED, ROWS, C,
                )  # fmt: skip
            store_tile(at_dv, first_row, d_value * keep, at, dv_offset, row, stop, dv_stride_l, real, MASKED)
    to = entry.to(tl.int64) * tl.num_programs(0) + part
    if d_scale is not None and not DOTS:
        tl.store(d_scale + to * (H * W) + channel, tl.sum(of_scale, axis=0), mask=channel < H * W)
    if conv is not None and not DOTS:
        for t in tl.static_range(TAPS):
            tl.store(d_conv + (to * TAPS + t) * (H * W) + channel, tl.sum(of_conv[t], axis=0), mask=channel < H * W)


def aot_cases() -> list[AotCase]:
    """Both gradients at head size 64 and 16 (8 heads a program) and 128 (one, in its first run); at 16 on
    Hopper, and where it has a bound of its own."""
    wide = {"H": 8, "D": 64, "W": 64, "SIDE": 8, "ROWS": 16, "KIND": "focused", "POWER": 3, "NORM": "channels"}
    wide |= {"DOTS": False}
    small = {**wide, "D": 16, "W": 16}
    single = {**wide, "D": 128, "W": 128, "SIDE": 1, "ROWS": 64, "NORM": "given", "DOTS": True, "TAPS": 0}
    narrow = {**wide, "SIDE": 4, "NORM": "given", "TAPS": 5}
    of_q = ("weight", "shift", "scale", "d_scale")
    of_k = ("scale", "d_scale", "conv", "d_conv")
    dots = ("norms", "dots")
    chips, two = (80, 90, 100, 120), (80, 90)
    return [
        aot_case("linear_dq_64", queries_gradient_kernel, chips, (8, 2), wide, of_q, spills=200),
        aot_case("linear_dq_16", queries_gradient_kernel, (90,), (4, 3), small, of_q),
        aot_case("linear_dq_128", queries_gradient_kernel, two, (8, 2), single, dots),
        aot_case("linear_dk_64", keys_gradient_kernel, (80, 90, 100), (8, 1), {**wide, "TAPS": 5}, of_k, spills=1100),
        aot_case("linear_dk_64_narrow", keys_gradient_kernel, (120,), (4, 1), narrow, (*of_k, *dots), spills=900),
        aot_case("linear_dk_16", keys_gradient_kernel, two, (4, 2), {**small, "TAPS": 5}, of_k, spills=180),
        aot_case("linear_dk_128", keys_gradient_kernel, two, (8, 2), single, dots),
    ]
