"""SageBwd's backward in Triton, the kernel for dQ, which keeps a tile of queries; see ``triton_bwd_keys.py``.

Shapes: B batch, L_q queries, L_k keys, T_q, T_k queries and keys of S packed sequences (then B = 1; else T = L), H
query heads, G key heads, D head size, DP = D padded, N blocks of 128 keys, NQ tiles of 64 queries.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_bwd_builds import backward_cases
from allears.ops.attention.lowbit.triton_quant import inverse_of, largest, locate, nearest_int8, other_side
from allears.ops.attention.lowbit.triton_tiles import in_token_order, load_16, load_values, row_scales


@triton.jit
def _d_scores(
    eight,
    errors,
    factor,
    shift,
    lse,
    last_key,
    start,
    k8,
    correction,
    v,
    v_stride_l,
    v_stride_d,
    L_k,
    D,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    MEAN_OF: tl.constexpr,
):
    """dS (rows, KEYS) of a tile of queries and the keys from ``start``."""
    key = start + tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    keys = tl.load(k8 + key[None, :] * DP + channel[:, None])
    s = tl.dot(eight, keys).to(tl.float32) * factor[:, None]
    if MEAN_OF:
        s += tl.load(correction + key)[None, :]
    p = tl.exp2(s - lse[:, None])
    if MASKED:
        p = tl.where(key[None, :] <= last_key[:, None], p, 0.0)
    values = load_values(v, key, channel, v_stride_l, v_stride_d, L_k, D, MASKED, PADDED)
    return p * (tl.dot(errors, tl.trans(values), input_precision="ieee") - shift[:, None])


@triton.jit
def _key_tile(
    d_q,
    eight,
    errors,
    row_factor,
    shift,
    lse,
    last_key,
    start,
    k8,
    k8t,
    k_scale,
    correction,
    v,
    v_stride_l,
    v_stride_d,
    L_k,
    D,
    COLUMNS,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    MASKED: tl.constexpr,
    PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of keys: d_q (ROWS, DP) of a tile of queries, with its terms added. The keys go in two halves, to keep
    registers free."""
    scale = tl.load(k_scale + start // KEYS)
    factor = row_factor * scale
    low = _d_scores(
        eight,
        errors,
        factor,
        shift,
        lse,
        last_key,
        start,
        k8,
        correction,
        v,
        v_stride_l,
        v_stride_d,
        L_k,
        D,
        KEYS // 2,
        DP,
        MASKED,
        PADDED,
        MEAN_OF,
    )
    high = _d_scores(
        eight,
        errors,
        factor,
        shift,
        lse,
        last_key,
        start + KEYS // 2,
        k8,
        correction,
        v,
        v_stride_l,
        v_stride_d,
        L_k,
        D,
        KEYS // 2,
        DP,
        MASKED,
        PADDED,
        MEAN_OF,
    )
    larger = tl.maximum(tl.abs(low), tl.abs(high), propagate_nan=tl.PropagateNan.ALL)
    of_rows = row_scales(largest(larger, 1, HARDWARE), ROWS, SHARED, HARDWARE)
    inverse = inverse_of(of_rows)[:, None]
    at = k8t + tl.arange(0, DP)[None, :] * COLUMNS + (start + tl.arange(0, KEYS // 2))[:, None]
    product = tl.dot(in_token_order(nearest_int8(low * inverse), ROWS, KEYS // 2), tl.load(at))
    eight_high = in_token_order(nearest_int8(high * inverse), ROWS, KEYS // 2)
    product = tl.dot(eight_high, tl.load(at + KEYS // 2), product, out_dtype=tl.int32)
    return d_q + product.to(tl.float32) * (of_rows * scale)[:, None]


@triton.jit
def sagebwd_queries_kernel(
    q8,
    k8,
    k8t,
    k_scale,
    v,
    d_out,
    q_scale,
    row_shift,
    row_lse,
    correction,
    d_q,
    row_d_lse,
    k_mean,
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
    TILES,
    factor,
    log2_factor,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    PER_TILE: tl.constexpr,
    LSE_GRADIENT: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ROWS queries of a head: d_q (B, T_q, H, D), contiguous. Operands as in the kernel of the keys; k8t (B, G, DP, N *
    128) in the order of ``token_order``. LSE_GRADIENT: adds factor * row_d_lse * k_mean, of (B, H, NQ * 64) and (B or
    S, G, DP)."""
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    if CAUSAL:
        tile = TILES - 1 - tile
    b, h = head // H, head % H
    g = h // (H // G)
    key_head = b * G + g
    sequence, base, length, first = locate(cu_q, tile, L_q, S, ROWS, PACKED)
    key_base, keys, first_block = other_side(cu_k, sequence, L_k, KEYS, PACKED)
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    inside = row < length
    at = head * T_q + base + row
    eight = tl.load(q8 + at[:, None] * DP + channel[None, :], mask=inside[:, None], other=0)
    at_do = d_out + b * do_stride_b + h * do_stride_h + base * do_stride_l
    errors = load_16(at_do, row, channel, do_stride_l, do_stride_d, length, D, PADDED)
    padded = head * NQ * QUERIES + row
    if PACKED:
        padded += (base // QUERIES + sequence) * QUERIES
    row_factor = tl.load(q_scale + padded, mask=inside, other=0.0) * log2_factor
    shift = tl.load(row_shift + padded, mask=inside, other=0.0)
    lse = tl.load(row_lse + padded, mask=inside, other=float("inf"))
    SHARED: tl.constexpr = QUERIES if PER_TILE else 1
    k8 += (key_head * N + first_block) * (KEYS * DP)
    k8t += key_head * DP * (N * KEYS) + first_block * KEYS
    k_scale += key_head * N + first_block
    v += b * v_stride_b + g * v_stride_h + key_base * v_stride_l
    if MEAN_OF:
        correction += (head * tl.cdiv(L_q, MEAN_OF) + first // MEAN_OF) * (N * KEYS)

    last_key = tl.zeros((ROWS,), tl.int32) + keys - 1
    end = keys
    plain_end = keys // KEYS * KEYS
    if CAUSAL:
        last_key = tl.minimum(last_key, row + keys - length)
        end = tl.minimum(end, tl.minimum(first + ROWS, length) + keys - length)
        plain_end = tl.minimum(plain_end, tl.maximum(first + 1 + keys - length, 0) // KEYS * KEYS)
    end = tl.where(first < length, tl.maximum(end, 0), 0)
    plain_end = tl.minimum(plain_end, end // KEYS * KEYS)

    total = tl.zeros((ROWS, DP), tl.float32)
    for masked in tl.static_range(2):
        for start in range(plain_end if masked else 0, end if masked else plain_end, KEYS):
            total = _key_tile(
                total,
                eight,
                errors,
                row_factor,
                shift,
                lse,
                last_key,
                start,
                k8,
                k8t,
                k_scale,
                correction,
                v,
                v_stride_l,
                v_stride_d,
                keys,
                D,
                N * KEYS,
                ROWS,
                KEYS,
                DP,
                masked == 1,
                PADDED,
                SHARED,
                MEAN_OF,
                HARDWARE,
            )
    total *= factor
    if LSE_GRADIENT:
        entry = sequence if PACKED else b
        centre = tl.load(k_mean + (entry * G + g) * DP + channel)
        total += (factor * tl.load(row_d_lse + padded, mask=inside, other=0.0))[:, None] * centre[None, :]
    to = ((b * T_q + base + row) * H + h)[:, None] * D + channel[None, :]
    tl.store(d_q + to, total.to(d_q.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])


def aot_cases() -> list[AotCase]:
    """The kernel, as ``triton_host.backward_launch`` starts it; the functions above are compiled within it."""
    own = {"k8t": "*i8", "d_q": "*bf16", "TILES": "i32"}
    lse, means, constants = {"row_d_lse": "*fp32", "k_mean": "*fp32"}, {"correction": "*fp32"}, {"KEYS": 128}
    return backward_cases("queries", sagebwd_queries_kernel, own, lse, means, constants, (130, 750, 220, 130, 400))
