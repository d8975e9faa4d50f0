"""The hard router in Triton: each query block's best key blocks, as rising lists, without a sort.

A row of scores is held in registers. The score of the last block that is taken is found by 32 bisections over the bits
of float32, which as signed integers are in the order of the numbers; whoever lies above it is taken, and of equal
scores the earlier ones. ``routers.select_top_k`` and ``routers.select_mass`` are the references.

Shapes: E batch entries or packed sequences, H query heads, N_q and N_k blocks of queries and keys, R width of the row
lists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.ops import LARGEST_ROW, list_width


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


@triton.jit(do_not_specialize=["L_q", "L_k", "H", "N_q", "N_k", "R", "share_low"])
def router_kernel(
    scores,
    rows,
    count,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
    MASS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A query block of a head: scores (E, H, N_q, N_k) -> rows (E, H, N_q, R), count (E, H, N_q). The share is of the
    visible blocks, or with MASS of the softmax of the scores; it comes as the sum of two float32."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(0) % N_q
    length_q = L_q
    length_k = L_k
    if PACKED:
        entry = tl.program_id(0) // N_q // H
        length_q = tl.load(cu_q + entry + 1) - tl.load(cu_q + entry)
        length_k = tl.load(cu_k + entry + 1) - tl.load(cu_k + entry)
    visible, _, first_forced = block_sight(block * BLOCK_Q, length_q, length_k, BLOCK_Q, BLOCK_K, CAUSAL)
    column = tl.arange(0, WIDTH)
    seen = column < visible
    forced = seen & (column >= first_forced)
    free = column < first_forced
    score = tl.load(scores + row * N_k + column, mask=seen, other=float("-inf"))
    score = tl.where(score < float("inf"), score, 3.4028234663852886e38)  # NaN and inf on top
    key = ordered_bits(score)
    if MASS:
        top = tl.max(tl.where(seen, score, float("-inf")), axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.where(seen, tl.exp(score - top), 0.0)
        weight = weight / tl.maximum(tl.sum(weight, axis=0), 1e-30)
        wanted = tl.maximum(share_high + share_low - 1e-6, 1e-30) - tl.sum(tl.where(forced, weight, 0.0), axis=0)
        weight = tl.where(free, weight, 0.0)
        free = free & (weight > 0.0)
    else:
        of_visible = visible.to(tl.float64)
        share = of_visible * share_high + of_visible * share_low
        wanted = tl.maximum((share + 1e-4).to(tl.int32), 1) - (visible - first_forced)
        weight = free.to(tl.int32)
    enough = tl.sum(tl.where(key >= 0, weight, 0), axis=0) >= wanted
    threshold = tl.where(enough, 0, -2147483648)
    step = 1073741824
    for _ in range(31):
        enough = tl.sum(tl.where(key >= threshold + step, weight, 0), axis=0) >= wanted
        threshold = tl.where(enough, threshold + step, threshold)
        step = step // 2
    above = free & (key > threshold)
    equal = free & (key == threshold)
    missing = wanted - tl.sum(tl.where(above, weight, 0), axis=0)
    if MASS:
        one = tl.max(tl.where(equal, weight, 0.0), axis=0)
        missing = tl.ceil(missing / tl.maximum(one, 1e-30))
    place = tl.cumsum(equal.to(tl.int32), axis=0)
    taken = forced | above | (equal & (place <= missing))
    if MASS:  # where all scores are -inf there is no mass, and the first block is as good as any
        least = tl.where(tl.sum(taken.to(tl.int32), axis=0) == 0, 1, 0)
        taken = taken | (seen & (column < least))
    number = tl.sum(taken.to(tl.int32), axis=0)
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    rows += row * R
    tl.store(rows + place, column, mask=taken & (place < R))
    tl.store(rows + column, -1, mask=(column >= number) & (column < R))
    tl.store(count + row, tl.minimum(number, R))


def route_triton(
    scores: Tensor,
    *,
    keep: float | None = None,
    mass: float | None = None,
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
    if not n_k:
        return Blocks(rows, count.zero_())
    if count.numel():
        high = torch.tensor(share, dtype=torch.float32).item()
        held = max(triton.next_power_of_2(n_k), 32)
        router_kernel[(count.numel(),)](
            scores.contiguous(),
            rows,
            count,
            cu_seqlens_q,
            cu_seqlens_k,
            length_q,
            length_k,
            heads,
            n_q,
            n_k,
            width,
            high,
            share - high,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            WIDTH=held,
            MASS=keep is None,
            CAUSAL=causal,
            PACKED=cu_seqlens_q is not None,
            num_warps=max(1, held // 512),
        )
    return Blocks(rows, count)


def aot_cases() -> list[AotCase]:
    """The router for rows of up to 512 and up to 16,384 key blocks; it uses no matrix instruction."""
    pointers = {"scores": "*fp32", "rows": "*i32", "count": "*i32", "cu_q": "*i32", "cu_k": "*i32"}
    sizes = dict.fromkeys(("L_q", "L_k", "H", "N_q", "N_k", "R"), "i32")
    signature = {**pointers, **sizes, "share_high": "fp32", "share_low": "fp32"}
    fixed = {"BLOCK_Q": 128, "BLOCK_K": 64, "PACKED": True}
    top = {**fixed, "WIDTH": 512, "MASS": False, "CAUSAL": False}
    mass = {**fixed, "WIDTH": LARGEST_ROW, "MASS": True, "CAUSAL": True}
    return [
        AotCase("sparse_linear_router_top_k", router_kernel, signature, top, {80: (), 90: ()}, num_warps=1),
        AotCase(
            "sparse_linear_router_mass", router_kernel, signature, mass, {90: (), 120: ()}, num_warps=32, spills=True
        ),
    ]
