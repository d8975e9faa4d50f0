"""SageBwd's backward in Triton (arXiv 2505.11594, section 4): five products, all in INT8 but dO V^T.

Two kernels without atomics, so that results repeat bit for bit. The one for dK and dV, here, keeps a block of keys and
works on the transposed tile S^T (keys x queries), where P^T and dS^T are the left operands of dV and dK and where a
scale for each key is one for each row. The one for dQ is in ``triton_bwd_queries.py``. Numerics are those of
``sagebwd_reference.py``; the operands come from ``triton_quant.py``.

Shapes: B batch, L_q queries, L_k keys, T_q, T_k queries and keys of S packed sequences (then B = 1; else T = L), H
query heads, G key heads, D head size, DP = D padded, N blocks of 128 keys, NQ tiles of 64 queries.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_bwd_builds import backward_cases
from allears.ops.attention.lowbit.triton_quant import inverse_of, largest, locate, nearest_int8, other_side
from allears.ops.attention.lowbit.triton_tiles import in_token_order, load_16, row_scales


@triton.jit
def _add_products(low, high, left, at, HALF, scale):
    """Adds ``left @ right * scale`` to a sum (rows, DP) that is held as two halves of its channels, to keep the
    integers few."""
    low += tl.dot(left, tl.load(at)).to(tl.float32) * scale[:, None]
    high += tl.dot(left, tl.load(at + HALF)).to(tl.float32) * scale[:, None]
    return low, high


@triton.jit
def _query_tile(
    d_k_low,
    d_k_high,
    d_v_low,
    d_v_high,
    keys,
    values,
    key,
    k_factor,
    start,
    offset,
    q8,
    q8t,
    do8t,
    d_out,
    q_scale,
    do_scale,
    row_shift,
    row_lse,
    correction,
    q_mean,
    do_stride_l,
    do_stride_d,
    L_q,
    L_k,
    D,
    COLUMNS,
    PADDED_KEYS,
    log2_factor,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    PER_TILE: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of queries: dK and dV (ROWS, DP) of a block of keys, each in two halves, with its terms added."""
    query = start + tl.arange(0, QUERIES)
    channel = tl.arange(0, DP)
    eight = tl.load(q8 + query[None, :] * DP + channel[:, None], mask=(query < L_q)[None, :], other=0)
    factor = tl.load(q_scale + query) * log2_factor * k_factor
    s = tl.dot(keys, eight).to(tl.float32) * factor[None, :]
    if MEAN_OF:
        row = tl.zeros((ROWS,), tl.int64) + start // MEAN_OF
        s += tl.load(correction + row * PADDED_KEYS + tl.arange(0, ROWS))[:, None]
    p = tl.exp2(s - tl.load(row_lse + query)[None, :])
    if MASKED:
        seen = (key < L_k)[:, None] & (query < L_q)[None, :]
        if CAUSAL:
            seen = seen & (key[:, None] <= (query + offset)[None, :])
        p = tl.where(seen, p, 0.0)
    half = tl.arange(0, DP // 2)[None, :] * COLUMNS + query[:, None]
    scale = row_scales(largest(p, 1, HARDWARE), ROWS, SHARED, HARDWARE)
    eight = in_token_order(nearest_int8(p * inverse_of(scale)[:, None]), ROWS, QUERIES)
    if PER_TILE:
        scale *= tl.load(do_scale + start)
    d_v_low, d_v_high = _add_products(d_v_low, d_v_high, eight, do8t + half, COLUMNS * (DP // 2), scale)
    errors = load_16(d_out, query, channel, do_stride_l, do_stride_d, L_q, D, PADDED)
    d_p = tl.dot(values, tl.trans(errors), input_precision="ieee")
    if not PER_TILE:
        d_p *= tl.load(do_scale + query)[None, :]
    d_s = p * (d_p - tl.load(row_shift + query)[None, :])
    of_mean = tl.sum(d_s, axis=1)[:, None]  # left out of the code where nothing takes it
    if MEAN_OF and not PER_TILE:
        d_s *= tl.load(q_scale + query)[None, :]
    scale = row_scales(largest(d_s, 1, HARDWARE), ROWS, SHARED, HARDWARE)
    eight = in_token_order(nearest_int8(d_s * inverse_of(scale)[:, None]), ROWS, QUERIES)
    if PER_TILE:
        scale *= tl.load(q_scale + start)
    d_k_low, d_k_high = _add_products(d_k_low, d_k_high, eight, q8t + half, COLUMNS * (DP // 2), scale)
    if MEAN_OF:  # after the products, when registers are free
        at_mean = q_mean + start // MEAN_OF * DP + tl.arange(0, DP // 2)
        d_k_low += of_mean * tl.load(at_mean)[None, :]
        d_k_high += of_mean * tl.load(at_mean + DP // 2)[None, :]
    return d_k_low, d_k_high, d_v_low, d_v_high


@triton.jit
def sagebwd_keys_kernel(
    q8,
    q8t,
    k8,
    k_scale,
    v,
    d_out,
    do8t,
    q_scale,
    do_scale,
    row_shift,
    row_lse,
    correction,
    q_mean,
    d_k,
    d_v,
    cu_q,
    cu_k,
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
    N,
    NQ,
    S,
    T_q,
    T_k,
    factor,
    log2_factor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    PER_TILE: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ROWS keys of a key head, over all query heads that share it: d_k and d_v (B, T_k, G, D), contiguous.

    q8 (B, H, T_q, DP); q8t, do8t (B, H, DP, NQ * 64) in the order of ``token_order``; q_scale, do_scale, row_shift,
    row_lse (B, H, NQ * 64), without PER_TILE the last three as folded by ``prepare_backward_kernel``, so that P and dS
    come with the scales of dO and Q; k8 (B, G, N * 128, DP), k_scale (B, G, N); v and d_out with their strides.
    MEAN_OF: so many queries of a dense batch have lost one mean, q_mean (B, H, M, DP), and correction (B, H, M, N *
    128) is what their scores in base 2 lost; dS then comes without the scale of Q, and dK gets the sum of dS over the
    queries times their mean. 0 for none.
    """
    part = tl.program_id(0) % (N * (BLOCK // ROWS))
    block = part // (BLOCK // ROWS)
    key_head = (tl.program_id(0) // (N * (BLOCK // ROWS))).to(tl.int64)
    b, g = key_head // G, key_head % G
    sequence, base, length, first = locate(cu_k, block, L_k, S, BLOCK, PACKED)
    within = (part % (BLOCK // ROWS)) * ROWS
    query_base, queries, first_tile = other_side(cu_q, sequence, L_q, QUERIES, PACKED)
    key = first + within + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    stored = (key_head * N + block) * BLOCK + within + tl.arange(0, ROWS)
    keys = tl.load(k8 + stored[:, None] * DP + channel[None, :])
    k_factor = tl.load(k_scale + key_head * N + block)
    at_v = v + b * v_stride_b + g * v_stride_h + base * v_stride_l
    values = load_16(at_v, key, channel, v_stride_l, v_stride_d, length, D, PADDED)

    offset = length - queries
    begin = 0
    plain = 0
    if CAUSAL:
        begin = tl.maximum(first + within - offset, 0) // QUERIES * QUERIES
        plain = (tl.maximum(first + within + ROWS - 1 - offset, 0) + QUERIES - 1) // QUERIES * QUERIES
    if PER_TILE:
        plain = tl.where(first + within + ROWS > length, queries, plain)
    end = tl.where(first + within < length, queries, 0)
    plain = tl.minimum(tl.maximum(plain, begin), (end + QUERIES - 1) // QUERIES * QUERIES)

    SHARED: tl.constexpr = ROWS if PER_TILE else 1
    k_low = tl.zeros((ROWS, DP // 2), tl.float32)
    k_high = tl.zeros((ROWS, DP // 2), tl.float32)
    v_low = tl.zeros((ROWS, DP // 2), tl.float32)
    v_high = tl.zeros((ROWS, DP // 2), tl.float32)
    for shared in range(0, H // G):
        h = g * (H // G) + shared
        head = b * H + h
        padded = (head * NQ + first_tile) * QUERIES
        at_q = q8 + (head * T_q + query_base) * DP
        at_qt = q8t + head * NQ * QUERIES * DP + first_tile * QUERIES
        at_do8t = do8t + head * NQ * QUERIES * DP + first_tile * QUERIES
        at_do = d_out + b * do_stride_b + h * do_stride_h + query_base * do_stride_l
        at_correction = correction
        at_mean = q_mean
        if MEAN_OF:
            at_correction += head * tl.cdiv(L_q, MEAN_OF) * (N * BLOCK) + block * BLOCK + within
            at_mean += head * tl.cdiv(L_q, MEAN_OF) * DP
        for plainly in tl.static_range(2):
            for start in range(plain if plainly else begin, end if plainly else tl.minimum(plain, end), QUERIES):
                k_low, k_high, v_low, v_high = _query_tile(
                    k_low,
                    k_high,
                    v_low,
                    v_high,
                    keys,
                    values,
                    key,
                    k_factor,
                    start,
                    offset,
                    at_q,
                    at_qt,
                    at_do8t,
                    at_do,
                    q_scale + padded,
                    do_scale + padded,
                    row_shift + padded,
                    row_lse + padded,
                    at_correction,
                    at_mean,
                    do_stride_l,
                    do_stride_d,
                    queries,
                    length,
                    D,
                    NQ * QUERIES,
                    N * BLOCK,
                    log2_factor,
                    ROWS,
                    QUERIES,
                    DP,
                    CAUSAL,
                    plainly == 0,
                    PADDED,
                    PER_TILE,
                    SHARED,
                    MEAN_OF,
                    HARDWARE,
                )
    low = tl.arange(0, DP // 2)[None, :]
    to = ((b * T_k + base + key) * G + g)[:, None] * D + low
    of_low = (key < length)[:, None] & (low < D)
    of_high = (key < length)[:, None] & (low + DP // 2 < D)
    tl.store(d_k + to, (k_low * factor).to(d_k.dtype.element_ty), mask=of_low)
    tl.store(d_k + to + DP // 2, (k_high * factor).to(d_k.dtype.element_ty), mask=of_high)
    tl.store(d_v + to, v_low.to(d_v.dtype.element_ty), mask=of_low)
    tl.store(d_v + to + DP // 2, v_high.to(d_v.dtype.element_ty), mask=of_high)


def aot_cases() -> list[AotCase]:
    """The kernel, as ``triton_host.backward_launch`` starts it; the functions above are compiled within it."""
    own = {"q8t": "*i8", "do8t": "*i8", "do_scale": "*fp32", "d_k": "*bf16", "d_v": "*bf16", "T_k": "i32"}
    means, constants = {"correction": "*fp32", "q_mean": "*fp32"}, {"BLOCK": 128}
    return backward_cases("keys", sagebwd_keys_kernel, own, {}, means, constants, (350, 1300, 400, 450, 0))
