"""Backward of sparse-linear attention in Triton: the kernels that keep a block of keys; see ``triton_bwd_queries.py``.

With dH_j and dZ_j the sums of dH and dZ over the query blocks that have block j in the linear branch, phi = phi(k'):

    d v = phi dH_j + P^T e,  d phi = v dH_j^T + 1 dZ_j^T,  d k = (gradient of phi) + dS^T q

k' is k less its mean over the keys of the sequence, so that the mean of (gradient of phi) over the keys comes off d k
again. dS^T q sums to 0 over the keys, as rows of dS do.

Query blocks come from lists by column; the key blocks of a head go in the order of their lengths, longest first.
Nothing is added atomically, so that results repeat bit for bit.

Shapes: E batch entries or packed sequences, L_q queries, L_k keys, T_q, T_k rows in memory (packed: of all sequences; E
is 1 in their place), H query heads, G key heads, D head size, DP = D padded, N_q, N_k blocks.
"""

from typing import Any

import triton
import triton.language as tl

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.sparse_linear.triton_bwd_queries import (
    backward_case,
    e4m3_values,
    feature_gradient,
    int8_keys,
    int8_rows,
    load_channels,
    load_tile,
)
from allears.ops.attention.sparse_linear.triton_pool import entry_rows
from allears.ops.attention.sparse_linear.triton_states import centred_keys, feature_stats, feature_values


@triton.jit(do_not_specialize=["L_k", "G", "N_k", "NP", "T_k", "first"])
def linear_keys_kernel(
    k,
    v,
    k_mean,
    d_states,
    d_k,
    d_v,
    d_means,
    cu_k,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    L_k,
    G,
    D,
    N_k,
    NP,
    T_k,
    first,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DP: tl.constexpr,
    MAP: tl.constexpr,
    CENTRED: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A key block of a key head, of a group from ``first`` of all E * G: the linear branch's d_k and d_v (E, T_k, G,
    D), contiguous, and d_means (E, G, N_k, D), the sum of the block's d_k.

    d_states (heads of the group, N_P, DP + 1, DP): the gradient of the states as ``triton_states.py`` has them; k_mean
    (E, G, D) is read if CENTRED.
    """
    block = tl.program_id(0) % N_k
    local = (tl.program_id(0) // N_k).to(tl.int64)
    unit = first + local
    entry, g = unit // G, unit % G
    b, base, length = entry_rows(cu_k, entry, L_k, PACKED)
    key = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    inside = key < length
    k += b * k_stride_b + g * k_stride_h + base * k_stride_l
    v += b * v_stride_b + g * v_stride_h + base * v_stride_l
    mean = k_mean + unit * D if CENTRED else k
    state = d_states + (local * NP + block) * ((DP + 1) * DP)
    to = ((b * T_k + base + key) * G + g)[:, None] * D
    whole = centred_keys(k, mean, key, channel, k_stride_l, k_stride_d, length, D, CENTRED)
    top, inverse = feature_stats(whole, channel, D, MAP)
    values = load_tile(v, key, channel, v_stride_l, v_stride_d, length, D, PADDED)
    given, phi, of_slice = whole, whole, whole

    d_values = tl.zeros((ROWS, DP), tl.float32)
    inner = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, DP, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        given = centred_keys(k, mean, key, feature, k_stride_l, k_stride_d, length, D, CENTRED)
        phi = feature_values(given, top, inverse, feature, D, MAP)
        of_slice = tl.load(state + feature[:, None] * DP + channel[None, :])
        d_values = tl.dot(phi.to(values.dtype), of_slice, d_values, input_precision="tf32x3")
        inner += tl.sum(phi * tl.load(state + DP * DP + feature).to(tl.float32)[None, :], 1)
    # With d phi as below, rowsum(phi * d phi) is what phi meets here.
    inner += tl.sum(d_values * values.to(tl.float32), 1)
    for start in tl.static_range(0, DP, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        if FEATURES < DP:
            given = centred_keys(k, mean, key, feature, k_stride_l, k_stride_d, length, D, CENTRED)
            phi = feature_values(given, top, inverse, feature, D, MAP)
            of_slice = tl.load(state + feature[:, None] * DP + channel[None, :])
        d_phi = tl.dot(values, tl.trans(of_slice), input_precision="tf32x3")
        d_phi += tl.load(state + DP * DP + feature).to(tl.float32)[None, :]
        d_given = feature_gradient(d_phi, given, phi, inner[:, None], MAP) * (1.0 / ROWS)
        stored = inside[:, None] & (feature < D)[None, :]
        tl.store(d_k + to + feature[None, :], d_given.to(d_k.dtype.element_ty), mask=stored)
        d_mean = tl.sum(tl.where(inside[:, None], d_given, 0.0), 0)
        tl.store(d_means + (unit * N_k + block) * D + feature, d_mean, mask=feature < D)
    stored = inside[:, None] & (channel < D)[None, :]
    tl.store(d_v + to + channel[None, :], (d_values * (1.0 / ROWS)).to(d_v.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["N_q", "N_k", "R"])
def columns_kernel(rows, count, index, lengths, N_q, N_k, R, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """COLUMNS key blocks of a head: the query blocks that list them, rising, to index (E, H, N_k, N_q) int16, and how
    many there are to lengths (E, H, N_k), from rows (E, H, N_q, R) and count (E, H, N_q)."""
    chunks = tl.cdiv(N_k, COLUMNS)
    head = (tl.program_id(0) // chunks).to(tl.int64)
    column = (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, N_q, STEP):
        block = start + tl.arange(0, STEP)
        listed = tl.load(count + head * N_q + block, mask=block < N_q, other=0)
        member = tl.zeros((STEP, COLUMNS), tl.int32)
        for r in range(0, tl.max(listed, 0)):
            taken = tl.load(rows + (head * N_q + block) * R + r, mask=r < listed, other=-1)
            member |= (taken[:, None] == column[None, :]).to(tl.int32)
        place = total[None, :] + tl.cumsum(member, 0) - 1
        to = index + (head * N_k + column)[None, :] * N_q + place
        tl.store(to, (tl.zeros((STEP, COLUMNS), tl.int32) + block[:, None]).to(tl.int16), mask=member != 0)
        total += tl.sum(member, 0)
    tl.store(lengths + head * N_k + column, total, mask=column < N_k)


@triton.jit(do_not_specialize=["L_q", "L_k", "H", "G", "N_q", "N_k", "T_q", "T_k"])
def sparse_keys_kernel(
    q,
    k,
    v,
    d_out,
    k_mean,
    order,
    index,
    lengths,
    row_shift,
    row_lse,
    d_k,
    d_v,
    d_mean,
    cu_q,
    cu_k,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    do_stride_b,
    do_stride_l,
    do_stride_h,
    do_stride_d,
    L_q,
    L_k,
    H,
    G,
    D,
    N_q,
    N_k,
    T_q,
    T_k,
    factor,
    log2_factor,
    QUERIES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDED: tl.constexpr,
    CENTRED: tl.constexpr,
    MATCHED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A key block of a key head, over all query heads that share it: d_k and d_v (E, T_k, G, D), contiguous, to which
    ADDED adds.

    order (E, G, N_k): which block a program takes; index (E, H, N_k, N_q) and lengths (E, H, N_k): the lists by column;
    row_shift and row_lse (E, H, T_q). CENTRED: d_mean (E, G, D) comes off d_k. MATCHED: operands are rounded as in the
    forward (SMOOTH: k less k_mean (E, G, D)).
    """
    key_head = (tl.program_id(0) // N_k).to(tl.int64)
    block = tl.load(order + tl.program_id(0)).to(tl.int32)
    entry, g = key_head // G, key_head % G
    b, base, length = entry_rows(cu_k, entry, L_k, PACKED)
    b_q, query_base, queries = entry_rows(cu_q, entry, L_q, PACKED)
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, DP)
    at_k = k + b * k_stride_b + g * k_stride_h + base * k_stride_l
    at_v = v + b * v_stride_b + g * v_stride_h + base * v_stride_l
    keys = load_tile(at_k, key, channel, k_stride_l, k_stride_d, length, D, PADDED)
    values = load_tile(at_v, key, channel, v_stride_l, v_stride_d, length, D, PADDED)
    k_factor = log2_factor
    v_scale = 1.0
    if MATCHED:
        centre = 0.0
        if SMOOTH:
            centre = load_channels(k_mean + (entry * G + g) * D, channel, D, PADDED)
        keys, k_scale = int8_keys(keys, centre, key, length, SMOOTH, HARDWARE)
        values, v_scale = e4m3_values(values, HARDWARE)
        k_factor *= k_scale

    SPLIT: tl.constexpr = BLOCK_Q // QUERIES
    d_keys = tl.zeros((BLOCK_K, DP), tl.float32)
    d_values = tl.zeros((BLOCK_K, DP), tl.float32)
    for shared in range(0, H // G):
        h = g * (H // G) + shared
        at_q = q + b_q * q_stride_b + h * q_stride_h + query_base * q_stride_l
        at_do = d_out + b_q * do_stride_b + h * do_stride_h + query_base * do_stride_l
        of_rows = (b_q * H + h) * T_q + query_base
        column = (entry * H + h) * N_k + block
        listed = index + column * N_q
        end = tl.load(lengths + column)
        following = tl.load(listed, mask=end > 0, other=0).to(tl.int32)
        for n in range(0, end * SPLIT):
            row = following * BLOCK_Q + (n % SPLIT) * QUERIES + tl.arange(0, QUERIES)
            after = (n + 1) // SPLIT
            following = tl.load(listed + after, mask=after < end, other=0).to(tl.int32)
            inside = row < queries
            rows = load_tile(at_q, row, channel, q_stride_l, q_stride_d, queries, D, PADDED)
            log2_sum = tl.load(row_lse + of_rows + row, mask=inside, other=float("inf"))
            shift = tl.load(row_shift + of_rows + row, mask=inside, other=0.0)
            if MATCHED:
                rows, q_scale = int8_rows(rows, HARDWARE)
                s = tl.dot(keys, tl.trans(rows), input_precision="tf32x3") * (k_factor * q_scale)[None, :]
            else:
                q_scale = shift  # not read
                s = tl.dot(keys, tl.trans(rows), input_precision="tf32x3") * k_factor
            p = tl.exp2(s - log2_sum[None, :])
            if CAUSAL:
                p = tl.where(key[:, None] <= (row + (length - queries))[None, :], p, 0.0)
            errors = load_tile(at_do, row, channel, do_stride_l, do_stride_d, queries, D, PADDED)
            d_values = tl.dot(p.to(errors.dtype), errors, d_values, input_precision="tf32x3")
            d_p = tl.dot(values, tl.trans(errors), input_precision="tf32x3")
            if MATCHED:
                d_p *= v_scale
            d_s = p * (d_p - shift[None, :])
            if MATCHED:
                d_s *= q_scale[None, :]
            d_keys = tl.dot(d_s.to(rows.dtype), rows, d_keys, input_precision="tf32x3")

    d_keys *= factor
    to = ((b * T_k + base + key) * G + g)[:, None] * D + channel[None, :]
    stored = (key < length)[:, None] & (channel < D)[None, :]
    if ADDED:
        d_keys += tl.load(d_k + to, mask=stored, other=0.0).to(tl.float32)
        d_values += tl.load(d_v + to, mask=stored, other=0.0).to(tl.float32)
    if CENTRED:
        d_keys -= load_channels(d_mean + (entry * G + g) * D, channel, D, PADDED)[None, :]
    tl.store(d_k + to, d_keys.to(d_k.dtype.element_ty), mask=stored)
    tl.store(d_v + to, d_values.to(d_v.dtype.element_ty), mask=stored)


def aot_cases() -> list[AotCase]:
    """The softmax branch in the form "sla2", of 8-bit forwards, and as the only branch, causal and packed; the linear
    branch. On Hopper 4 warps hold two sums of 64 x 128 and spill what is needed after the loop alone."""
    base = {"QUERIES": 64, "BLOCK_Q": 128, "BLOCK_K": 64, "CAUSAL": False, "ADDED": True, "CENTRED": True}
    base |= {"MATCHED": False, "SMOOTH": True, "PACKED": False, "HARDWARE": True}
    alone = {"CAUSAL": True, "ADDED": False, "CENTRED": False, "SMOOTH": False, "PACKED": True, "d_mean": None}
    linear = {"ROWS": 64, "FEATURES": 128, "MAP": "softmax", "CENTRED": True, "PACKED": False}

    def sparse(suffix: str, chips: tuple[int, ...], warps: int, stages: int, **changes: Any) -> AotCase:
        name = f"sparse_linear_bwd_keys{suffix}"
        return backward_case(
            name, sparse_keys_kernel, chips, warps, stages, 64 if warps == 4 else 0, {**base, **changes}
        )

    lists = {
        "rows": "*i32",
        "count": "*i32",
        "index": "*i16",
        "lengths": "*i32",
        "N_q": "i32",
        "N_k": "i32",
        "R": "i32",
    }
    columns = {"COLUMNS": 32, "STEP": 128}
    return [
        sparse("_hopper", (90,), 4, 2),
        sparse("", (80, 100, 120), 8, 2),
        sparse("_matched", (90,), 8, 1, MATCHED=True),
        sparse("_causal_packed", (90,), 4, 2, **alone),
        AotCase("sparse_linear_columns", columns_kernel, lists, columns, dict.fromkeys(CAPABILITIES, ())),
        backward_case("sparse_linear_bwd_to_keys", linear_keys_kernel, (80, 90, 100, 120), 8, 1, 0, linear),
    ]
