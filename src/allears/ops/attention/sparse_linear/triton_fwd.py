"""Forward of sparse-linear attention in Triton: a softmax over the listed key blocks, then linear attention by the sums
of states that are there already, and the mixture of both.

A program takes ROWS queries of a query block and walks through that block's list. The lists rise, so that the key
blocks that need a mask (cut by the diagonal, or by the end of the keys) are the last ones; the others run without. In
``int8_fp8`` numerics a key block goes through the tile of ``lowbit/triton_fwd.py``. The README has the equations.

Shapes: E batch entries or packed sequences, L_q, L_k rows of an entry (packed: T_q, T_k rows of all; else T_q = L_q), H
query heads, G key heads, D head size, DP = D padded, N_q query blocks, N_P key blocks padded, R width of the row lists;
a group has U units of key heads and U_H = U * H / G heads, see ``triton_states.py``.
"""

from typing import Any

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_fwd import int8_tile
from allears.ops.attention.lowbit.triton_quant import inverse_of, largest, load_rows, scale_of, to_int8
from allears.ops.attention.sparse_linear.triton_pool import entry_rows
from allears.ops.attention.sparse_linear.triton_states import feature_values


@triton.jit
def _exact_tile(
    acc,
    row_sum,
    row_max,
    queries,
    last_key,
    start,
    k,
    v,
    k_stride_l,
    k_stride_d,
    v_stride_l,
    v_stride_d,
    keys,
    D,
    log2_factor,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A key block: the state of the online softmax, brought up to date."""
    column = tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    at_k = k + start.to(tl.int64) * k_stride_l + (column[:, None] * k_stride_l + channel[None, :] * k_stride_d)
    at_v = v + start.to(tl.int64) * v_stride_l + (column[:, None] * v_stride_l + channel[None, :] * v_stride_d)
    if MASKED:
        inside = (start + column < keys)[:, None] & (channel < D)[None, :]
        of_keys = tl.load(at_k, mask=inside, other=0.0)
        values = tl.load(at_v, mask=inside, other=0.0)
    elif PADDED:
        of_keys = tl.load(at_k, mask=(channel < D)[None, :], other=0.0)
        values = tl.load(at_v, mask=(channel < D)[None, :], other=0.0)
    else:
        of_keys = tl.load(at_k)
        values = tl.load(at_v)
    s = tl.dot(queries, tl.trans(of_keys), input_precision="tf32x3")
    if MASKED:
        s = tl.where((start + column)[None, :] <= last_key[:, None], s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, axis=1) * log2_factor)
    known = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s * log2_factor - known[:, None])
    decay = tl.exp2(row_max - known)
    row_sum = row_sum * decay + tl.sum(p, axis=1)
    acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="tf32x3")
    return acc, row_sum, new_max


@triton.jit
def linear_output(
    q,
    row,
    stride_l,
    stride_d,
    length,
    D,
    states,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    MAP: tl.constexpr,
):
    """phi(q) H (ROWS, DP) and phi(q) . Z (ROWS), float32, of rows of q (L, D) and the states (DP + 1, DP) of H and
    Z, in CHUNK channels of q at a time."""
    channel = tl.arange(0, DP)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if MAP == "softmax":
        for start in tl.static_range(0, DP, CHUNK):
            part = start + tl.arange(0, CHUNK)
            x = load_rows(q, row, part, stride_l, stride_d, length, D)
            x = tl.where((part < D)[None, :], x, float("-inf"))
            known = tl.maximum(top, tl.max(x, axis=1))
            terms = tl.exp2((x - known[:, None]) * 1.4426950408889634)
            total = total * tl.exp2((top - known) * 1.4426950408889634) + tl.sum(terms, axis=1)
            top = known
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    product = tl.zeros((ROWS, DP), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    for start in tl.static_range(0, DP, CHUNK):
        part = start + tl.arange(0, CHUNK)
        x = load_rows(q, row, part, stride_l, stride_d, length, D)
        features = feature_values(x, top, inverse, part, D, MAP).to(states.dtype.element_ty)
        state = tl.load(states + part[:, None] * DP + channel[None, :])
        below = tl.load(states + DP * DP + part).to(tl.float32)
        product = tl.dot(features, state, product, input_precision="tf32x3")
        norm += tl.sum(features.to(tl.float32) * below[None, :], axis=1)
    return product, norm


_SIZES = ["L_q", "L_k", "H", "G", "N_q", "NP", "R", "T_q", "first", "log2_factor"]


@triton.jit(do_not_specialize=_SIZES)
def sparse_linear_forward_kernel(
    q,
    k,
    v,
    mean,
    k_scale,
    v_scale,
    rows,
    count,
    sums,
    ratio,
    weight,
    bias,
    out,
    o_linear,
    lse,
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
    ratio_stride_b,
    ratio_stride_h,
    ratio_stride_n,
    L_q,
    L_k,
    H,
    G,
    D,
    N_q,
    NP,
    R,
    T_q,
    first,
    log2_factor,
    ROWS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    MAP: tl.constexpr,
    FORM: tl.constexpr,
    INT8: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ROWS queries of a head of the group whose first unit is ``first``.

    q, k, v with their strides; INT8: k is k8, v is v8, with their scales, and mean (E, G, D) is what k8 lacks, or None.
    rows (E, H, N_q, R), count; sums (U_H, N_q, DP + 1, DP) unless FORM is "sparse"; ratio with its strides (FORM
    "sla2"). To out and (FORM "sla") o_linear, contiguous (B, L_q, H, D), and lse (B, H, T_q), natural, of the logits
    of the given k. With ``weight`` (D, D), and ``bias`` (D) or None, the form "sla" adds the projected linear branch to
    out and leaves no o_linear."""
    tiles: tl.constexpr = BLOCK_Q // ROWS
    tile = tl.program_id(0) % (N_q * tiles)
    local = (tl.program_id(0) // (N_q * tiles)).to(tl.int64)
    if CAUSAL:
        tile = N_q * tiles - 1 - tile
    head = first.to(tl.int64) * (H // G) + local
    entry, h = head // H, head % H
    g = h // (H // G)
    place, base, length = entry_rows(cu_q, entry, L_q, PACKED)
    place_k, base_k, keys = entry_rows(cu_k, entry, L_k, PACKED)
    block = tile // tiles
    start_row = tile * ROWS
    row = start_row + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    inside = row < length
    q += place * q_stride_b + h * q_stride_h + base * q_stride_l
    last_key = tl.zeros((ROWS,), tl.int32) + keys - 1
    plain_keys = keys
    if CAUSAL:
        last_key = tl.minimum(last_key, row + keys - length)
        plain_keys = tl.minimum(keys, tl.maximum(start_row + 1 + keys - length, 0))
    plain_blocks = plain_keys // BLOCK_K

    at_list = head * N_q + block
    listed = tl.where(start_row < length, tl.load(count + at_list), 0)
    rows += at_list * R
    # Of the last blocks of a rising list, those from plain_blocks on need a mask: with a diagonal at most 4.
    late = listed - 1 - tl.arange(0, 4)
    masked = tl.load(rows + late, mask=late >= 0, other=-1) >= plain_blocks
    plain = listed - tl.sum(masked.to(tl.int32), axis=0)

    acc = tl.zeros((ROWS, DP), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    unit = 0.0
    least_unit = 0.0
    row_factor = row_sum
    at_lse = lse + (place * H + h) * T_q + base + row
    if INT8:
        wide = load_rows(q, row, channel, q_stride_l, q_stride_d, length, D)
        q_scale = scale_of(largest(wide, 1, HARDWARE), 127.0)
        queries = to_int8(wide, inverse_of(q_scale)[:, None])
        # Through memory, whose rows are then read in the layout of the products; what lies there is overwritten below.
        tl.store(at_lse, q_scale * log2_factor, mask=inside)
        tl.debug_barrier()
        row_factor = tl.load(at_lse, mask=inside, other=0.0)
        local_unit = local // (H // G)
        k += local_unit * NP * (BLOCK_K * DP)
        v += local_unit * NP * (BLOCK_K * DP)
        k_scale += local_unit * NP
        v_scale += local_unit * NP
    else:
        at_q = q + row.to(tl.int64)[:, None] * q_stride_l + channel[None, :] * q_stride_d
        queries = tl.load(at_q, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
        k += place_k * k_stride_b + g * k_stride_h + base_k * k_stride_l
        v += place_k * v_stride_b + g * v_stride_h + base_k * v_stride_l
    for step in tl.static_range(2):
        begin = plain if step else 0
        end = listed if step else plain
        following = tl.load(rows + begin, mask=begin < end, other=0)
        for i in range(begin, end):
            start = following * BLOCK_K
            following = tl.load(rows + i + 1, mask=i + 1 < end, other=0)
            if INT8:
                acc, row_sum, row_max, unit, least_unit = int8_tile(
                    acc,
                    row_sum,
                    row_max,
                    unit,
                    least_unit,
                    queries,
                    row_factor,
                    last_key,
                    start,
                    k,
                    k_scale,
                    v + start * (DP - 1),
                    v_scale,
                    None,
                    v_stride_l,
                    v_stride_d,
                    keys,
                    D,
                    BLOCK_K,
                    ROWS,
                    BLOCK_K,
                    DP,
                    "fp8",
                    PADDED,
                    step == 1,
                    0,
                    HARDWARE,
                )
            else:
                acc, row_sum, row_max = _exact_tile(
                    acc,
                    row_sum,
                    row_max,
                    queries,
                    last_key,
                    start,
                    k,
                    v,
                    k_stride_l,
                    k_stride_d,
                    v_stride_l,
                    v_stride_d,
                    keys,
                    D,
                    log2_factor,
                    BLOCK_K,
                    DP,
                    PADDED,
                    step == 1,
                )

    empty = row_sum == 0.0
    norm = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    log2_sum = tl.where(empty, float("-inf"), tl.log2(tl.where(empty, 1.0, row_sum)) + row_max)
    if INT8:
        norm *= unit
        log2_sum -= 8.807354922057604
        if mean is not None:
            mean += (entry * G + g) * D
            for part in tl.static_range(0, DP, CHUNK):
                some = part + tl.arange(0, CHUNK)
                centre = tl.load(mean + some, mask=some < D, other=0.0)
                wide = load_rows(q, row, some, q_stride_l, q_stride_d, length, D)
                log2_sum += tl.sum(wide * centre[None, :], axis=1) * log2_factor
    tl.store(at_lse, log2_sum * 0.6931471805599453, mask=inside)
    acc = acc * norm[:, None]
    at_out = ((place * T_q + base + row)[:, None] * H + h) * D + channel[None, :]
    written = inside[:, None] & (channel < D)[None, :]
    if FORM != "sparse":
        sums += (local * N_q + block) * ((DP + 1) * DP)
        product, total = linear_output(q, row, q_stride_l, q_stride_d, length, D, sums, ROWS, DP, CHUNK, MAP)
        without = total == 0.0
        linear = product * tl.where(without, 0.0, 1.0 / tl.where(without, 1.0, total))[:, None]
        if weight is not None:
            known = (channel < D)[:, None] & (channel < D)[None, :]
            turned = tl.load(weight + channel[None, :] * D + channel[:, None], mask=known, other=0.0)
            acc = tl.dot(linear.to(turned.dtype), turned, acc, input_precision="tf32x3")
            if bias is not None:
                more = tl.load(bias + channel, mask=channel < D, other=0.0).to(tl.float32)
                acc += tl.where(without, 0.0, 1.0)[:, None] * more[None, :]
        elif FORM == "sla":
            tl.store(o_linear + at_out, linear.to(out.dtype.element_ty), mask=written)
        else:
            share = tl.load(ratio + entry * ratio_stride_b + h * ratio_stride_h + block * ratio_stride_n)
            share = tl.where(without, 1.0, share.to(tl.float32))
            acc = share[:, None] * acc + (1.0 - share)[:, None] * linear
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=written)


_SYNC = r"mma\.sync\S*"
_BF16 = {80: _SYNC + r"\.bf16", 90: r"wgmma\S*\.bf16", 100: r"tcgen05\.mma\S*kind::f16", 120: _SYNC + r"\.bf16"}
_INT8 = {90: r"wgmma\S*\.s32\.s8\.s8", 120: _SYNC + r"\.s32\.s8\.s8"}
_INT8[100] = r"tcgen05\.mma\S*kind::i8|" + _SYNC + r"\.s32\.s8\.s8"  # by the version of Triton
_FP8 = {90: r"wgmma\S*\.e4m3\.e4m3", 100: r"tcgen05\.mma\S*f8f6f4", 120: _SYNC + r"\.e4m3\.e4m3"}


def _case(
    name: str,
    chips: tuple[int, ...],
    warps: int = 8,
    stages: int = 3,
    spills: int = 0,
    projects: bool = False,
    **changes: Any,
) -> AotCase:
    """The kernel for bfloat16 at head size 128."""
    constants = {
        "ROWS": 128,
        "BLOCK_Q": 128,
        "BLOCK_K": 64,
        "DP": 128,
        "CHUNK": 64,
        "MAP": "softmax",
        "FORM": "sla2",
        "INT8": False,
        "CAUSAL": False,
        "PACKED": False,
        "PADDED": False,
        "HARDWARE": True,
        "q_stride_d": 1,
        "k_stride_d": 1,
        "v_stride_d": 1,
        **changes,
    }
    eight = constants["INT8"]
    kinds = dict.fromkeys(("q", "sums", "out", "o_linear", "weight", "bias"), "*bf16")
    kinds |= dict.fromkeys(("mean", "k_scale", "v_scale", "ratio", "lse"), "*fp32")
    kinds |= dict.fromkeys(("rows", "count", "cu_q", "cu_k"), "*i32")
    kinds |= {"k": "*i8" if eight else "*bf16", "v": "*fp8e4nv" if eight else "*bf16", "log2_factor": "fp32"}
    absent = [
        *(() if eight else ("mean", "k_scale", "v_scale")),
        *(() if constants["PACKED"] else ("cu_q", "cu_k")),
        *(("sums",) if constants["FORM"] == "sparse" else ()),
        *(("ratio",) if constants["FORM"] != "sla2" else ()),
        *(("o_linear",) if constants["FORM"] != "sla" or projects else ()),
        *(() if projects else ("weight", "bias")),
    ]
    constants |= dict.fromkeys(absent)
    signature = {n: kinds.get(n, "i32") for n in sparse_linear_forward_kernel.arg_names if n not in constants}
    aligned = tuple(
        n
        for n, kind in signature.items()
        if (kind.startswith("*") and n[:2] != "cu") or n[1:8] == "_stride" or n == "D"
    )
    products = {chip: (_BF16[chip], _INT8[chip], _FP8[chip]) if eight else (_BF16[chip],) for chip in chips}
    return AotCase(name, sparse_linear_forward_kernel, signature, constants, products, warps, stages, aligned, spills)


def aot_cases() -> list[AotCase]:
    """Both numerics for every chip that has them, dense and in the form "sla2"; other ways for Hopper. What is spilled
    lies outside the loops."""
    packed = {"CAUSAL": True, "PACKED": True, "FORM": "sla", "MAP": "elu", "spills": 80}
    return [
        _case("sparse_linear_forward", (90, 100)),
        _case("sparse_linear_forward_two_stages", (80, 120), stages=2, spills=200),
        _case("sparse_linear_forward_int8_fp8", (90, 100, 120), INT8=True, spills=200),
        _case("sparse_linear_forward_causal_packed", (90,), **packed),
        _case("sparse_linear_forward_int8_fp8_causal_packed", (90,), INT8=True, **packed),
        _case("sparse_linear_forward_projected", (90, 100), FORM="sla", projects=True, spills=50),
        _case("sparse_linear_forward_sparse_64", (90,), warps=4, FORM="sparse", ROWS=64, BLOCK_Q=64),
    ]
