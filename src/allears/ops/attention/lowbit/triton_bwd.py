"""SageBwd's backward in Triton (arXiv 2505.11594, section 4): five products, all in INT8 but dO V^T.

Two kernels without atomics, so that results repeat bit for bit. The one for dK and dV keeps a block of keys and works
on the transposed tile S^T (keys x queries), where P^T and dS^T are the left operands of dV and dK and where a scale for
each key is one for each row. The one for dQ keeps a tile of queries. Numerics are those of ``sagebwd_reference.py``;
the operands come from ``triton_quant.py``.

Shapes: B batch, L_q queries, L_k keys, T_q, T_k queries and keys of S packed sequences (then B = 1; else T = L), H
query heads, G key heads, D head size, DP = D padded, N blocks of 128 keys, NQ tiles of 64 queries.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK
from allears.ops.attention.lowbit.triton_quant import inverse_of, largest, locate, nearest_int8, other_side, scale_of
from allears.ops.attention.lowbit.triton_tiles import in_token_order, load_values


@triton.jit
def _load_16(x, row, channel, stride_l, stride_d, LENGTH, D, PADDED: tl.constexpr):
    """(rows, channels) in the dtype of x, 0 beyond LENGTH and (if PADDED) D."""
    at = x + row.to(tl.int64)[:, None] * stride_l + channel[None, :] * stride_d
    if PADDED:
        return tl.load(at, mask=(row < LENGTH)[:, None] & (channel < D)[None, :], other=0.0)
    return tl.load(at, mask=(row < LENGTH)[:, None], other=0.0)


@triton.jit
def _row_scales(amax, ROWS: tl.constexpr, SHARED: tl.constexpr, HARDWARE: tl.constexpr):
    """INT8 scales of rows with the given largest magnitudes; SHARED rows in succession have one."""
    if SHARED > 1:
        of_tile = largest(tl.reshape(amax, (ROWS // SHARED, SHARED)), 1, HARDWARE)
        amax = tl.reshape(tl.broadcast_to(of_tile[:, None], (ROWS // SHARED, SHARED)), (ROWS,))
    return scale_of(amax, 127.0)


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
    scale = _row_scales(largest(p, 1, HARDWARE), ROWS, SHARED, HARDWARE)
    eight = in_token_order(nearest_int8(p * inverse_of(scale)[:, None]), ROWS, QUERIES)
    if PER_TILE:
        scale *= tl.load(do_scale + start)
    d_v_low, d_v_high = _add_products(d_v_low, d_v_high, eight, do8t + half, COLUMNS * (DP // 2), scale)
    errors = _load_16(d_out, query, channel, do_stride_l, do_stride_d, L_q, D, PADDED)
    d_p = tl.dot(values, tl.trans(errors), input_precision="ieee")
    if not PER_TILE:
        d_p *= tl.load(do_scale + query)[None, :]
    d_s = p * (d_p - tl.load(row_shift + query)[None, :])
    of_mean = tl.sum(d_s, axis=1)[:, None]  # left out of the code where nothing takes it
    if MEAN_OF and not PER_TILE:
        d_s *= tl.load(q_scale + query)[None, :]
    scale = _row_scales(largest(d_s, 1, HARDWARE), ROWS, SHARED, HARDWARE)
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
    values = _load_16(at_v, key, channel, v_stride_l, v_stride_d, length, D, PADDED)

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
    of_rows = _row_scales(largest(larger, 1, HARDWARE), ROWS, SHARED, HARDWARE)
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
    errors = _load_16(at_do, row, channel, do_stride_l, do_stride_d, length, D, PADDED)
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


_POINTERS = dict.fromkeys(("q8", "k8"), "*i8") | dict.fromkeys(("k_scale", "q_scale", "row_shift", "row_lse"), "*fp32")
_POINTERS |= dict.fromkeys(("v", "d_out"), "*bf16")
_STRIDES = {f"{tensor}_stride_{axis}": "i32" for tensor in ("v", "do") for axis in ("b", "l", "h")}
_SIZES = dict.fromkeys(("L_q", "L_k", "H", "G", "D", "N", "NQ", "S", "T_q"), "i32")
_FACTORS = {"factor": "fp32", "log2_factor": "fp32"}
_SYNC = (r"mma\.sync\S*\.s32\.s8\.s8", r"mma\.sync\S*\.bf16")
_PRODUCTS = {
    80: _SYNC,
    90: (r"wgmma\S*\.s32\.s8\.s8", r"wgmma\S*\.bf16"),
    100: (r"tcgen05\.mma\S*kind::i8|" + _SYNC[0], r"tcgen05\.mma\S*kind::f16|" + _SYNC[1]),
    120: _SYNC,
}


def _cases(
    suffix: str,
    packed: bool,
    stages: int,
    chips: tuple[int, ...],
    spills: tuple[int, int],
    padded: int = 128,
    rows: tuple[int, int] = (128, 128),
    centred: bool = False,
) -> list[AotCase]:
    """Both kernels: with a scale for each row (and smoothed Q if ``centred``), or causal, packed and with a scale for
    each tile. ``spills`` and ``rows`` are of the kernel of the keys, and of that of the queries."""
    fixed = {
        "DP": padded,
        "PADDED": False,
        "HARDWARE": True,
        "v_stride_d": 1,
        "do_stride_d": 1,
        "QUERIES": 64,
    }
    fixed |= {"CAUSAL": packed, "PACKED": packed, "PER_TILE": packed}
    of_keys = {"q8t": "*i8", "do8t": "*i8", "do_scale": "*fp32", "d_k": "*bf16", "d_v": "*bf16", "T_k": "i32"}
    of_queries = {"k8t": "*i8", "d_q": "*bf16", "TILES": "i32"}
    means = {"correction": "*fp32", "q_mean": "*fp32"}
    fixed |= {"MEAN_OF": QUERY_BLOCK if centred else 0}
    cu, lse = {"cu_q": "*i32", "cu_k": "*i32"}, {"row_d_lse": "*fp32", "k_mean": "*fp32"}
    jobs = (
        ("keys", sagebwd_keys_kernel, of_keys, cu, {"BLOCK": 128, "ROWS": rows[0]}),
        (
            "queries",
            sagebwd_queries_kernel,
            of_queries,
            {**cu, **lse},
            {"KEYS": 128, "LSE_GRADIENT": packed, "ROWS": rows[1]},
        ),
    )
    cases = []
    for (name, kernel, own, optional, constants), bound in zip(jobs, spills, strict=True):
        of_means = {name: kind for name, kind in means.items() if name in kernel.arg_names}
        given = {**(optional if packed else {}), **(of_means if centred else {})}
        signature = {**_POINTERS, **own, **_STRIDES, **_SIZES, **_FACTORS, **given}
        absent = dict.fromkeys(name for name in {**optional, **of_means} if name not in given)
        cases.append(
            AotCase(
                name=f"sagebwd_{name}{suffix}",
                kernel=kernel,
                signature=signature,
                constexprs={**fixed, **constants, **absent},
                instructions={chip: _PRODUCTS[chip] if max(rows) >= 64 else _SYNC for chip in chips},
                num_warps=8,
                num_stages=stages,
                aligned=tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name),
                spills=bound,
            )
        )
    return cases


def aot_cases() -> list[AotCase]:
    """Both kernels for each chip, at head size 128 (the shared memory of the last chip holds one stage) and at 256, as
    ``triton_host.backward_launch`` starts them."""
    cases = _cases("", False, 2, (80, 90), (350, 130))
    cases += _cases("_tile_causal_packed", True, 2, (90, 100), (1300, 750))
    cases += _cases("_one_stage", False, 1, (120,), (400, 220))
    cases += _cases("_centred", False, 2, (80, 90), (450, 130), centred=True)
    return cases + _cases("_256", False, 1, (80, 90, 100, 120), (0, 400), padded=256, rows=(32, 32))
