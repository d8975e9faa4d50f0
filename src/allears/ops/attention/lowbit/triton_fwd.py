"""Forward of the 8-bit attention families in Triton: INT8 Q K^T, and P V in FP8, INT8 or 16 bits.

SageAttention 2 and 2++ (arXiv 2411.10958, 2505.21136) and SageBwd's forward (arXiv 2505.11594); numerics and operands
are those of ``int8_reference.py``, ``sagebwd_reference.py`` and ``triton_quant.py``. A tile of keys is the 128 that
share a scale. FP8 products of a tile are summed apart and then added to the output, which is kept in units of the
current tile's scale of V, so that the two levels cost nothing.

Shapes: B batch, L_q queries, L_k keys, T_q queries of S packed sequences (then B = 1; else T_q = L_q), H query heads, G
key heads, D head size, DP = D padded, N blocks of 128 keys; a tile of ROWS queries x KEYS keys.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK
from allears.ops.attention.lowbit.triton_quant import inverse_of, locate, nearest_int8, other_side, scale_of
from allears.ops.attention.lowbit.triton_tiles import in_token_order, load_values, to_e4m3


@triton.jit
def int8_tile(
    acc,
    row_sum,
    row_max,
    unit,
    least_unit,
    queries,
    row_factor,
    last_key,
    start,
    k8,
    k_scale,
    v,
    v_scale,
    correction,
    v_stride_l,
    v_stride_d,
    L_k,
    D,
    COLUMNS,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    PV: tl.constexpr,
    PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of keys: the state of the online softmax, brought up to date."""
    column = tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    keys = tl.load(k8 + (start + column)[None, :] * DP + channel[:, None])
    factor = row_factor * tl.load(k_scale + start // KEYS)
    integers = tl.dot(queries, keys).to(tl.float32)
    s = integers * factor[:, None]
    if MEAN_OF:
        s += tl.load(correction + start + column)[None, :]
    if MASKED:
        s = tl.where((start + column)[None, :] <= last_key[:, None], s, float("-inf"))
    if MASKED or MEAN_OF:
        tile_max = tl.max(s, axis=1)
    else:
        tile_max = tl.max(integers, axis=1) * factor
    new_max = tl.maximum(row_max, tile_max)
    known = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp2(row_max - known)
    if PV == "fp8":
        p = tl.exp2(s - (known - 8.807354922057604)[:, None])
    else:
        p = tl.exp2(s - known[:, None])
    row_sum = row_sum * decay + tl.sum(p, axis=1)
    if PV == "fp16":
        values = load_values(v, start + column, channel, v_stride_l, v_stride_d, L_k, D, MASKED, PADDED)
        acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    else:
        values = tl.load(v + channel[None, :] * COLUMNS + (start + column)[:, None])
        given = tl.load(v_scale + start // KEYS)
        if PV == "fp8":
            product = tl.dot(in_token_order(to_e4m3(p, HARDWARE), ROWS, KEYS), values)
            # A block whose V is next to nothing must not blow up what is there: units fall by 2^60 at most.
            least_unit = tl.maximum(least_unit, given * 8.673617379884035e-19)
            new_unit = tl.where(given < least_unit, least_unit, given)
            ratio = tl.where(new_unit == 0.0, 1.0, unit / tl.where(new_unit == 0.0, 1.0, new_unit))
            acc = acc * (decay * ratio)[:, None] + product
            unit = new_unit
        else:
            p_scale = scale_of(tl.exp2(tile_max - known), 127.0)
            p8 = nearest_int8(p * inverse_of(p_scale)[:, None])
            product = tl.dot(in_token_order(p8, ROWS, KEYS), values).to(tl.float32)
            acc = acc * decay[:, None] + product * (p_scale * given)[:, None]
    return acc, row_sum, new_max, unit, least_unit


@triton.jit
def int8_forward_kernel(
    q8,
    q_scale,
    k8,
    k_scale,
    v,
    v_scale,
    out,
    lse,
    correction,
    cu_q,
    cu_k,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    o_stride_b,
    o_stride_l,
    o_stride_h,
    o_stride_d,
    L_q,
    L_k,
    H,
    G,
    D,
    N,
    S,
    T_q,
    TILES,
    log2_factor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    PV: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
    PADDED: tl.constexpr,
    LSE: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """ROWS queries of a head. q8 (B, H, T_q, DP), q_scale (B, H, T_q); k8 (B, G, N * 128, DP), k_scale (B, G, N). PV
    "fp8", "int8": v (B, G, DP, N * 128) in the order of ``token_order``, v_scale (B, G, N); "fp16": v as given, with
    its strides. out with its strides; LSE: lse (B, H, T_q), natural, of the scores as made. MEAN_OF: so many queries of
    a dense batch have lost one mean, whose scores in base 2 are a row of correction (B, H, M, N * 128); 0 for none."""
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    if CAUSAL:
        tile = TILES - 1 - tile
    b, h = head // H, head % H
    key_head = b * G + h // (H // G)
    sequence, base, length, first = locate(cu_q, tile, L_q, S, ROWS, PACKED)
    key_base, keys, first_block = other_side(cu_k, sequence, L_k, KEYS, PACKED)
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    inside = row < length
    at = head * T_q + base + row
    queries = tl.load(q8 + at[:, None] * DP + channel[None, :], mask=inside[:, None], other=0)
    row_factor = tl.load(q_scale + at, mask=inside, other=0.0) * log2_factor
    k8 += (key_head * N + first_block) * (KEYS * DP)
    k_scale += key_head * N + first_block
    if PV == "fp16":
        v += b * v_stride_b + (h // (H // G)) * v_stride_h + key_base * v_stride_l
    else:
        v += key_head * DP * (N * KEYS) + first_block * KEYS
        v_scale += key_head * N + first_block
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

    acc = tl.zeros((ROWS, DP), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    unit = 0.0
    least_unit = 0.0
    for masked in tl.static_range(2):
        for start in range(plain_end if masked else 0, end if masked else plain_end, KEYS):
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
                k8,
                k_scale,
                v,
                v_scale,
                correction,
                v_stride_l,
                v_stride_d,
                keys,
                D,
                N * KEYS,
                ROWS,
                KEYS,
                DP,
                PV,
                PADDED,
                masked == 1,
                MEAN_OF,
                HARDWARE,
            )
    empty = row_sum == 0.0
    norm = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, row_sum))
    if PV == "fp8":
        norm *= unit
    at_out = out + b * o_stride_b + h * o_stride_h + (base + row)[:, None] * o_stride_l + channel[None, :] * o_stride_d
    written = inside[:, None] & (channel < D)[None, :]
    tl.store(at_out, (acc * norm[:, None]).to(out.dtype.element_ty), mask=written)
    if LSE:
        log2_sum = tl.where(empty, float("-inf"), tl.log2(tl.where(empty, 1.0, row_sum)) + row_max)
        if PV == "fp8":
            log2_sum -= 8.807354922057604
        tl.store(lse + at, log2_sum * 0.6931471805599453, mask=inside)


_POINTERS = {"q8": "*i8", "q_scale": "*fp32", "k8": "*i8", "k_scale": "*fp32", "out": "*bf16", "lse": "*fp32"}
_STRIDES = {
    f"{tensor}_stride_{axis}": "i32" for tensor in ("v", "o") for axis in ("b", "l", "h")
}  # the stride along D is 1, which the launcher makes a constant
_SIZES = dict.fromkeys(("L_q", "L_k", "H", "G", "D", "N", "S", "T_q", "TILES"), "i32")
_SYNC = r"mma\.sync\S*"
_INT8 = {80: _SYNC + r"\.s32\.s8\.s8", 90: r"wgmma\S*\.s32\.s8\.s8", 120: _SYNC + r"\.s32\.s8\.s8"}
_INT8[100] = r"tcgen05\.mma\S*kind::i8|" + _INT8[80]  # by the version of Triton
_FP8 = {90: r"wgmma\S*\.e4m3\.e4m3", 100: r"tcgen05\.mma\S*f8f6f4", 120: _SYNC + r"\.e4m3\.e4m3"}
_BF16 = {80: _SYNC + r"\.bf16", 90: r"wgmma\S*\.bf16", 100: r"tcgen05\.mma\S*kind::f16", 120: _SYNC + r"\.bf16"}


def _case(
    pv: str, packed: bool, chips: tuple[int, ...], spills: int, padded: int = 128, centred: bool = False
) -> AotCase:
    """The forward: dense (with smoothed Q if ``centred``), or causal and packed. At head size 128 only Hopper's
    registers hold it all."""
    dtype, products = {"fp8": ("*fp8e4nv", _FP8), "fp16": ("*bf16", _BF16), "int8": ("*i8", _INT8)}[pv]
    signature = {**_POINTERS, "v": dtype, "v_scale": "*fp32", **_STRIDES, **_SIZES, "log2_factor": "fp32"}
    hopper, large = chips == (90,), padded == 256
    constants = {
        "ROWS": 64 if hopper or large else 128,
        "KEYS": 128,
        "DP": padded,
        "PV": pv,
        "CAUSAL": packed,
        "PACKED": packed,
        "PADDED": False,
    }
    constants |= {"LSE": True, "HARDWARE": True, "v_stride_d": 1, "o_stride_d": 1}
    if centred:
        signature |= {"correction": "*fp32"}
    constants |= {"MEAN_OF": QUERY_BLOCK} if centred else {"MEAN_OF": 0, "correction": None}
    if packed:
        signature |= {"cu_q": "*i32", "cu_k": "*i32"}
    else:
        constants |= {"cu_q": None, "cu_k": None}
    kind = "_causal_packed" if packed else "_centred" if centred else ""
    return AotCase(
        name=f"int8_forward_{pv}_{padded}{kind}_{chips[0]}",
        kernel=int8_forward_kernel,
        signature=signature,
        constexprs=constants,
        instructions={chip: (_INT8[chip], products[chip]) for chip in chips},
        num_warps=4 if hopper else 8,
        num_stages=1 if large else 3 if hopper and pv != "fp16" else 2,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name),
        spills=spills,
    )


def aot_cases() -> list[AotCase]:
    """Each product P V for Hopper, and one way of each for the other chips; each at head size 256. On Hopper what is
    spilled lies outside the loop."""
    hopper = [("fp8", False, 16), ("fp8", True, 16), ("fp16", True, 0), ("int8", False, 0)]
    others = [
        _case("fp8", False, (100, 120), 250),
        _case("fp16", True, (80, 100, 120), 300),
        _case("int8", False, (80, 100, 120), 750),
        _case("fp8", False, (90, 100, 120), 0, 256),
        _case("fp16", True, (80, 90, 100, 120), 60, 256),
        _case("int8", False, (80, 90, 100, 120), 150, 256),
        _case("int8", False, (90,), 0, centred=True),
        _case("int8", False, (80, 100, 120), 750, centred=True),
    ]
    return [_case(pv, packed, (90,), spills) for pv, packed, spills in hopper] + others
