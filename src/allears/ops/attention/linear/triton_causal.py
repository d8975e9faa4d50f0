"""Causal linear attention in Triton: sums of parts of a sequence, their scan, and outputs that go on from it.

Forward: :func:`states_kernel` (``triton_fwd.py``) leaves phi(k)^T v and sum phi(k) of each part; :func:`scan_kernel`
adds up those before each part; :func:`causal_output_kernel` walks through a part tile by tile, with the sums so far in
registers, and takes the tile's own keys from a masked ROWS x ROWS product. Backward: the same walk for d_q; then the
sums (phi(q) / s)^T dO and -sum phi(q) t / s of each part, scanned from the end, and a walk backwards for d_k and d_v.
K, V and the state see one head a program, so that a focused norm over all heads comes from ``norms_kernel``.

Sums that grow with the length are divided by the number of keys so far before they are rounded to 16 bits. Values that
are not finite reach their row, later ones, and earlier ones of the same tile.

Shapes as in ``triton_fwd.py``, with SIDE = 1: a tile is (ROWS, W). States are (E, P + 1, H * (W * W + W)): slot p holds
what is before part p (from the end: after part p - 1), the last (first) slot the whole.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.linear.triton_bwd import add_convolution_gradient
from allears.ops.attention.linear.triton_features import (
    UNIT,
    add_rows,
    aot_case,
    entry_rows,
    feature_dot,
    features,
    features_gradient,
    load_tile,
    part_of,
    store_tile,
)
from allears.ops.attention.linear.triton_fwd import add_convolution, load_taps


@triton.jit(do_not_specialize=["P"])
def scan_kernel(
    parts, initial, states, P, SIZE: tl.constexpr, REVERSE: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):
    """parts (E, P, SIZE) and initial (E, SIZE), or None for 0, to states (E, P + 1, SIZE), summed in one order."""
    entry = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.arange(0, STEP)
    there = place < SIZE
    carry = tl.zeros((BLOCK,), tl.float32)
    if initial is not None:
        carry = tl.load(initial + entry * SIZE + place, mask=there, other=0.0)
    to = states + entry * (P + 1) * SIZE + place
    if REVERSE:
        tl.store(to + P.to(tl.int64) * SIZE, carry, mask=there)
    else:
        tl.store(to, carry, mask=there)
    turns = tl.cdiv(P, STEP)
    for turn in range(turns):
        if REVERSE:
            p = (turns - 1 - turn) * STEP + step
        else:
            p = turn * STEP + step
        inside = (p < P)[:, None] & there[None, :]
        at = entry * P * SIZE + p.to(tl.int64)[:, None] * SIZE + place[None, :]
        x = tl.load(parts + at, mask=inside, other=0.0)
        sums = tl.cumsum(x, axis=0, reverse=REVERSE) + carry[None, :]
        if REVERSE:
            slot = p
        else:
            slot = p + 1
        tl.store(to + slot.to(tl.int64)[:, None] * SIZE, sums, mask=inside)
        carry += tl.sum(x, axis=0)


@triton.jit
def _rounded_product(a, b, onto):
    return tl.dot(a, b, onto, input_precision="tf32x3")


@triton.jit(do_not_specialize=["L", "TOTAL"])
def causal_output_kernel(
    q,
    k,
    v,
    scale,
    q_norms,
    k_norms,
    states,
    past,
    conv,
    bias,
    cu,
    lengths,
    out,
    q_stride_b,
    q_stride_l: tl.constexpr,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_l: tl.constexpr,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l: tl.constexpr,
    v_stride_h,
    v_stride_d,
    o_stride_b,
    o_stride_l: tl.constexpr,
    o_stride_h,
    o_stride_d,
    L,
    TOTAL,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
):
    """A part of a sequence and one head: the output of each row from the keys up to it."""
    h = tl.program_id(1)
    entry = tl.program_id(2)
    MASKED: tl.constexpr = D != W
    batch, first_row, rows, flat = entry_rows(cu, lengths, entry, L, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L, cu is not None, lengths is not None)
    start, stop = part_of(tl.program_id(0), tl.num_programs(0), rows, ROWS)
    row = tl.arange(0, ROWS)
    c = tl.arange(0, W)
    real = c < D
    at_q = q + batch * q_stride_b + h * q_stride_h
    at_k = k + batch * k_stride_b + h * k_stride_h
    at_v = v + batch * v_stride_b + h * v_stride_h
    at_o = out + batch * o_stride_b + h * o_stride_h
    q_offset = row[:, None] * q_stride_l + (c * q_stride_d)[None, :]
    k_offset = row[:, None] * k_stride_l + (c * k_stride_d)[None, :]
    v_offset = row[:, None] * v_stride_l + (c * v_stride_d)[None, :]
    o_offset = row[:, None] * o_stride_l + (c * o_stride_d)[None, :]
    inverse = tl.zeros((W,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + h * D + c, mask=real, other=1.0)
    slot = entry.to(tl.int64) * (tl.num_programs(0) + 1) + tl.program_id(0)
    of_entry = states + slot * (H * (W * W + W))
    state = tl.load(of_entry + (h * W + c[:, None]) * W + c[None, :])
    k_sum = tl.load(of_entry + H * W * W + h * W + c)
    before = tl.load(past + entry)
    one = tl.zeros((ROWS, 1), tl.float32) + 1.0
    q_first = tl.zeros((ROWS, 1), tl.float32)
    q_second = tl.zeros((ROWS, 1), tl.float32)
    k_first = tl.zeros((ROWS, 1), tl.float32)
    k_second = tl.zeros((ROWS, 1), tl.float32)
    taps = ()
    if conv is not None:
        taps = load_taps(conv, h * W + c, H * W, TAPS)
    more = tl.zeros((W,), tl.float32)
    if bias is not None:
        more = tl.load(bias + h * W + c)
    for at in range(start, stop, ROWS):
        inside = at + row < stop
        of_row = flat + at + row
        keep = (at + row < tl.minimum(stop, keys)).to(tl.float32)[:, None]
        query = load_tile(at_q, first_row, at, q_offset, row, stop, q_stride_l, real, MASKED).to(tl.float32)
        key = load_tile(at_k, first_row, at, k_offset, row, tl.minimum(stop, keys), k_stride_l, real, MASKED).to(
            tl.float32
        )
        value = load_tile(at_v, first_row, at, v_offset, row, tl.minimum(stop, keys), v_stride_l, real, MASKED)
        if NORM == "given":
            q_first = tl.load(q_norms + of_row, mask=inside, other=0.0)[:, None]
            q_second = tl.load(q_norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
            k_first = tl.load(k_norms + of_row, mask=inside, other=0.0)[:, None]
            k_second = tl.load(k_norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
        phi_q = features(query, inverse, one, real, q_first, q_second, KIND, POWER, NORM, MASKED, ROWS, 1, W)
        phi_k = features(key, inverse, keep, real, k_first, k_second, KIND, POWER, NORM, MASKED, ROWS, 1, W)
        queries = phi_q.to(value.dtype)
        keys_t = tl.trans(phi_k.to(value.dtype))
        count = (before + tl.minimum(at + row + 1, keys)).to(tl.float32)
        unit = 1.0 / tl.maximum(before + tl.minimum(at + ROWS, keys), 1).to(tl.float32)
        scores = _rounded_product(queries, keys_t, tl.zeros((ROWS, ROWS), tl.float32))
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
        below = tl.sum(phi_q * k_sum[None, :], axis=1) + tl.sum(scores, axis=1) + eps * count
        result = _rounded_product(queries, (state * unit).to(value.dtype), tl.zeros((ROWS, W), tl.float32))
        result = _rounded_product((scores * unit).to(value.dtype), value, result)
        norm = tl.where(count > 0.0, 1.0 / tl.where(count > 0.0, below * unit, 1.0), 0.0)
        result = result * norm[:, None] + more[None, :]
        if conv is not None:
            result = add_convolution(
                result,
                taps,
                value,
                at_v,
                first_row,
                at,
                v_offset,
                row,
                keys,
                v_stride_l,
                real,
                TAPS,
                TAPS - 1,
                MASKED,
                False,
            )
        store_tile(at_o, first_row, result, at, o_offset, row, stop, o_stride_l, real, MASKED)
        state = _rounded_product(keys_t, value, state)
        k_sum += tl.sum(phi_k, axis=0)


@triton.jit(do_not_specialize=["L", "TOTAL"])
def causal_queries_gradient_kernel(
    q,
    k,
    v,
    d_out,
    scale,
    q_norms,
    k_norms,
    dots,
    states,
    past,
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
    dq_stride_b,
    dq_stride_l: tl.constexpr,
    dq_stride_h,
    dq_stride_d,
    L,
    TOTAL,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    DOTS: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
):
    """A part of a sequence and one head: d_q, weight = 1 / s, shift = t / s and d_scale as ``queries_gradient_kernel``
    does, by the same walk as the output; s is not divided by the number of keys."""
    h = tl.program_id(1)
    entry = tl.program_id(2)
    MASKED: tl.constexpr = D != W
    batch, first_row, rows, flat = entry_rows(cu, lengths, entry, L, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L, cu is not None, lengths is not None)
    start, stop = part_of(tl.program_id(0), tl.num_programs(0), rows, ROWS)
    row = tl.arange(0, ROWS)
    c = tl.arange(0, W)
    real = c < D
    at_q = q + batch * q_stride_b + h * q_stride_h
    at_k = k + batch * k_stride_b + h * k_stride_h
    at_v = v + batch * v_stride_b + h * v_stride_h
    at_do = d_out + batch * do_stride_b + h * do_stride_h
    at_dq = d_q + batch * dq_stride_b + h * dq_stride_h
    q_offset = row[:, None] * q_stride_l + (c * q_stride_d)[None, :]
    k_offset = row[:, None] * k_stride_l + (c * k_stride_d)[None, :]
    v_offset = row[:, None] * v_stride_l + (c * v_stride_d)[None, :]
    do_offset = row[:, None] * do_stride_l + (c * do_stride_d)[None, :]
    dq_offset = row[:, None] * dq_stride_l + (c * dq_stride_d)[None, :]
    inverse = tl.zeros((W,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + h * D + c, mask=real, other=1.0)
    slot = entry.to(tl.int64) * (tl.num_programs(0) + 1) + tl.program_id(0)
    of_entry = states + slot * (H * (W * W + W))
    state_t = tl.load(of_entry + (h * W + c[None, :]) * W + c[:, None])
    k_sum = tl.load(of_entry + H * W * W + h * W + c)
    before = tl.load(past + entry)
    one = tl.zeros((ROWS, 1), tl.float32) + 1.0
    q_first = tl.zeros((ROWS, 1), tl.float32)
    q_second = tl.zeros((ROWS, 1), tl.float32)
    k_first = tl.zeros((ROWS, 1), tl.float32)
    k_second = tl.zeros((ROWS, 1), tl.float32)
    given_dot = tl.zeros((ROWS, 1), tl.float32)
    of_scale = tl.zeros((4, W), tl.float32)
    for at in range(start, stop, ROWS):
        inside = at + row < stop
        of_row = flat + at + row
        keep = (at + row < tl.minimum(stop, keys)).to(tl.float32)[:, None]
        query = load_tile(at_q, first_row, at, q_offset, row, stop, q_stride_l, real, MASKED).to(tl.float32)
        key = load_tile(at_k, first_row, at, k_offset, row, tl.minimum(stop, keys), k_stride_l, real, MASKED).to(
            tl.float32
        )
        value = load_tile(at_v, first_row, at, v_offset, row, tl.minimum(stop, keys), v_stride_l, real, MASKED)
        error = load_tile(at_do, first_row, at, do_offset, row, stop, do_stride_l, real, MASKED)
        if NORM == "given":
            q_first = tl.load(q_norms + of_row, mask=inside, other=0.0)[:, None]
            q_second = tl.load(q_norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
            k_first = tl.load(k_norms + of_row, mask=inside, other=0.0)[:, None]
            k_second = tl.load(k_norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
        phi_q = features(query, inverse, one, real, q_first, q_second, KIND, POWER, NORM, MASKED, ROWS, 1, W)
        phi_k = features(key, inverse, keep, real, k_first, k_second, KIND, POWER, NORM, MASKED, ROWS, 1, W)
        rounded_k = phi_k.to(value.dtype)
        seen = row[:, None] >= row[None, :]
        count = (before + tl.minimum(at + row + 1, keys)).to(tl.float32)
        unit = 1.0 / tl.maximum(before + tl.minimum(at + ROWS, keys), 1).to(tl.float32)
        square = tl.zeros((ROWS, ROWS), tl.float32)
        scores = _rounded_product(phi_q.to(value.dtype), tl.trans(rounded_k), square)
        scores = tl.where(seen, scores, 0.0)
        below = (tl.sum(phi_q * k_sum[None, :], axis=1) + tl.sum(scores, axis=1) + eps * count) * unit
        norm = tl.where(count > 0.0, 1.0 / tl.where(count > 0.0, below, 1.0), 0.0)  # 1 / (s * unit)
        towards = _rounded_product(error, (state_t * unit).to(value.dtype), tl.zeros((ROWS, W), tl.float32))
        near = _rounded_product(error, tl.trans(value), square)
        along = (tl.sum(phi_q * towards, axis=1) + tl.sum(scores * near, axis=1) * unit) * norm
        d_phi = (towards - along[:, None] * (k_sum * unit)[None, :]) * norm[:, None]
        pull = tl.where(seen, (near - along[:, None]) * norm[:, None], 0.0).to(value.dtype)
        d_phi += _rounded_product(pull, rounded_k, tl.zeros((ROWS, W), tl.float32)) * unit
        if DOTS:
            dot = feature_dot(query, d_phi, inverse, real, q_first, q_second, POWER, MASKED, ROWS, 1, W)
            tl.store(dots + h * TOTAL + of_row, dot, mask=inside)
        else:
            if NORM == "given":
                given_dot = tl.load(dots + of_row, mask=inside, other=0.0)[:, None]
            d_x, d_log = features_gradient(
                query, phi_q, d_phi, inverse, real, q_first, q_second, given_dot, KIND, POWER, NORM, MASKED, ROWS, 1, W
            )
            store_tile(at_dq, first_row, d_x, at, dq_offset, row, stop, dq_stride_l, real, MASKED)
            tl.store(weight + of_row * H + h, norm * unit, mask=inside)
            tl.store(shift + of_row * H + h, along * norm * unit, mask=inside)
            if d_scale is not None:
                of_scale = add_rows(of_scale, d_log, ROWS, W)
        state_t = _rounded_product(tl.trans(value), rounded_k, state_t)
        k_sum += tl.sum(phi_k, axis=0)
    if d_scale is not None and not DOTS:
        to = (entry.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (H * W) + h * W
        tl.store(d_scale + to + c, tl.sum(of_scale, axis=0))


@triton.jit(do_not_specialize=["L", "TOTAL"])
def causal_keys_gradient_kernel(
    q,
    k,
    v,
    d_out,
    scale,
    q_norms,
    k_norms,
    dots,
    weight,
    shift,
    states,
    past,
    conv,
    cu,
    lengths,
    d_k,
    d_v,
    d_scale,
    d_conv,
    q_stride_b,
    q_stride_l: tl.constexpr,
    q_stride_h,
    q_stride_d,
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
    L,
    TOTAL,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    DOTS: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
):
    """A part of a sequence and one head, from its end: d_k, d_v, d_scale and d_conv as ``keys_gradient_kernel`` does.
    ``states`` hold what queries after each part leave, (phi(q) / s)^T dO and -sum phi(q) t / s."""
    h = tl.program_id(1)
    entry = tl.program_id(2)
    MASKED: tl.constexpr = D != W
    batch, first_row, rows, flat = entry_rows(cu, lengths, entry, L, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L, cu is not None, lengths is not None)
    start, stop = part_of(tl.program_id(0), tl.num_programs(0), rows, ROWS)
    row = tl.arange(0, ROWS)
    c = tl.arange(0, W)
    real = c < D
    at_q = q + batch * q_stride_b + h * q_stride_h
    at_k = k + batch * k_stride_b + h * k_stride_h
    at_v = v + batch * v_stride_b + h * v_stride_h
    at_do = d_out + batch * do_stride_b + h * do_stride_h
    at_dk = d_k + batch * dk_stride_b + h * dk_stride_h
    at_dv = d_v + batch * dv_stride_b + h * dv_stride_h
    q_offset = row[:, None] * q_stride_l + (c * q_stride_d)[None, :]
    k_offset = row[:, None] * k_stride_l + (c * k_stride_d)[None, :]
    v_offset = row[:, None] * v_stride_l + (c * v_stride_d)[None, :]
    do_offset = row[:, None] * do_stride_l + (c * do_stride_d)[None, :]
    dk_offset = row[:, None] * dk_stride_l + (c * dk_stride_d)[None, :]
    dv_offset = row[:, None] * dv_stride_l + (c * dv_stride_d)[None, :]
    inverse = tl.zeros((W,), tl.float32) + UNIT
    if scale is not None:
        inverse = UNIT / tl.load(scale + h * D + c, mask=real, other=1.0)
    slot = entry.to(tl.int64) * (tl.num_programs(0) + 1) + tl.program_id(0) + 1
    of_entry = states + slot * (H * (W * W + W))
    d_state = tl.load(of_entry + (h * W + c[:, None]) * W + c[None, :])
    d_sum = tl.load(of_entry + H * W * W + h * W + c)
    before = tl.load(past + entry)
    one = tl.zeros((ROWS, 1), tl.float32) + 1.0
    q_first = tl.zeros((ROWS, 1), tl.float32)
    q_second = tl.zeros((ROWS, 1), tl.float32)
    k_first = tl.zeros((ROWS, 1), tl.float32)
    k_second = tl.zeros((ROWS, 1), tl.float32)
    given_dot = tl.zeros((ROWS, 1), tl.float32)
    of_scale = tl.zeros((4, W), tl.float32)
    of_conv = ()
    for _ in tl.static_range(TAPS):
        of_conv = of_conv + (tl.zeros((4, W), tl.float32),)  # noqa: RUF005
    taps = ()
    if conv is not None:
        taps = load_taps(conv, h * W + c, H * W, TAPS)
    tiles = tl.cdiv(stop - start, ROWS)
    for tile in range(tiles):
        at = start + (tiles - 1 - tile) * ROWS
        inside = at + row < stop
        of_row = flat + at + row
        keep = (at + row < tl.minimum(stop, keys)).to(tl.float32)[:, None]
        query = load_tile(at_q, first_row, at, q_offset, row, stop, q_stride_l, real, MASKED).to(tl.float32)
        key = load_tile(at_k, first_row, at, k_offset, row, tl.minimum(stop, keys), k_stride_l, real, MASKED).to(
            tl.float32
        )
        value = load_tile(at_v, first_row, at, v_offset, row, tl.minimum(stop, keys), v_stride_l, real, MASKED)
        error = load_tile(at_do, first_row, at, do_offset, row, stop, do_stride_l, real, MASKED)
        if NORM == "given":
            q_first = tl.load(q_norms + of_row, mask=inside, other=0.0)[:, None]
            q_second = tl.load(q_norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
            k_first = tl.load(k_norms + of_row, mask=inside, other=0.0)[:, None]
            k_second = tl.load(k_norms + TOTAL + of_row, mask=inside, other=0.0)[:, None]
        phi_q = features(query, inverse, one, real, q_first, q_second, KIND, POWER, NORM, MASKED, ROWS, 1, W)
        phi_k = features(key, inverse, keep, real, k_first, k_second, KIND, POWER, NORM, MASKED, ROWS, 1, W)
        count = tl.maximum(before + tl.minimum(at + ROWS, keys), 1).to(tl.float32)
        unit = 1.0 / count
        factor = tl.load(weight + of_row * H + h, mask=inside, other=0.0) * count
        less = tl.load(shift + of_row * H + h, mask=inside, other=0.0)
        weighted = (phi_q * factor[:, None]).to(value.dtype)
        seen = row[:, None] <= row[None, :]  # (keys, queries)
        square = tl.zeros((ROWS, ROWS), tl.float32)
        nothing = tl.zeros((ROWS, W), tl.float32)
        rounded_k = phi_k.to(value.dtype)
        near = _rounded_product(value, tl.trans(error), square)
        pull = tl.where(seen, near * factor[None, :] - (less * count)[None, :], 0.0).to(value.dtype)
        d_phi = _rounded_product(value, tl.trans(d_state).to(value.dtype), nothing) + d_sum[None, :]
        d_phi += _rounded_product(pull, phi_q.to(value.dtype), nothing) * unit
        d_phi *= keep
        if DOTS:
            dot = feature_dot(key, d_phi, inverse, real, k_first, k_second, POWER, MASKED, ROWS, 1, W)
            tl.store(dots + h * TOTAL + of_row, dot, mask=inside)
        else:
            if NORM == "given":
                given_dot = tl.load(dots + of_row, mask=inside, other=0.0)[:, None]
            d_x, d_log = features_gradient(
                key, phi_k, d_phi, inverse, real, k_first, k_second, given_dot, KIND, POWER, NORM, MASKED, ROWS, 1, W
            )
            store_tile(at_dk, first_row, d_x, at, dk_offset, row, stop, dk_stride_l, real, MASKED)
            if d_scale is not None:
                of_scale = add_rows(of_scale, d_log, ROWS, W)
            scores = _rounded_product(rounded_k, tl.trans(weighted), square)
            scores = tl.where(seen, scores, 0.0).to(value.dtype)
            d_value = _rounded_product(rounded_k, d_state.to(value.dtype), nothing)
            d_value += _rounded_product(scores, error, nothing) * unit
            if conv is not None:
                d_value, of_conv = add_convolution_gradient(
                    d_value, of_conv, value.to(tl.float32), at_do, first_row, at, do_offset, row, rows, do_stride_l,
                    taps, real, TAPS, TAPS - 1, MASKED, ROWS, W,
                )  # fmt: skip
            store_tile(at_dv, first_row, d_value * keep, at, dv_offset, row, stop, dv_stride_l, real, MASKED)
        d_state += _rounded_product(tl.trans(weighted), error, tl.zeros((W, W), tl.float32)) * unit
        d_sum -= tl.sum(phi_q * less[:, None], axis=0)
    to = entry.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    if d_scale is not None and not DOTS:
        tl.store(d_scale + to * (H * W) + h * W + c, tl.sum(of_scale, axis=0))
    if conv is not None and not DOTS:
        for t in tl.static_range(TAPS):
            tl.store(d_conv + (to * TAPS + t) * (H * W) + h * W + c, tl.sum(of_conv[t], axis=0))


def aot_cases() -> list[AotCase]:
    """The walks at head size 64, on Hopper also at 16, and 128 forward; the scan in both directions."""
    wide = {"H": 8, "D": 64, "W": 64, "ROWS": 32, "KIND": "focused", "POWER": 3, "NORM": "given", "DOTS": False}
    wide |= {"TAPS": 4}
    small = {**wide, "D": 16, "W": 16}
    large = {**wide, "D": 128, "W": 128, "TAPS": 0}
    of_out = ("scale", "q_norms", "k_norms", "past")
    of_q = (*of_out, "dots", "weight", "shift", "d_scale")
    of_k = (*of_q, "conv", "d_conv")
    scan = {"SIZE": 8 * 64 * 65, "STEP": 16, "BLOCK": 128}
    chips, two = (80, 90, 100, 120), (80, 90)
    return [
        aot_case("linear_causal_out_64", causal_output_kernel, chips, (8, 2), wide, (*of_out, "conv"), spills=360),
        aot_case("linear_causal_out_16", causal_output_kernel, (90,), (4, 2), small, (*of_out, "conv")),
        aot_case("linear_causal_out_128", causal_output_kernel, two, (8, 1), large, of_out, spills=360),
        aot_case("linear_causal_dq_64", causal_queries_gradient_kernel, chips, (8, 2), wide, of_q, spills=800),
        aot_case("linear_causal_dq_16", causal_queries_gradient_kernel, (90,), (4, 2), small, of_q),
        aot_case("linear_causal_dk_64", causal_keys_gradient_kernel, chips, (8, 2), wide, of_k, spills=1000),
        aot_case("linear_causal_dk_16", causal_keys_gradient_kernel, (90,), (4, 2), small, of_k),
        aot_case("linear_scan", scan_kernel, chips, (4, 3), {**scan, "REVERSE": False}, ("initial",)),
        aot_case("linear_scan_reverse", scan_kernel, two, (4, 3), {**scan, "REVERSE": True}),
    ]
