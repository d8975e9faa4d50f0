"""Quantisers of the 8-bit attention kernels in Triton, for any strides, on every GPU and in the interpreter.

Values and scales follow ``quantise.py``. Products in 8 bits take operands whose contracted axis is contiguous, so that
V, and in the backward K, Q and dO, are stored transposed. Inside each 16 tokens they then lie in the order 0, 1, 8, 9,
2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15: position ``4t + 2j + e`` holds token ``8j + 2t + e``. A thread that holds
scores of some tokens in the accumulator of one product holds just these tokens in the operand of the next, and nothing
moves between threads.

Keys are *block-padded*: each sequence begins at a block of its own and rows after its end are zero. Of a dense batch an
entry has ceil(L / 128) blocks. Of packed sequences, sequence s begins at block ``cu[s] // 128 + s``, which no earlier
one reaches, in ``T // 128 + S`` blocks; the kernels find their sequence by a search in ``cu``, and the host never waits
for the offsets.

Shapes: B batch, L tokens, T tokens of S packed sequences (then B = 1), H query heads, G key heads, D head size, DP = D
padded to 32, 64, 128 or 256, N blocks of 128 keys, NQ tiles of 64 queries.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.lowbit.quantise import KEY_BLOCK, QUERY_TILE
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK
from allears.ops.attention.lowbit.triton_nvfp4_quant import e4m3_code


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, axis: tl.constexpr, HARDWARE: tl.constexpr):
    """Largest magnitude along an axis of float32; NaN if there is one, which ``tl.max`` would pass over."""
    if HARDWARE:
        return tl.reduce(tl.abs(x), axis, _larger_or_nan)
    # As integers, the bits of magnitudes are in the order of the magnitudes, with NaN above infinity.
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def scale_of(amax, TOP: tl.constexpr):
    """``amax / TOP``; 0 if below 2^-126, NaN if not finite."""
    scale = tl.div_rn(amax, amax * 0.0 + TOP)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def inverse_of(scale):
    """``1 / scale``, and 0 where the scale is 0 or NaN."""
    usable = scale > 0.0
    divisor = tl.where(usable, scale, 1.0)
    return tl.where(usable, tl.div_rn(divisor * 0.0 + 1.0, divisor), 0.0)


@triton.jit
def nearest_int8(x):
    """int8 of float32 within +-127, half to even: the low byte of the bits of x + 1.5 * 2^23."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_int8(x, inverse):
    """int8 of ``x * inverse``, and 0 where the inverse is 0, also for an x that is not finite."""
    return nearest_int8(tl.where(inverse == 0.0, 0.0, x * inverse))


@triton.jit
def token_order(position):
    """The token that lies at a position, inside each 16."""
    return (position // 16) * 16 + ((position % 4) // 2) * 8 + ((position % 16) // 4) * 2 + position % 2


@triton.jit
def locate(cu, block, LENGTH, SEQUENCES, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Of a block: its sequence, that one's first row in memory and length, and the block's first token in it."""
    sequence = 0
    base = 0
    length = LENGTH
    start = block * BLOCK
    if PACKED:
        beyond = SEQUENCES
        while beyond - sequence > 1:
            middle = (sequence + beyond) // 2
            reached = tl.load(cu + middle) // BLOCK + middle <= block
            sequence = tl.where(reached, middle, sequence)
            beyond = tl.where(reached, beyond, middle)
        first = tl.load(cu + sequence)
        length = tl.load(cu + sequence + 1) - first
        start = (block - first // BLOCK - sequence) * BLOCK
        base = first.to(tl.int64)
    return sequence, base, length, start


@triton.jit
def other_side(cu, sequence, LENGTH, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Of a sequence that :func:`locate` found by the queries, its keys (or the reverse): their first row in memory,
    their number, and their first block."""
    base = 0
    length = LENGTH
    block = 0
    if PACKED:
        first = tl.load(cu + sequence)
        length = tl.load(cu + sequence + 1) - first
        block = first // BLOCK + sequence
        base = first.to(tl.int64)
    return base, length, block


@triton.jit
def load_rows(x, row, column, stride_l, stride_d, LENGTH, D):
    """float32 (rows, columns) of the tokens below LENGTH and channels below D, 0 elsewhere."""
    inside = (row < LENGTH)[:, None] & (column < D)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride_l + column[None, :] * stride_d
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def key_sums_values_kernel(
    k,
    v,
    cu,
    sums,
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
    L,
    G,
    D,
    N,
    S,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    PACKED: tl.constexpr,
    SUMS: tl.constexpr,
    VALUES: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A block of a head. SUMS: the sum of its keys, to sums (B, G, N, DP). VALUES "int8" or "fp8": v8 (B, G, DP, N *
    128), transposed, in the order of ``token_order``, and v_scale (B, G, N)."""
    block = tl.program_id(0) % N
    head = (tl.program_id(0) // N).to(tl.int64)
    b, g = head // G, head % G
    _, base, length, start = locate(cu, block, L, S, BLOCK, PACKED)
    position = tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    token = start + token_order(position)
    if SUMS:
        at_k = k + b * k_stride_b + g * k_stride_h + base * k_stride_l
        keys = load_rows(at_k, token, channel, k_stride_l, k_stride_d, length, D)
        tl.store(sums + (head * N + block) * DP + channel, tl.sum(keys, axis=0))
    if VALUES != "none":
        at_v = v + b * v_stride_b + g * v_stride_h + base * v_stride_l
        values = load_rows(at_v, token, channel, v_stride_l, v_stride_d, length, D)
        amax = largest(largest(values, 1, HARDWARE), 0, HARDWARE)
        at = v8 + (head * DP + channel[:, None]) * (N * BLOCK) + block * BLOCK + position[None, :]
        if VALUES == "fp8":
            scale = scale_of(amax, 448.0)
            inverse = inverse_of(scale)
            scaled = tl.where(inverse == 0.0, 0.0, values * inverse)
            code = e4m3_code(tl.abs(scaled)) | tl.where(scaled.to(tl.int32, bitcast=True) < 0, 128, 0)
            tl.store(at, tl.trans(code.to(tl.uint8)))
        else:
            scale = scale_of(amax, 127.0)
            tl.store(at, tl.trans(to_int8(values, inverse_of(scale))))
        tl.store(v_scale + head * N + block, scale)


@triton.jit
def key_mean_kernel(sums, cu, mean, L, G, N, S, BLOCK: tl.constexpr, DP: tl.constexpr, PACKED: tl.constexpr):
    """The mean over a sequence of a head's keys: sums (B, G, N, DP) -> mean (B or S, G, DP), always added in one
    order."""
    entry = tl.program_id(0)
    g = tl.program_id(1)
    first_block = 0
    length = L
    head = entry.to(tl.int64) * G + g
    if PACKED:
        base = tl.load(cu + entry)
        length = tl.load(cu + entry + 1) - base
        first_block = base // BLOCK + entry
        head = g.to(tl.int64)
    block = tl.arange(0, 32)
    channel = tl.arange(0, DP)
    total = tl.zeros((DP,), tl.float32)
    blocks = tl.cdiv(length, BLOCK)
    for start in range(0, blocks, 32):
        at = sums + (head * N + first_block + start + block[:, None]) * DP + channel[None, :]
        total += tl.sum(tl.load(at, mask=(start + block < blocks)[:, None], other=0.0), axis=0)
    count = tl.maximum(length, 1).to(tl.float32)
    tl.store(mean + (entry.to(tl.int64) * G + g) * DP + channel, tl.div_rn(total, tl.zeros((DP,), tl.float32) + count))


@triton.jit
def quantise_keys_kernel(
    k,
    cu,
    mean,
    k8,
    k_scale,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    L,
    G,
    D,
    N,
    S,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A block of a head, less the mean if CENTRED: k8 (B, G, N * 128, DP), k_scale (B, G, N)."""
    block = tl.program_id(0) % N
    head = (tl.program_id(0) // N).to(tl.int64)
    b, g = head // G, head % G
    sequence, base, length, start = locate(cu, block, L, S, BLOCK, PACKED)
    row = tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    at_k = k + b * k_stride_b + g * k_stride_h + base * k_stride_l
    keys = load_rows(at_k, start + row, channel, k_stride_l, k_stride_d, length, D)
    if CENTRED:
        entry = sequence if PACKED else b
        centre = tl.load(mean + (entry * G + g) * DP + channel)
        keys = tl.where((start + row < length)[:, None], keys - centre[None, :], 0.0)
    scale = scale_of(largest(largest(keys, 1, HARDWARE), 0, HARDWARE), 127.0)
    at = k8 + (head * N + block) * (BLOCK * DP) + row[:, None] * DP + channel[None, :]
    tl.store(at, to_int8(keys, inverse_of(scale)))
    tl.store(k_scale + head * N + block, scale)


@triton.jit
def quantise_queries_kernel(
    q,
    cu,
    mean,
    q_mean,
    q8,
    q_scale,
    shift,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    q_stride_d,
    L,
    H,
    D,
    GROUP,
    S,
    T,
    TILES,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    PACKED: tl.constexpr,
    PER_TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    MEAN_OF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of 64 queries of a head: q8 (B, H, T, DP) and q_scale (B, H, T), one scale a query or (PER_TILE) a tile.
    SHIFT: q . mean to shift (B, H, T), which the log-sum-exp of smoothed keys lacks. T is L, or of packed sequences all
    queries. MEAN_OF: so many queries of a dense batch have one mean, q_mean (B, H, M, DP), taken off before they are
    quantised; 0 for none."""
    block = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES).to(tl.int64)
    b, h = head // H, head % H
    sequence, base, length, start = locate(cu, block, L, S, BLOCK, PACKED)
    row = start + tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    at_q = q + b * q_stride_b + h * q_stride_h + base * q_stride_l
    queries = load_rows(at_q, row, channel, q_stride_l, q_stride_d, length, D)
    centred = queries
    if MEAN_OF:
        of_block = tl.load(q_mean + (head * tl.cdiv(L, MEAN_OF) + start // MEAN_OF) * DP + channel)
        centred = tl.where((row < length)[:, None], queries - of_block[None, :], 0.0)
    amax = largest(centred, 1, HARDWARE)
    if PER_TILE:
        amax = tl.zeros((BLOCK,), tl.float32) + largest(amax, 0, HARDWARE)
    scale = scale_of(amax, 127.0)
    at = head * T + base + row
    tl.store(q_scale + at, scale, mask=row < length)
    eight = to_int8(centred, inverse_of(scale)[:, None])
    tl.store(q8 + at[:, None] * DP + channel[None, :], eight, mask=(row < length)[:, None])
    if SHIFT:
        entry = sequence if PACKED else b
        group = h // GROUP
        heads = H // GROUP
        centre = tl.load(mean + (entry * heads + group) * DP + channel)
        tl.store(shift + at, tl.sum(queries * centre[None, :], axis=1), mask=row < length)


@triton.jit
def prepare_backward_kernel(
    d_out,
    out,
    lse,
    d_lse,
    q8,
    q_scale,
    cu,
    do8t,
    q8t,
    do_scale,
    q_scale_padded,
    row_shift,
    row_lse,
    row_d_lse,
    folded_shift,
    folded_lse,
    do_stride_b,
    do_stride_l,
    do_stride_h,
    do_stride_d,
    o_stride_b,
    o_stride_l,
    o_stride_h,
    o_stride_d,
    L,
    H,
    D,
    S,
    T,
    NQ,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    PACKED: tl.constexpr,
    PER_TILE: tl.constexpr,
    LSE_GRADIENT: tl.constexpr,
    CENTRED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of 64 queries of a head, once for all its products: dO in INT8, one scale a query or (PER_TILE) a tile.

    do8t, q8t (B, H, DP, NQ * 64), transposed in the order of ``token_order``. The rest is (B, H, NQ * 64):
    q_scale_padded; row_shift = sum(dO * O) - d_lse; row_lse in base 2 (+inf after the last query, so that its weights
    are 0); with LSE_GRADIENT row_d_lse (0 of a query without keys, whose -inf is a constant). PER_TILE: do_scale, the
    tile's scale. Else the scale of dO, which dV wants multiplied into P, and that of Q, which dK wants multiplied into
    dS, become part of what the scores are turned into P and dS with: P * do_scale = exp2(S - folded_lse) and dS *
    q_scale = P * do_scale * (dP * ratio - folded_shift), where ratio = q_scale / do_scale is what do_scale then holds.
    With Q CENTRED, whose mean wants dS itself, ratio = 1 / do_scale, and the scale of Q is left out.
    """
    block = tl.program_id(0) % NQ
    head = (tl.program_id(0) // NQ).to(tl.int64)
    b, h = head // H, head % H
    _, base, length, start = locate(cu, block, L, S, BLOCK, PACKED)
    position = tl.arange(0, BLOCK)
    token = token_order(position)
    row = start + token
    channel = tl.arange(0, DP)
    errors = load_rows(
        d_out + b * do_stride_b + h * do_stride_h + base * do_stride_l,
        row,
        channel,
        do_stride_l,
        do_stride_d,
        length,
        D,
    )
    outputs = load_rows(
        out + b * o_stride_b + h * o_stride_h + base * o_stride_l, row, channel, o_stride_l, o_stride_d, length, D
    )
    at = head * T + base + row
    inside = row < length
    to = (head * NQ + block) * BLOCK + token
    natural = tl.load(lse + at, mask=inside, other=float("inf"))
    without_keys = natural == float("-inf")
    shift = tl.sum(errors * outputs, axis=1)
    if LSE_GRADIENT:
        given = tl.where(without_keys, 0.0, tl.load(d_lse + at, mask=inside, other=0.0))
        shift -= given
        tl.store(row_d_lse + to, given)
    amax = largest(errors, 1, HARDWARE)
    if PER_TILE:
        amax = tl.zeros((BLOCK,), tl.float32) + largest(amax, 0, HARDWARE)
    scale = scale_of(amax, 127.0)
    of_query = tl.load(q_scale + at, mask=inside, other=0.0)
    row_lse_2 = tl.where(without_keys, 0.0, natural * 1.4426950408889634)
    tl.store(q_scale_padded + to, of_query)
    tl.store(row_shift + to, shift)
    tl.store(row_lse + to, row_lse_2)
    if PER_TILE:
        tl.store(do_scale + to, scale)
    else:
        # Of a query whose dO is 0 any scale will do; a small one leaves the scales of the keys to the other queries.
        divisor = tl.where(scale == 0.0, 9.094947017729282e-13, scale)
        ratio = tl.div_rn(divisor * 0.0 + 1.0 if CENTRED else of_query, divisor)
        tl.store(do_scale + to, ratio)
        tl.store(folded_lse + to, row_lse_2 - tl.log2(divisor))
        tl.store(folded_shift + to, shift * ratio)
    transposed = (head * DP + channel[:, None]) * (NQ * BLOCK) + block * BLOCK + position[None, :]
    tl.store(do8t + transposed, tl.trans(to_int8(errors, inverse_of(scale)[:, None])))
    eight = tl.load(q8 + at[:, None] * DP + channel[None, :], mask=inside[:, None], other=0)
    tl.store(q8t + transposed, tl.trans(eight))


class Sizes(NamedTuple):
    """The numbers of a call: B, L_q, L_k, H, G, D, DP, S, N, and whether sequences are packed."""

    batch: int
    queries: int
    keys: int
    heads: int
    groups: int
    size: int
    padded: int
    sequences: int
    blocks: int
    packed: bool

    def query_tiles(self, rows: int) -> int:
        """Tiles of ``rows`` queries that a kernel visits in each head of an entry of the batch."""
        return self.queries // rows + self.sequences if self.packed else -(-self.queries // rows)


def sizes_of(q: Tensor, k: Tensor, cu: Tensor | None) -> Sizes:
    """The numbers of q (B, L_q, H, D) and k (B, L_k, G, D), or of packed sequences (1, T, H, D) and their starts
    ``cu``."""
    sequences = cu.shape[0] - 1 if cu is not None else 0
    keys, size = k.shape[1], q.shape[3]
    blocks = keys // KEY_BLOCK + sequences if cu is not None else -(-keys // KEY_BLOCK)
    padded = padded_head_size(size)
    return Sizes(q.shape[0], q.shape[1], keys, q.shape[2], k.shape[2], size, padded, sequences, blocks, cu is not None)


def padded_head_size(size: int) -> int:
    """32, 64, 128 or 256: the head sizes that the kernels know; zeros after q, k and v change nothing."""
    return next(known for known in (32, 64, 128, 256) if size <= known)


def on_hardware() -> bool:
    """False where Triton interprets (``TRITON_INTERPRET=1`` when the kernels were imported)."""
    return isinstance(quantise_keys_kernel, triton.runtime.JITFunction)


class QuantisedKeys(NamedTuple):
    k8: Tensor
    k_scale: Tensor
    k_mean: Tensor | None
    v8: Tensor | None
    v_scale: Tensor | None


def quantise_keys_values(
    k: Tensor, v: Tensor, cu_k: Tensor | None, sizes: Sizes, smooth_k: bool, values: Literal["none", "int8", "fp8"]
) -> QuantisedKeys:
    """k in INT8, less its mean with ``smooth_k``, and v in INT8 or E4M3 if asked for; see :class:`TritonSaved`. v8 is
    (B, G, DP, N * 128) with v_scale (B, G, N).
    """
    batch, groups, padded, blocks = sizes.batch, sizes.groups, sizes.padded, sizes.blocks
    rows = blocks * KEY_BLOCK
    k8 = torch.empty(batch, groups, rows, padded, dtype=torch.int8, device=k.device)
    k_scale = torch.empty(batch, groups, blocks, device=k.device)
    sums = mean = v8 = v_scale = None
    if smooth_k:
        entries = sizes.sequences if sizes.packed else batch
        sums = torch.empty(batch, groups, blocks, padded, device=k.device)
        mean = torch.empty(entries, groups, padded, device=k.device)
    if values != "none":
        dtype = torch.int8 if values == "int8" else torch.float8_e4m3fn
        v8 = torch.empty(batch, groups, padded, rows, dtype=dtype, device=k.device)
        v_scale = torch.empty(batch, groups, blocks, device=k.device)
    lengths = (sizes.keys, groups, sizes.size, blocks, sizes.sequences)
    shared = {"BLOCK": KEY_BLOCK, "DP": padded, "PACKED": sizes.packed}
    grid = (blocks * batch * groups,)
    if blocks * batch and (smooth_k or v8 is not None):
        key_sums_values_kernel[grid](
            k,
            v,
            cu_k,
            sums,
            v8.view(torch.uint8) if v8 is not None and values == "fp8" else v8,
            v_scale,
            *k.stride(),
            *v.stride(),
            *lengths,
            **shared,
            SUMS=smooth_k,
            VALUES=values,
            HARDWARE=on_hardware(),
            num_warps=8,
        )
    if mean is not None and mean.numel():
        key_mean_kernel[mean.shape[:2]](
            sums, cu_k, mean, sizes.keys, groups, blocks, sizes.sequences, **shared, num_warps=4
        )
    if blocks * batch:
        quantise_keys_kernel[grid](
            k,
            cu_k,
            mean,
            k8,
            k_scale,
            *k.stride(),
            *lengths,
            **shared,
            CENTRED=smooth_k,
            HARDWARE=on_hardware(),
            num_warps=8,
        )
    return QuantisedKeys(k8, k_scale, mean, v8, v_scale)


def quantise_queries(
    q: Tensor,
    cu_q: Tensor | None,
    sizes: Sizes,
    k_mean: Tensor | None,
    per_tile: bool,
    q_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q8 (B, H, L_q, DP), q_scale (B, H, L_q), less q_mean (B, H, M, DP) if given; q . k_mean (B, H, L_q) if there is
    a mean."""
    rows = (sizes.batch, sizes.heads, sizes.queries)
    q8 = torch.empty(*rows, sizes.padded, dtype=torch.int8, device=q.device)
    q_scale = torch.empty(rows, device=q.device)
    shift = torch.empty(rows, device=q.device) if k_mean is not None else None
    if q8.numel():
        tiles = sizes.query_tiles(QUERY_TILE)
        quantise_queries_kernel[(tiles * sizes.batch * sizes.heads,)](
            q,
            cu_q,
            k_mean,
            q_mean,
            q8,
            q_scale,
            shift,
            *q.stride(),
            sizes.queries,
            sizes.heads,
            sizes.size,
            sizes.heads // sizes.groups,
            sizes.sequences,
            sizes.queries,
            tiles,
            BLOCK=QUERY_TILE,
            DP=sizes.padded,
            PACKED=sizes.packed,
            PER_TILE=per_tile,
            SHIFT=shift is not None,
            MEAN_OF=QUERY_BLOCK if q_mean is not None else 0,
            HARDWARE=on_hardware(),
            num_warps=4,
        )
    return q8, q_scale, shift


_STRIDES = {f"{tensor}_stride_{axis}": "i32" for tensor in ("k", "v", "q", "do", "o") for axis in ("b", "l", "h")}
_KINDS = {
    "*i8": ("q8", "q8t", "do8t", "k8"),
    "*bf16": ("q", "k", "v", "d_out", "out"),
    "*i32": ("cu",),
    "i32": ("L", "G", "H", "D", "N", "NQ", "S", "T", "TILES", "GROUP", *_STRIDES),
}
_TYPES = {name: kind for kind, names in _KINDS.items() for name in names}


def _case(name: str, kernel, warps: int, **constants) -> AotCase:
    """A kernel for bfloat16 with adjoining channels; what is not listed above is a pointer to float32."""
    fixed = {"DP": 128, **constants}
    fixed |= {name: 1 for name in kernel.arg_names if name.endswith("stride_d")}
    signature = {name: _TYPES.get(name, "*fp32") for name in kernel.arg_names if name not in fixed}
    signature |= {"v8": "*u8"} if "v8" in signature else {}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name)
    return AotCase(name, kernel, signature, fixed, dict.fromkeys(CAPABILITIES, ()), num_warps=warps, aligned=aligned)


def aot_cases() -> list[AotCase]:
    """Every quantiser at head size 128; they use no matrix instruction."""
    keys = {"BLOCK": KEY_BLOCK, "PACKED": True}
    rows = {"BLOCK": QUERY_TILE, "PACKED": True, "PER_TILE": False, "HARDWARE": True}
    dense = {**rows, "PACKED": False}
    values = {**keys, "SUMS": True, "VALUES": "fp8", "HARDWARE": True}
    return [
        _case("key_sums_values", key_sums_values_kernel, 8, **values),
        _case("key_mean", key_mean_kernel, 4, **keys),
        _case("quantise_keys", quantise_keys_kernel, 8, **keys, CENTRED=True, HARDWARE=True),
        _case("quantise_queries", quantise_queries_kernel, 4, **rows, SHIFT=True, MEAN_OF=0, q_mean=None),
        _case(
            "quantise_queries_centred", quantise_queries_kernel, 4, **dense, SHIFT=True, MEAN_OF=QUERY_BLOCK, cu=None
        ),
        _case("prepare_backward", prepare_backward_kernel, 4, **rows, LSE_GRADIENT=True, CENTRED=False),
        _case(
            "prepare_backward_centred", prepare_backward_kernel, 4, **dense, LSE_GRADIENT=True, CENTRED=True, cu=None
        ),
    ]
