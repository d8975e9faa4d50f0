"""The hard router in Triton: each query block's best key blocks, as rising lists, without a sort.

A row of scores is held in registers. The score of the last block that is taken is found by bisection: of a top-k choice
between the row's least and largest score, in some ten steps, until as many lie above as are wanted; of a share of the
mass over the bits of float32, which as signed integers are in the order of the numbers, in 32. Whoever lies above is
taken, and of equal scores the earlier ones. ``routers.select_top_k``, ``routers.sla_blocks`` and
``routers.select_mass`` are the references.

Shapes: E batch entries or packed sequences, H query heads, N_q and N_k blocks of queries and keys, R width of the row
lists.
"""

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.ops import LARGEST_ROW, list_width
from allears.ops.launches import Known


@triton.jit
def block_sight(first, length_q, length_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Of the block of queries that begins at row ``first``, how many key blocks it sees, how many of them all its rows
    see in full, and the first that every router takes; each number counts from key block 0."""
    there = first < length_q
    visible = tl.where(there, tl.cdiv(length_k, BLOCK_K), 0)
    full = visible
    forced = visible
    if CAUSAL:
        last = tl.minimum(first + BLOCK_Q, length_q) - 1 + length_k - length_q
        of_first = tl.maximum(first + 1 + length_k - length_q, 0)
        visible = tl.minimum(visible, tl.where(last < 0, 0, last // BLOCK_K + 1))
        full = tl.where(of_first >= length_k, visible, tl.minimum(visible, of_first // BLOCK_K))
        forced = tl.minimum(visible, tl.maximum(of_first - 1, 0) // BLOCK_K)
    return visible, full, forced


@triton.jit
def ordered_bits(x):
    """int32 in the order of float32 x; equal for both zeros."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def number_of(key):
    """The float32 whose :func:`ordered_bits` these are."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(key, free, wanted, VALUE_TURNS: tl.constexpr = 20):
    """Which of ``free`` have the ``wanted`` largest keys, of equal keys the first; none if ``wanted`` is below 1."""
    low = tl.min(tl.where(free, key, 2147483647), axis=0)
    key = tl.where(free & (wanted > 0), key, -2147483648)  # below all others, NaN and -inf among them
    high = tl.max(key, axis=0) + 1
    found = tl.sum((key >= low).to(tl.int32), axis=0)
    turn = 0
    while (low < high - 1) & (found > wanted):
        # Halves of values first, as these are spread evenly at best; then of bits, which ends in 32 turns.
        middle = ordered_bits(0.5 * number_of(low) + 0.5 * number_of(high))
        middle = tl.where(turn < VALUE_TURNS, middle, (low & high) + ((low ^ high) >> 1))
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        here = tl.sum((key >= middle).to(tl.int32), axis=0)
        enough = here >= wanted
        low = tl.where(enough, middle, low)
        found = tl.where(enough, here, found)
        high = tl.where(enough, high, middle)
        turn += 1
    best = key >= low
    if found > wanted:  # equal scores at the edge; the running sum takes a third of a router's instructions
        equal = key == low
        missing = wanted - tl.sum((key > low).to(tl.int32), axis=0)
        best = (key > low) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= missing))
    return best


@triton.jit
def part_of(count, share_high, share_low):
    """floor(share * count + 1e-4), the share as the sum of two float32."""
    wide = count.to(tl.float64)
    return (wide * share_high + wide * share_low + 1e-4).to(tl.int32)


@triton.jit
def _best_mass(key, score, seen, forced, free, column, share):
    """Which blocks have that share of the softmax of the scores together with the forced ones, by falling score."""
    top = tl.max(tl.where(seen, score, float("-inf")), axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.where(seen, tl.exp(score - top), 0.0)
    weight = weight / tl.maximum(tl.sum(weight, axis=0), 1e-30)
    wanted = tl.maximum(share - 1e-6, 1e-30) - tl.sum(tl.where(forced, weight, 0.0), axis=0)
    weight = tl.where(free, weight, 0.0)
    free = free & (weight > 0.0)
    enough = tl.sum(tl.where(key >= 0, weight, 0.0), axis=0) >= wanted
    threshold = tl.where(enough, 0, -2147483648)
    step = 1073741824
    for _ in range(31):
        enough = tl.sum(tl.where(key >= threshold + step, weight, 0.0), axis=0) >= wanted
        threshold = tl.where(enough, threshold + step, threshold)
        step = step // 2
    above = free & (key > threshold)
    equal = free & (key == threshold)
    missing = wanted - tl.sum(tl.where(above, weight, 0.0), axis=0)
    one = tl.max(tl.where(equal, weight, 0.0), axis=0)
    missing = tl.ceil(missing / tl.maximum(one, 1e-30))
    place = tl.cumsum(equal.to(tl.int32), axis=0)
    taken = forced | above | (equal & (place <= missing))
    # Where all scores are -inf there is no mass, and the first block is as good as any.
    least = tl.where(tl.sum(taken.to(tl.int32), axis=0) == 0, 1, 0)
    return taken | (seen & (column < least))


@triton.jit(
    do_not_specialize=["L_q", "L_k", "H", "N_q", "N_k", "R", "share_high", "share_low", "skip_high", "skip_low"]
)
def router_kernel(
    scores,
    rows,
    count,
    linear,
    cu_q,
    cu_k,
    L_q,
    L_k,
    H,
    N_q,
    N_k,
    R,
    share_high,
    share_low,
    skip_high,
    skip_low,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A query block of a head: scores (E, H, N_q, N_k) -> rows (E, H, N_q, R), count (E, H, N_q). The share is of the
    visible blocks, or with MASS of the softmax of the scores; it comes as the sum of two float32. With ``linear`` (E,
    H, N_q, N_k) bytes: 1 for the blocks that are seen in full and neither listed nor of the worst share ``skip``."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(0) % N_q
    length_q = L_q
    length_k = L_k
    if PACKED:
        entry = tl.program_id(0) // N_q // H
        length_q = tl.load(cu_q + entry + 1) - tl.load(cu_q + entry)
        length_k = tl.load(cu_k + entry + 1) - tl.load(cu_k + entry)
    visible, full, first_forced = block_sight(block * BLOCK_Q, length_q, length_k, BLOCK_Q, BLOCK_K, CAUSAL)
    column = tl.arange(0, WIDTH)
    seen = column < visible
    forced = seen & (column >= first_forced)
    free = column < first_forced
    score = tl.load(scores + row * N_k + column, mask=seen, other=float("-inf"))
    score = tl.where(score < float("inf"), score, 3.4028234663852886e38)  # NaN and inf on top
    key = ordered_bits(score)
    if MASS:
        taken = _best_mass(key, score, seen, forced, free, column, share_high + share_low)
    else:
        wanted = tl.maximum(part_of(visible, share_high, share_low), 1) - (visible - first_forced)
        taken = forced | best_of(key, free, wanted)
    if linear is not None:
        wanted = first_forced - part_of(visible, skip_high, skip_low)
        marginal = best_of(key, free, wanted) & (taken == 0) & (column < full)
        tl.store(linear + row * N_k + column, marginal.to(tl.uint8), mask=column < N_k)
    number = tl.sum(taken.to(tl.int32), axis=0)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    rows += row * R
    tl.store(rows + place, column, mask=taken & (place < R))
    tl.store(rows + column, -1, mask=(column >= number) & (column < R))
    tl.store(count + row, tl.minimum(number, R))


_ROUTER = Known(router_kernel)
_A_WARP = 512
"""Key blocks that a warp holds. Measured on an H100, a top-k choice at (1, 32760, 12, 128) and (1, 75600, 40, 128):
0.046 and 0.277 ms; with 1024 0.046 and 0.291, with 2048 0.055 and 0.421."""


def route_triton(
    scores: Tensor,
    *,
    keep: float | None = None,
    mass: float | None = None,
    skip: float | None = None,
    block_q: int,
    block_k: int,
    length_q: int,
    length_k: int,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Blocks:
    """Row lists of the best key blocks in one launch, without a wait for the GPU.

    Args:
        scores: (E, H, N_q, N_k) float32, see ``routers.block_scores``.
        keep: share of the visible blocks, in (0, 1], as ``routers.select_top_k``; or
        mass: share of the softmax of the scores, in (0, 1], as ``routers.select_mass``; its lists are N_k wide.
        skip: beside ``keep``, as ``routers.sla_blocks``: share of the visible blocks, in [0, 1), that no branch reads.
        length_q, length_k: rows of the queries and keys; of packed sequences the longest.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1) of packed sequences.

    Raises:
        ValueError: both or none of ``keep`` and ``mass`` are given or one is out of range, the scores do not fit, or a
            row has more than 16,384 blocks.
    """
    share = keep if keep is not None else mass
    if (keep is None) == (mass is None) or share is None or not 0 < share <= 1:
        raise ValueError(f"keep, mass: {keep} and {mass} given; give exactly one of them, in (0, 1]")
    n_q, n_k = -(-length_q // block_q), -(-length_k // block_k)
    if scores.dim() != 4 or scores.shape[2:] != (n_q, n_k) or scores.dtype != torch.float32:
        raise ValueError(
            f"scores: {scores.dtype} of shape {tuple(scores.shape)} given; it must be float32 (B, H, N_q, N_k) with "
            f"N_q = {n_q} and N_k = {n_k} for these lengths and block sizes"
        )
    if n_k > LARGEST_ROW:
        raise ValueError(f"scores: {n_k} key blocks given; the kernel takes at most {LARGEST_ROW}: select in torch")
    entries, heads = scores.shape[:2]
    width = list_width(n_k, keep, block_q, block_k, causal)
    rows = torch.empty(entries, heads, n_q, width, dtype=torch.int32, device=scores.device)
    count = torch.empty(entries, heads, n_q, dtype=torch.int32, device=scores.device)
    linear = None if skip is None else torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if not n_k:
        return Blocks(rows, count.zero_(), linear)
    if count.numel():
        high, skipped = rounded(share), rounded(skip or 0.0)
        held = max(1 << (n_k - 1).bit_length(), 32)
        lists = (scores.contiguous(), rows, count, None if linear is None else linear.view(torch.uint8))
        sizes = (length_q, length_k, heads, n_q, n_k, width)
        shares = (high, share - high, skipped, (skip or 0.0) - skipped)
        constants = {
            "BLOCK_Q": block_q,
            "BLOCK_K": block_k,
            "WIDTH": held,
            "MASS": keep is None,
            "CAUSAL": causal,
            "PACKED": cu_seqlens_q is not None,
        }
        arguments = (*lists, cu_seqlens_q, cu_seqlens_k, *sizes, *shares)
        _ROUTER((count.numel(), 1, 1), arguments, constants, num_warps=max(1, held // _A_WARP))
    return Blocks(rows, count, linear)


def rounded(x: float) -> float:
    """The next float32."""
    return ctypes.c_float(x).value


def aot_cases() -> list[AotCase]:
    """The router for rows of up to 512 and up to 16,384 key blocks; it uses no matrix instruction."""
    pointers = {"scores": "*fp32", "rows": "*i32", "count": "*i32", "linear": "*u8", "cu_q": "*i32", "cu_k": "*i32"}
    sizes = dict.fromkeys(("L_q", "L_k", "H", "N_q", "N_k", "R"), "i32")
    signature = {**pointers, **sizes, **dict.fromkeys(("share_high", "share_low", "skip_high", "skip_low"), "fp32")}
    plain = {name: kind for name, kind in signature.items() if name != "linear"}
    fixed = {"BLOCK_Q": 128, "BLOCK_K": 64, "PACKED": True}
    top = {**fixed, "WIDTH": 512, "MASS": False, "CAUSAL": False, "linear": None}
    classes = {**fixed, "WIDTH": 2048, "MASS": False, "CAUSAL": False}
    mass = {**fixed, "WIDTH": LARGEST_ROW, "MASS": True, "CAUSAL": True, "linear": None}
    return [
        AotCase("sparse_linear_router_top_k", router_kernel, plain, top, dict.fromkeys(CAPABILITIES, ()), num_warps=1),
        AotCase("sparse_linear_router_classes", router_kernel, signature, classes, {90: ()}, num_warps=4),
        AotCase("sparse_linear_router_mass", router_kernel, plain, mass, {90: (), 120: ()}, num_warps=32, spills=120),
    ]
