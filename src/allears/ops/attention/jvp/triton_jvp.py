"""Attention and its tangent in one pass over the keys, in Triton (rCM, arXiv 2510.08431, section 3.1).

With the running maximum m of online softmax, p = exp(s - m) and t the tangent of the logits: beside sum(p) and
sum(p v), a row keeps sum(p t) and sum(p t v + p dv), all rescaled alike; then O = sum(p v) / sum(p) and
dO = sum(p t v + p dv) / sum(p) - O sum(p t) / sum(p). A constant added to a row of t changes nothing, so the row's mean
over the first tile is taken off before p t is rounded to the inputs' type.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size, DP = D padded
to a power of two; a tile of ROWS queries x KEYS keys.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase


@triton.jit
def load_tile(base, token, channel, stride_l, LENGTH, D, PADDED: tl.constexpr):
    """(tokens, channels), 0 beyond LENGTH and, if PADDED, beyond D."""
    at = base + token.to(tl.int64)[:, None] * stride_l + channel[None, :]
    inside = (token < LENGTH)[:, None]
    if PADDED:
        inside = inside & (channel < D)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def logits_and_tangent(
    queries,
    d_queries,
    q,
    k,
    d_q,
    d_k,
    row,
    token,
    q_stride_l,
    k_stride_l,
    L_q,
    L_k,
    D,
    factor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    PIECE: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_DQ: tl.constexpr,
    HAS_DK: tl.constexpr,
):
    """(ROWS, KEYS): base-2 logits, -inf beyond the keys, and the tangent of the natural ones, 0 there. The sums over
    channels run in pieces; with PIECE = DP the queries are those that were loaded, else they are loaded again."""
    s = tl.zeros((ROWS, KEYS), tl.float32)
    t = tl.zeros((ROWS, KEYS), tl.float32)
    for first in tl.static_range(0, DP, PIECE):
        channel = first + tl.arange(0, PIECE)
        if PIECE == DP:
            left = queries
            d_left = d_queries
        else:
            left = load_tile(q, row, channel, q_stride_l, L_q, D, PADDED)
            d_left = left
            if HAS_DQ:
                d_left = load_tile(d_q, row, channel, q_stride_l, L_q, D, PADDED)
        keys = tl.trans(load_tile(k, token, channel, k_stride_l, L_k, D, PADDED))
        s = tl.dot(left, keys, s, input_precision="tf32x3")
        if HAS_DQ:
            t = tl.dot(d_left, keys, t, input_precision="tf32x3")
        if HAS_DK:
            d_keys = tl.trans(load_tile(d_k, token, channel, k_stride_l, L_k, D, PADDED))
            t = tl.dot(left, d_keys, t, input_precision="tf32x3")
    s = tl.where((token < L_k)[None, :], s * (factor * 1.4426950408889634), float("-inf"))
    return s, t * factor


@triton.jit
def attention_jvp_kernel(
    q,
    k,
    v,
    d_q,
    d_k,
    d_v,
    out,
    d_out,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    L_q,
    L_k,
    H,
    G,
    D,
    TILES,
    factor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    PIECE: tl.constexpr,
    PADDED: tl.constexpr,
    HAS_DQ: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
):
    """ROWS queries of a head. q and d_q share their strides, as do k and d_k, v and d_v; D's stride is 1. out and d_out
    are contiguous (B, L_q, H, D)."""
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    b, h = head // H, head % H
    g = h // (H // G)
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    column = tl.arange(0, KEYS)
    q += b * q_stride_b + h * q_stride_h
    k += b * k_stride_b + g * k_stride_h
    v += b * v_stride_b + g * v_stride_h
    if HAS_DQ:
        d_q += b * q_stride_b + h * q_stride_h
    if HAS_DK:
        d_k += b * k_stride_b + g * k_stride_h
    if HAS_DV:
        d_v += b * v_stride_b + g * v_stride_h
    queries = 0.0
    d_queries = 0.0
    if PIECE == DP:
        queries = load_tile(q, row, channel, q_stride_l, L_q, D, PADDED)
        if HAS_DQ:
            d_queries = load_tile(d_q, row, channel, q_stride_l, L_q, D, PADDED)

    shift = tl.zeros((ROWS,), tl.float32)
    if HAS_DQ or HAS_DK:
        _, t = logits_and_tangent(
            queries,
            d_queries,
            q,
            k,
            d_q,
            d_k,
            row,
            column,
            q_stride_l,
            k_stride_l,
            L_q,
            L_k,
            D,
            factor,
            ROWS,
            KEYS,
            DP,
            PIECE,
            PADDED,
            HAS_DQ,
            HAS_DK,
        )
        shift = tl.sum(t, axis=1) / tl.minimum(L_k, KEYS)

    acc = tl.zeros((ROWS, DP), tl.float32)
    d_acc = tl.zeros((ROWS, DP), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    moved_sum = tl.zeros((ROWS,), tl.float32)
    for start in range(0, L_k, KEYS):
        token = start + column
        s, t = logits_and_tangent(
            queries,
            d_queries,
            q,
            k,
            d_q,
            d_k,
            row,
            token,
            q_stride_l,
            k_stride_l,
            L_q,
            L_k,
            D,
            factor,
            ROWS,
            KEYS,
            DP,
            PIECE,
            PADDED,
            HAS_DQ,
            HAS_DK,
        )
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        decay = tl.exp2(row_max - new_max)
        p = tl.exp2(s - new_max[:, None])
        row_sum = row_sum * decay + tl.sum(p, axis=1)
        row_max = new_max
        values = load_tile(v, token, channel, v_stride_l, L_k, D, PADDED)
        narrow = p.to(values.dtype)
        acc = tl.dot(narrow, values, acc * decay[:, None], input_precision="tf32x3")
        d_acc = d_acc * decay[:, None]
        if HAS_DV:
            d_values = load_tile(d_v, token, channel, v_stride_l, L_k, D, PADDED)
            d_acc = tl.dot(narrow, d_values, d_acc, input_precision="tf32x3")
        if HAS_DQ or HAS_DK:
            moved = p * (t - shift[:, None])
            moved_sum = moved_sum * decay + tl.sum(moved, axis=1)
            d_acc = tl.dot(moved.to(values.dtype), values, d_acc, input_precision="tf32x3")

    norm = 1.0 / row_sum
    acc = acc * norm[:, None]
    d_acc = d_acc * norm[:, None] - acc * (moved_sum * norm)[:, None]
    at = ((b * L_q + row.to(tl.int64)[:, None]) * H + h) * D + channel[None, :]
    inside = (row < L_q)[:, None] & (channel < D)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(d_out + at, d_acc.to(out.dtype.element_ty), mask=inside)


_STRIDES = {f"{tensor}_stride_{axis}": "i32" for tensor in "qkv" for axis in "blh"}
_SIZES = {**dict.fromkeys(("L_q", "L_k", "H", "G", "D", "TILES"), "i32"), "factor": "fp32"}
_SYNC = r"mma\.sync\S*"
_BF16 = {80: _SYNC + r"\.bf16", 90: r"wgmma\S*\.bf16", 100: r"tcgen05\.mma\S*kind::f16", 120: _SYNC + r"\.bf16"}


def _case(dtype: str, padded: int, which: str, chips: tuple[int, ...]) -> AotCase:
    """The kernel at head size ``padded`` with tangents of ``which`` of q, k and v."""
    from allears.ops.attention.jvp.triton_host import launch_for

    tensors = dict.fromkeys(("q", "k", "v", "out", "d_out", *(f"d_{w}" for w in which)), f"*{dtype}")
    launch = launch_for(padded, dtype == "fp32", chips[0] // 10)
    absent = {f"d_{name}": None for name in "qkv" if name not in which}
    flags = {f"HAS_D{name.upper()}": name in which for name in "qkv"}
    signature = {**tensors, **_STRIDES, **_SIZES}
    return AotCase(
        name=f"attention_jvp_{dtype}_{padded}_{which}_{chips[0]}",
        kernel=attention_jvp_kernel,
        signature=signature,
        constexprs={
            "ROWS": launch.rows,
            "KEYS": launch.keys,
            "DP": padded,
            "PIECE": launch.piece,
            "PADDED": False,
            **absent,
            **flags,
        },
        instructions={chip: (_BF16[chip],) if dtype == "bf16" else () for chip in chips},
        num_warps=launch.warps,
        num_stages=launch.stages,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name),
    )


def aot_cases() -> list[AotCase]:
    """All tangents in bf16 and float32, and those of queries alone, as in cross-attention with a fixed context."""
    return [
        *(_case("bf16", 128, "qkv", (chip,)) for chip in (80, 90, 100, 120)),
        *(_case("bf16", 64, which, (90,)) for which in ("qkv", "q")),
        _case("fp32", 128, "qkv", (90, 120)),
    ]
