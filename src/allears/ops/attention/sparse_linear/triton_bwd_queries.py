"""Backward of sparse-linear attention in Triton: the kernels that keep a block of queries.

Written with e = dO, a the ratio, O = a O_s + (1 - a) O_l. Of the linear branch, with phi = phi(q), H and Z the sums of
the states of a query block's key blocks, and den = phi . Z:

    T = e H^T,  x = rowsum(e * O_l) = rowsum(phi * T) / den,  d phi = (1 - a) (T - x Z) / den
    dH = ((1 - a) phi / den)^T e,  dZ = -((1 - a) phi / den)^T x

so that O_l itself is never made. Of the softmax branch, with P the probabilities and s = rowsum(e * O_s):

    dS = a P (e V^T - s),  s = (rowsum(e * O) - (1 - a) x) / a,  d a = s - x

a goes into the logarithm of P's row sum, and the kernels of the softmax branch need not know it: ``row_lse`` is the
log-sum-exp in base 2 less log2(a), infinite for a row without keys, and ``row_shift`` is s. Where O_s and O_l are
results of their own (form "sla") each has its e, and a is 1 in the one and 0 in the other.

Shapes: E batch entries or packed sequences, L_q queries, L_k keys, T_q queries in memory (packed: of all sequences; E
is 1 in their place), H query heads, G key heads, D head size, DP = D padded, N_q query blocks, R width of row lists.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_nvfp4_quant import e4m3_code, e4m3_value
from allears.ops.attention.lowbit.triton_quant import inverse_of, largest, scale_of, to_int8
from allears.ops.attention.sparse_linear.triton_pool import entry_rows
from allears.ops.attention.sparse_linear.triton_states import feature_stats, feature_values


@triton.jit
def feature_gradient(d_phi, x, phi, inner, MAP: tl.constexpr):
    """The gradient of x from that of its features; ``inner`` (rows) is rowsum(phi * d_phi), read by softmax alone."""
    if MAP == "softmax":
        return phi * (d_phi - inner)
    if MAP == "elu":
        return d_phi * tl.where(x > 0.0, 1.0, phi)
    return tl.where(x > 0.0, d_phi, 0.0)


@triton.jit
def load_tile(x, row, channel, stride_l, stride_d, LENGTH, D, PADDED: tl.constexpr):
    """(rows, channels) in the dtype of x, 0 beyond LENGTH and (if PADDED) D."""
    at = x + row.to(tl.int64)[:, None] * stride_l + channel[None, :] * stride_d
    if PADDED:
        return tl.load(at, mask=(row < LENGTH)[:, None] & (channel < D)[None, :], other=0.0)
    return tl.load(at, mask=(row < LENGTH)[:, None], other=0.0)


@triton.jit
def load_channels(x, channel, D, PADDED: tl.constexpr):
    """Numbers of channels, 0 beyond D."""
    if PADDED:
        return tl.load(x + channel, mask=channel < D, other=0.0)
    return tl.load(x + channel)


@triton.jit
def _slice(
    q,
    errors,
    state,
    row,
    feature,
    channel,
    stride_l,
    stride_d,
    top,
    inverse,
    L_q,
    D,
    DP: tl.constexpr,
    MAP: tl.constexpr,
    PADDED: tl.constexpr,
):
    """q, phi(q) and T (rows, features), float32, of a slice of the features."""
    x = load_tile(q, row, feature, stride_l, stride_d, L_q, D, PADDED).to(tl.float32)
    of_slice = tl.load(state + feature[:, None] * DP + channel[None, :])
    phi = feature_values(x, top, inverse, feature, D, MAP)
    return x, phi, tl.dot(errors, tl.trans(of_slice), input_precision="tf32x3")


@triton.jit(do_not_specialize=["L_q", "H", "N_q", "T_q", "first"])
def linear_queries_kernel(
    q,
    d_out,
    out,
    lse,
    ratio,
    states,
    d_q,
    d_ratio,
    row_shift,
    row_lse,
    cu_q,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    q_stride_d,
    do_stride_b,
    do_stride_l,
    do_stride_h,
    do_stride_d,
    L_q,
    H,
    D,
    N_q,
    T_q,
    first,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    DP: tl.constexpr,
    MAP: tl.constexpr,
    MIX: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
):
    """A query block of a head, of a group of heads from ``first`` of all E * H: the linear branch's d_q (E, T_q, H, D).

    states (heads of the group, N_q, DP + 1, DP): H and Z, means of states in place of their sums, over which their
    gradients are written. MIX (form "sla2"): ratio (E, H, N_q) float32 gives d_ratio, and out (E, T_q, H, D) and lse
    (E, H, T_q) give row_shift and row_lse (E, H, T_q). Without it a is 0 and these are left alone. d_q and out are
    contiguous.
    """
    block = tl.program_id(0) % N_q
    local = (tl.program_id(0) // N_q).to(tl.int64)
    head = first + local
    entry, h = head // H, head % H
    b, base, length = entry_rows(cu_q, entry, L_q, PACKED)
    row = block * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    at_q = q + b * q_stride_b + h * q_stride_h + base * q_stride_l
    at_do = d_out + b * do_stride_b + h * do_stride_h + base * do_stride_l
    state = states + (local * N_q + block) * ((DP + 1) * DP)
    to = ((b * T_q + base + row) * H + h)[:, None] * D

    whole = load_tile(at_q, row, channel, q_stride_l, q_stride_d, length, D, PADDED).to(tl.float32)
    top, inverse = feature_stats(whole, channel, D, MAP)
    errors = load_tile(at_do, row, channel, do_stride_l, do_stride_d, length, D, PADDED)
    inside = row < length
    given, phi, t = whole, whole, whole
    a, s, mixed = 0.0, 0.0, True
    if MIX:
        made = tl.load(out + to + channel[None, :], mask=inside[:, None] & (channel < D)[None, :], other=0.0)
        s = tl.sum(made.to(tl.float32) * errors.to(tl.float32), 1)
        mixed = tl.max(tl.load(state + DP * DP + channel).to(tl.float32), 0) > 0.0
    den = tl.zeros((ROWS,), tl.float32)
    x = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, DP, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        given, phi, t = _slice(
            at_q, errors, state, row, feature, channel, q_stride_l, q_stride_d, top, inverse, length, D, DP, MAP, PADDED
        )
        den += tl.sum(phi * tl.load(state + DP * DP + feature).to(tl.float32)[None, :], 1)
        x += tl.sum(phi * t, 1)
    inverse_den = tl.where(den > 0.0, 1.0 / tl.where(den > 0.0, den, 1.0), 0.0)
    x *= inverse_den
    factor = inverse_den
    if MIX:
        a = tl.load(ratio + head * N_q + block)
        factor *= 1.0 - a
    for start in tl.static_range(0, DP, FEATURES):
        feature = start + tl.arange(0, FEATURES)
        if FEATURES < DP:
            given, phi, t = _slice(
                at_q,
                errors,
                state,
                row,
                feature,
                channel,
                q_stride_l,
                q_stride_d,
                top,
                inverse,
                length,
                D,
                DP,
                MAP,
                PADDED,
            )
        total = tl.load(state + DP * DP + feature).to(tl.float32)
        d_phi = (t - x[:, None] * total[None, :]) * factor[:, None]
        # A factor on phi changes nothing in O_l, so that rowsum(phi * d phi), which softmax takes off, is 0.
        d_given = feature_gradient(d_phi, given, phi, 0.0, MAP)
        stored = inside[:, None] & (feature < D)[None, :]
        tl.store(d_q + to + feature[None, :], d_given.to(d_q.dtype.element_ty), mask=stored)
        weights = phi * factor[:, None]
        d_total = tl.sum(weights * -x[:, None], 0)
        product = tl.dot(tl.trans(weights.to(errors.dtype)), errors, input_precision="tf32x3")
        tl.debug_barrier()  # these features of H and Z are read
        tl.store(state + DP * DP + feature, d_total.to(states.dtype.element_ty))
        tl.store(state + feature[:, None] * DP + channel[None, :], product.to(states.dtype.element_ty))
    if MIX:
        # A block with an empty linear branch, whose Z is 0, is O_s, whatever the ratio.
        a = tl.where(mixed, a, 1.0)
        s -= (1.0 - a) * x
        s = tl.where(a > 0.0, s / tl.where(a > 0.0, a, 1.0), 0.0)
        at = (b * H + h) * T_q + base + row
        natural = tl.load(lse + at, mask=inside, other=float("-inf"))
        log2_sum = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634 - tl.log2(a))
        tl.store(row_shift + at, s, mask=inside)
        tl.store(row_lse + at, log2_sum, mask=inside)
        d_a = tl.sum(tl.where(inside, s - x, 0.0), 0)
        tl.store(d_ratio + head * N_q + block, tl.where(mixed, d_a, 0.0))


@triton.jit
def int8_rows(x, HARDWARE: tl.constexpr):
    """INT8 of rows (rows, channels), as a forward with ``int8_fp8`` has them, over 128 and in the dtype of x, and their
    scales: within +-1, so that what is multiplied with a scale stays in the range of float16."""
    wide = x.to(tl.float32)
    scale = scale_of(largest(wide, 1, HARDWARE), 127.0)
    return (to_int8(wide, inverse_of(scale)[:, None]).to(tl.float32) * 0.0078125).to(x.dtype), scale * 128.0


@triton.jit
def int8_keys(x, mean, key, LENGTH, SMOOTH: tl.constexpr, HARDWARE: tl.constexpr):
    """INT8 of a block of keys less their mean (channels), likewise, and its one scale."""
    wide = x.to(tl.float32)
    if SMOOTH:
        wide = tl.where((key < LENGTH)[:, None], wide - mean[None, :], 0.0)
    scale = scale_of(largest(largest(wide, 1, HARDWARE), 0, HARDWARE), 127.0)
    return (to_int8(wide, inverse_of(scale)).to(tl.float32) * 0.0078125).to(x.dtype), scale * 128.0


@triton.jit
def e4m3_values(x, HARDWARE: tl.constexpr):
    """E4M3 of a block of values, in the dtype of x, and its one scale."""
    wide = x.to(tl.float32)
    scale = scale_of(largest(largest(wide, 1, HARDWARE), 0, HARDWARE), 448.0)
    scaled = wide * inverse_of(scale)
    size = e4m3_value(e4m3_code(tl.abs(scaled)))
    return tl.where(scaled < 0.0, -size, size).to(x.dtype), scale


@triton.jit
def _probabilities(
    queries,
    errors,
    row_factor,
    log2_sum,
    last_key,
    centre,
    k,
    v,
    k_stride_l,
    k_stride_d,
    v_stride_l,
    v_stride_d,
    block,
    L_k,
    D,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    MASKED: tl.constexpr,
    MATCHED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PADDED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """P and e V^T (rows, KEYS) of a tile of queries and a block of keys, the keys as multiplied, and their scale."""
    key = block * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    keys = load_tile(k, key, channel, k_stride_l, k_stride_d, L_k, D, PADDED)
    scale = 1.0
    if MATCHED:
        keys, scale = int8_keys(keys, centre, key, L_k, SMOOTH, HARDWARE)
    s = tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
    p = tl.exp2(s * (row_factor * scale)[:, None] - log2_sum[:, None])
    if MASKED:
        p = tl.where(key[None, :] <= last_key[:, None], p, 0.0)
    values = load_tile(v, key, channel, v_stride_l, v_stride_d, L_k, D, PADDED)
    if MATCHED:
        values, v_scale = e4m3_values(values, HARDWARE)
        return p, tl.dot(errors, tl.trans(values), input_precision="tf32x3") * v_scale, keys, scale
    return p, tl.dot(errors, tl.trans(values), input_precision="tf32x3"), keys, scale


@triton.jit(do_not_specialize=["L_q", "L_k", "H", "G", "N_q", "R", "T_q"])
def sparse_queries_kernel(
    q,
    k,
    v,
    d_out,
    out,
    lse,
    k_mean,
    rows,
    count,
    d_q,
    row_shift,
    row_lse,
    leaks,
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
    R,
    T_q,
    factor,
    log2_factor,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    ADDED: tl.constexpr,
    MATCHED: tl.constexpr,
    SMOOTH: tl.constexpr,
    LEAKY: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ROWS queries of a query block of a head: d_q (E, T_q, H, D), contiguous, to which ADDED adds.

    rows (E, H, N_q, R) and count (E, H, N_q). OWN: row_shift and row_lse (E, H, T_q) are made here from out and lse,
    else they are read. MATCHED: operands are rounded as in the forward (SMOOTH: k less k_mean (E, G, D)), and both are
    made, or made again, of these. LEAKY: rows of dS that do not sum to 0, as P is not quite the forward's, meet k less
    k_mean, and leaks (E, H, tiles, D) becomes what they would add to the gradient of -k_mean.
    """
    tiles = N_q * (BLOCK_Q // ROWS)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    if CAUSAL:
        tile = tiles - 1 - tile
    entry, h = head // H, head % H
    g = h // (H // G)
    block = tile // (BLOCK_Q // ROWS)
    b, base, length = entry_rows(cu_q, entry, L_q, PACKED)
    b_k, key_base, keys = entry_rows(cu_k, entry, L_k, PACKED)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    inside = row < length
    at_q = q + b * q_stride_b + h * q_stride_h + base * q_stride_l
    at_do = d_out + b * do_stride_b + h * do_stride_h + base * do_stride_l
    at_k = k + b_k * k_stride_b + g * k_stride_h + key_base * k_stride_l
    at_v = v + b_k * v_stride_b + g * v_stride_h + key_base * v_stride_l
    listed = rows + (head * N_q + block) * R
    end = tl.load(count + head * N_q + block)
    at = (b * H + h) * T_q + base + row
    to = ((b * T_q + base + row) * H + h)[:, None] * D + channel[None, :]
    stored = inside[:, None] & (channel < D)[None, :]

    queries = load_tile(at_q, row, channel, q_stride_l, q_stride_d, length, D, PADDED)
    errors = load_tile(at_do, row, channel, do_stride_l, do_stride_d, length, D, PADDED)
    if OWN:
        natural = tl.load(lse + at, mask=inside, other=float("-inf"))
        log2_sum = tl.where(natural == float("-inf"), float("inf"), natural * 1.4426950408889634)
        shift = tl.sum(tl.load(out + to, mask=stored, other=0.0).to(tl.float32) * errors.to(tl.float32), 1)
    else:
        log2_sum = tl.load(row_lse + at, mask=inside, other=float("inf"))
        shift = tl.load(row_shift + at, mask=inside, other=0.0)
    row_factor = tl.zeros((ROWS,), tl.float32) + log2_factor
    centre = 0.0
    if MATCHED:
        if SMOOTH:
            centre = load_channels(k_mean + (entry * G + g) * D, channel, D, PADDED)
            log2_sum -= tl.sum(queries.to(tl.float32) * centre[None, :], 1) * log2_factor
        queries, q_scale = int8_rows(queries, HARDWARE)
        row_factor *= q_scale

    # Blocks that some row does not see in full come last in the list; with those before them nothing is masked.
    last_key = tl.zeros((ROWS,), tl.int32) + keys - 1
    full = keys // BLOCK_K
    if CAUSAL:
        last_key = tl.minimum(last_key, row + keys - length)
        full = tl.minimum(full, tl.maximum(tile * ROWS + 1 + keys - length, 0) // BLOCK_K)
    tail = end - 8 + tl.arange(0, 8)
    cut = tl.load(listed + tail, mask=tail >= 0, other=-1) >= full
    plain_end = end - tl.sum(cut.to(tl.int32), 0)

    if MATCHED:
        sums = tl.zeros((ROWS,), tl.float32)
        weighted = tl.zeros((ROWS,), tl.float32)
        for n in range(0, end):
            p, d_p, tile_keys, scale = _probabilities(
                queries,
                errors,
                row_factor,
                log2_sum,
                last_key,
                centre,
                at_k,
                at_v,
                k_stride_l,
                k_stride_d,
                v_stride_l,
                v_stride_d,
                tl.load(listed + n),
                keys,
                D,
                BLOCK_K,
                DP,
                True,
                MATCHED,
                SMOOTH,
                PADDED,
                HARDWARE,
            )
            sums += tl.sum(p, 1)
            weighted += tl.sum(p * d_p, 1)
        shift = tl.where(sums > 0.0, weighted / tl.where(sums > 0.0, sums, 1.0), 0.0)
    if OWN or MATCHED:
        tl.store(row_shift + at, shift, mask=inside)
        tl.store(row_lse + at, log2_sum, mask=inside)

    total = tl.zeros((ROWS, DP), tl.float32)
    leak = tl.zeros((ROWS,), tl.float32)
    for masked in tl.static_range(2):
        begin = plain_end if masked else 0
        stop = end if masked else plain_end
        following = tl.load(listed + begin, mask=begin < stop, other=0)
        for n in range(begin, stop):
            this = following
            following = tl.load(listed + n + 1, mask=n + 1 < stop, other=0)
            p, d_p, tile_keys, scale = _probabilities(
                queries,
                errors,
                row_factor,
                log2_sum,
                last_key,
                centre,
                at_k,
                at_v,
                k_stride_l,
                k_stride_d,
                v_stride_l,
                v_stride_d,
                this,
                keys,
                D,
                BLOCK_K,
                DP,
                masked == 1,
                MATCHED,
                SMOOTH,
                PADDED,
                HARDWARE,
            )
            d_s = (p * (d_p - shift[:, None])).to(tile_keys.dtype)
            if LEAKY:
                leak += tl.sum(d_s.to(tl.float32), 1)
            if MATCHED:
                total += tl.dot(d_s, tile_keys, input_precision="tf32x3") * scale
            else:
                total = tl.dot(d_s, tile_keys, total, input_precision="tf32x3")
    if LEAKY:
        centre = load_channels(k_mean + (entry * G + g) * D, channel, D, PADDED)
        total -= leak[:, None] * centre[None, :]
        leaking = tl.sum(queries.to(tl.float32) * (leak * factor)[:, None], 0)
        tl.store(leaks + (head * tiles + tile) * D + channel, leaking, mask=channel < D)
    total *= factor
    if ADDED:
        total += tl.load(d_q + to, mask=stored, other=0.0).to(tl.float32)
    tl.store(d_q + to, total.to(d_q.dtype.element_ty), mask=stored)


_SYNC = r"mma\.sync\S*\.bf16"
_PRODUCTS = {80: _SYNC, 90: r"wgmma\S*\.bf16", 100: r"tcgen05\.mma\S*kind::f16", 120: _SYNC}
_NARROW = ("q", "k", "v", "d_out", "out", "states", "d_states", "d_q", "d_k", "d_v")
_INTEGERS = ("rows", "count", "lengths", "cu_q", "cu_k")
_WIDE = ("lse", "ratio", "k_mean", "row_shift", "row_lse", "d_ratio", "leaks", "d_means", "d_mean")
_KINDS = dict.fromkeys(_NARROW, "*bf16") | dict.fromkeys(_INTEGERS, "*i32") | dict.fromkeys(_WIDE, "*fp32")
_KINDS |= {"index": "*i16", "order": "*i64", "factor": "fp32", "log2_factor": "fp32"}


def backward_case(
    name: str, kernel: Any, chips: tuple[int, ...], warps: int, stages: int, spills: int, constants: Mapping[str, Any]
) -> AotCase:
    """A kernel of the backward for bfloat16 at head size 128; an argument that is not in ``constants`` is given.

    ``spills``: bytes of local memory that it may take.
    """
    fixed = {"DP": 128, "PADDED": False, **constants}
    fixed |= {argument: 1 for argument in kernel.arg_names if argument.endswith("_stride_d")}
    if not constants["PACKED"]:
        fixed |= {argument: None for argument in ("cu_q", "cu_k") if argument in kernel.arg_names}
    signature = {argument: _KINDS.get(argument, "i32") for argument in kernel.arg_names if argument not in fixed}
    aligned = [n for n, kind in signature.items() if (kind[0] == "*" and n[:2] != "cu") or "_stride_" in n or n == "D"]
    products = {chip: (_PRODUCTS[chip],) for chip in chips}
    return AotCase(name, kernel, signature, fixed, products, warps, stages, tuple(aligned), spills)


def aot_cases() -> list[AotCase]:
    """The softmax branch in the form "sla2", of 8-bit forwards, and as the only branch, causal and packed; the linear
    branch. What the latter spills it spills once, as it has no loop."""
    base = {"ROWS": 128, "BLOCK_Q": 128, "BLOCK_K": 64, "CAUSAL": False, "OWN": False, "ADDED": True, "MATCHED": False}
    base |= {"SMOOTH": True, "LEAKY": False, "PACKED": False, "HARDWARE": True}
    alone = {"CAUSAL": True, "OWN": True, "ADDED": False, "SMOOTH": False, "PACKED": True, "leaks": None}
    linear = {"ROWS": 128, "FEATURES": 128, "MAP": "softmax", "MIX": True, "PACKED": False}

    def sparse(suffix: str, chips: tuple[int, ...], warps: int, stages: int, **changes: Any) -> AotCase:
        changes = {**changes, **({} if changes.get("LEAKY") else {"leaks": None})}
        name = f"sparse_linear_bwd_queries{suffix}"
        return backward_case(
            name, sparse_queries_kernel, chips, warps, stages, 48 if suffix else 0, {**base, **changes}
        )

    return [
        sparse("", (90, 100), 8, 3),
        sparse("_ampere", (80,), 8, 3),
        sparse("_small", (120,), 4, 2, ROWS=64),
        sparse("_drop_in", (90,), 8, 3, LEAKY=True),
        sparse("_matched", (90,), 8, 1, MATCHED=True),
        sparse("_causal_packed", (90,), 8, 3, **alone),
        backward_case("sparse_linear_bwd_of_states", linear_queries_kernel, (80, 90, 100, 120), 8, 1, 1100, linear),
    ]
