"""States of the linear branch in Triton: h_j = phi(k'_j)^T v_j and z_j = phi(k'_j)^T 1 of each key block, and which of
them each query block adds up.

The forward keeps a state as one matrix of DP + 1 rows, h_j / 64 and below it z_j / 64. All sums of states are then one
batched matrix product ``weights @ states``, with weights 2^-m for the n blocks of a query block's linear branch, 2^m >=
n: means instead of sums, so that float16 holds them, and a quotient phi(q) H / (phi(q) . Z) that is the same. Beside
that, the INT8 copy of k' and the E4M3 copy of v with one scale for each key block and head, each block of v transposed
and in the order of ``triton_quant.token_order``.

Everything is made for a group of *units*: a unit is a key head of an entry (of a batch, or a packed sequence), numbered
entry * G + head, and has H / G query heads, which are numbered likewise.

Shapes: E entries, L_q, L_k rows of an entry (packed: T rows of all sequences), H query heads, G key heads, D head size,
DP = D padded to 32, 64, 128 or 256, N_q and N_k blocks of the longest sequence, N_P = N_k padded to a multiple of 16, R
width of the row lists; U units of a group, U_H = U * H / G heads.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_nvfp4_quant import e4m3_code
from allears.ops.attention.lowbit.triton_quant import (
    inverse_of,
    largest,
    load_rows,
    scale_of,
    to_int8,
    token_order,
)
from allears.ops.attention.sparse_linear.triton_pool import entry_rows
from allears.ops.attention.sparse_linear.triton_router import block_sight


@triton.jit
def feature_stats(x, channel, D, MAP: tl.constexpr):
    """What :func:`feature_values` needs of whole rows of x (rows, DP) float32, for the softmax: their maximum, and the
    inverse of the sum of their exponentials."""
    top = tl.zeros((x.shape[0],), tl.float32)
    inverse = top + 1.0
    if MAP == "softmax":
        x = tl.where((channel < D)[None, :], x, float("-inf"))
        top = tl.max(x, axis=1)
        inverse = 1.0 / tl.sum(tl.exp2((x - top[:, None]) * 1.4426950408889634), axis=1)
    return top, inverse


@triton.jit
def feature_values(x, top, inverse, channel, D, MAP: tl.constexpr):
    """phi(x) of some channels (rows, channels), float32, 0 beyond D."""
    if MAP == "softmax":
        values = tl.exp2((x - top[:, None]) * 1.4426950408889634) * inverse[:, None]
    elif MAP == "elu":
        values = tl.where(x > 0.0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634))
    else:
        values = tl.maximum(x, 0.0) + 1e-6
    return tl.where((channel < D)[None, :], values, 0.0)


@triton.jit
def centred_keys(k, mean, token, channel, stride_l, stride_d, length, D, CENTRED: tl.constexpr):
    """k' (tokens, DP) float32 of a head, less ``mean`` (D) if CENTRED, 0 beyond its tokens and channels."""
    keys = load_rows(k, token, channel, stride_l, stride_d, length, D)
    if CENTRED:
        centre = tl.load(mean + channel, mask=channel < D, other=0.0)
        keys = tl.where((token < length)[:, None], keys - centre[None, :], 0.0)
    return keys


@triton.jit
def key_features(keys, token, channel, length, D, MAP: tl.constexpr):
    """phi(k') (tokens, DP) float32 of k' in float32, 0 beyond its tokens and channels."""
    top, inverse = feature_stats(keys, channel, D, MAP)
    return tl.where((token < length)[:, None], feature_values(keys, top, inverse, channel, D, MAP), 0.0)


@triton.jit
def _weights_row(weights, rows, count, linear, head, local_head, block, sight, N_q, N_k, NP, R, LISTED: tl.constexpr):
    """A row of the weights (U_H, N_q, N_P), whose linear branch may take the blocks below ``sight``."""
    at = weights + (local_head * N_q + block) * NP
    column = tl.arange(0, 256)
    row = head * N_q + block
    listed = tl.load(count + row)
    if LISTED:
        linear += row * N_k
        number = 0
        for start in range(0, sight, 256):
            taken = tl.load(linear + start + column, mask=start + column < sight, other=0) != 0
            number += tl.sum(taken.to(tl.int32), axis=0)
    else:
        number = sight
        for start in range(0, listed, 256):
            taken = tl.load(rows + row * R + start + column, mask=start + column < listed, other=sight)
            number -= tl.sum((taken < sight).to(tl.int32), axis=0)
    one = tl.exp2(-tl.ceil(tl.log2(tl.maximum(number, 1).to(tl.float32))))
    for start in range(0, NP, 256):
        taken = start + column < sight
        if LISTED:
            taken = tl.load(linear + start + column, mask=taken, other=0) != 0
        tl.store(at + start + column, tl.where(taken, one, 0.0).to(weights.dtype.element_ty), mask=start + column < NP)
    if not LISTED:
        tl.debug_barrier()  # the ones are there before zeros go over them
        for start in range(0, listed, 256):
            inside = start + column < listed
            taken = tl.load(rows + row * R + start + column, mask=inside, other=0)
            zero = tl.zeros((256,), tl.float32).to(weights.dtype.element_ty)
            tl.store(at + taken, zero, mask=inside & (taken >= 0) & (taken < NP))


@triton.jit
def _quantise_block(
    keys,
    v,
    k8,
    k_scale,
    v8,
    v_scale,
    at,
    start,
    stride_l,
    stride_d,
    length,
    D,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Key block ``at`` of the copies: k' in INT8 (tokens, DP), and v in E4M3 (DP, tokens)."""
    if tl.program_id(1) == 0:
        token = tl.arange(0, BLOCK)
        channel = tl.arange(0, DP)
        scale = scale_of(largest(largest(keys, 1, HARDWARE), 0, HARDWARE), 127.0)
        tl.store(k_scale + at, scale)
        eight = to_int8(keys, inverse_of(scale))
        tl.store(k8 + at * (BLOCK * DP) + token[:, None] * DP + channel[None, :], eight)
        values = load_rows(v, start + token_order(token), channel, stride_l, stride_d, length, D)
        scale = scale_of(largest(largest(values, 1, HARDWARE), 0, HARDWARE), 448.0)
        tl.store(v_scale + at, scale)
        inverse = inverse_of(scale)
        scaled = tl.where(inverse == 0.0, 0.0, values * inverse)
        code = e4m3_code(tl.abs(scaled)) | tl.where(scaled.to(tl.int32, bitcast=True) < 0, 128, 0)
        tl.store(v8 + at * (BLOCK * DP) + channel[:, None] * BLOCK + token[None, :], tl.trans(code.to(tl.uint8)))


@triton.jit(do_not_specialize=["L_q", "L_k", "H", "G", "N_q", "N_k", "NP", "R", "first", "units"])
def prepare_units_kernel(
    k,
    v,
    mean,
    rows,
    count,
    linear,
    cu_q,
    cu_k,
    states,
    weights,
    k8,
    k_scale,
    v8,
    v_scale,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    L_q,
    L_k,
    H,
    G,
    D,
    N_q,
    N_k,
    NP,
    R,
    first,
    units,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DP: tl.constexpr,
    COLUMNS: tl.constexpr,
    MAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRED: tl.constexpr,
    LISTED: tl.constexpr,
    STATES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    QUANTISE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Units ``first`` to ``first + units``. The first units * N_P programs take a key block.

    STATES: states (U, N_P, DP + 1, DP), COLUMNS of their columns a program along the second grid axis. QUANTISE: k8 (U,
    N_P, BLOCK_K, DP), v8 (U, N_P, DP, BLOCK_K), scales (U, N_P). WEIGHTS: as many programs as the group has query
    blocks follow, for weights (U_H, N_q, N_P). mean (E, G, D) with CENTRED; linear (E, H, N_q, N_k) bytes with LISTED.
    """
    program = tl.program_id(0)
    if program < units * NP:
        block = program % NP
        local = (program // NP).to(tl.int64)
        entry, g = (first + local) // G, (first + local) % G
        place, base, length = entry_rows(cu_k, entry, L_k, PACKED)
        start = block * BLOCK_K
        token = tl.arange(0, BLOCK_K)
        channel = tl.arange(0, DP)
        k += place * k_stride_b + g * k_stride_h + base * k_stride_l
        v += place * v_stride_b + g * v_stride_h + base * v_stride_l
        at = local * NP + block
        if CENTRED:
            mean += (entry * G + g) * D
        keys = centred_keys(k, mean, start + token, channel, k_stride_l, k_stride_d, length, D, CENTRED)
        if STATES:
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            features = key_features(keys, start + token, channel, length, D, MAP).to(states.dtype.element_ty)
            inside = (start + token < length)[:, None] & (column < D)[None, :]
            at_v = v + (start + token).to(tl.int64)[:, None] * v_stride_l + column[None, :] * v_stride_d
            values = tl.load(at_v, mask=inside, other=0.0)
            state = tl.dot(tl.trans(features), values, input_precision="tf32x3") * (1.0 / BLOCK_K)
            states += at * ((DP + 1) * DP)
            tl.store(states + channel[:, None] * DP + column[None, :], state.to(states.dtype.element_ty))
            if tl.program_id(1) == 0:
                total = tl.sum(features.to(tl.float32), axis=0) * (1.0 / BLOCK_K)
                tl.store(states + DP * DP + channel, total.to(states.dtype.element_ty))
        if QUANTISE:
            _quantise_block(
                keys,
                v,
                k8,
                k_scale,
                v8,
                v_scale,
                at,
                start,
                v_stride_l,
                v_stride_d,
                length,
                D,
                BLOCK_K,
                DP,
                HARDWARE,
            )
    elif WEIGHTS:
        program -= units * NP
        block = program % N_q
        local = (program // N_q).to(tl.int64)
        head = first.to(tl.int64) * (H // G) + local
        entry = head // H
        _, _, length_q = entry_rows(cu_q, entry, L_q, PACKED)
        _, _, length_k = entry_rows(cu_k, entry, L_k, PACKED)
        _, full, _ = block_sight(block * BLOCK_Q, length_q, length_k, BLOCK_Q, BLOCK_K, CAUSAL)
        if tl.program_id(1) == 0:
            _weights_row(weights, rows, count, linear, head, local, block, full, N_q, N_k, NP, R, LISTED)


_SYNC = r"mma\.sync\S*\.bf16"
_PRODUCT = {80: (_SYNC,), 90: (r"wgmma\S*\.bf16",), 100: (r"tcgen05\.mma\S*kind::f16",), 120: (_SYNC,)}


def _case(name: str, chips: tuple[int, ...], **changes) -> AotCase:
    """The kernel for bfloat16 at head size 128."""
    constants = {
        "BLOCK_Q": 128,
        "BLOCK_K": 64,
        "DP": 128,
        "COLUMNS": 128,
        "MAP": "softmax",
        "CAUSAL": False,
        "PACKED": False,
        "CENTRED": True,
        "LISTED": False,
        "STATES": True,
        "WEIGHTS": True,
        "QUANTISE": False,
        "HARDWARE": True,
        "k_stride_d": 1,
        "v_stride_d": 1,
        **changes,
    }
    kinds = {"k": "*bf16", "v": "*bf16", "mean": "*fp32", "rows": "*i32", "count": "*i32", "linear": "*u8"}
    kinds |= {
        "cu_q": "*i32",
        "cu_k": "*i32",
        "states": "*bf16",
        "sums": "*bf16",
        "weights": "*bf16",
        "k8": "*i8",
        "k_scale": "*fp32",
    }
    kinds |= {"v8": "*u8", "v_scale": "*fp32"}
    absent = [
        *(() if constants["CENTRED"] else ("mean",)),
        *(() if constants["LISTED"] else ("linear",)),
        *(() if constants["PACKED"] else ("cu_q", "cu_k")),
        *(() if constants["STATES"] else ("states", "weights")),
        *(() if constants["QUANTISE"] else ("k8", "k_scale", "v8", "v_scale")),
    ]
    constants |= dict.fromkeys(absent)
    arguments = [name for name in prepare_units_kernel.arg_names if name not in constants]
    signature = {name: kinds.get(name, "i32") for name in arguments}
    aligned = tuple(
        n for n, kind in signature.items() if (kind.startswith("*") and n[:2] != "cu") or "stride" in n or n == "D"
    )
    products = {chip: _PRODUCT[chip] if constants["STATES"] else () for chip in chips}
    return AotCase(name, prepare_units_kernel, signature, constants, products, num_warps=8, aligned=aligned)


def aot_cases() -> list[AotCase]:
    """States alone, with the quantised copies beside them (in one way dense, in one packed and causal), and the copies
    alone."""
    causal = {"CAUSAL": True, "PACKED": True, "CENTRED": False, "LISTED": True, "MAP": "elu"}
    return [
        _case("sparse_linear_states", (80, 90, 100, 120)),
        _case("sparse_linear_states_causal", (90,), **causal),
        _case("sparse_linear_states_int8_fp8", (90, 120), QUANTISE=True),
        _case("sparse_linear_int8_fp8", (90,), QUANTISE=True, STATES=False, WEIGHTS=False),
    ]
