"""Means of blocks of queries and keys in Triton, and the mean of all keys out of those of the blocks, so that k is read
once. ``routers.pool_blocks`` and ``routers.key_mean`` are the references.

Shapes: E batch entries or packed sequences, L rows (packed: T rows of all sequences), heads (H of q, G of k), D head
size, DP = D padded to 32, 64, 128 or 256, N blocks (of the longest sequence).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.lowbit.triton_quant import load_rows, padded_head_size

_SLICE = 32  # channels, and
_STEP = 256  # blocks, that a program of the mean takes at once


@triton.jit
def entry_rows(cu, entry, LENGTH, PACKED: tl.constexpr):
    """Of an entry: its place along the batch axis, its first row there, and its number of rows."""
    place = entry
    base = 0
    length = LENGTH
    if PACKED:
        first = tl.load(cu + entry)
        place = entry * 0
        length = tl.load(cu + entry + 1) - first
        base = first.to(tl.int64)
    return place, base, length


@triton.jit(do_not_specialize=["L", "HEADS", "N"])
def pool_kernel(
    x,
    cu,
    pools,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_d,
    L,
    HEADS,
    D,
    N,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A block of a head: its mean over the rows that exist to pools (E, heads, N, D) float32, 0 if none does."""
    block = tl.program_id(0) % N
    head = (tl.program_id(0) // N).to(tl.int64)
    entry, h = head // HEADS, head % HEADS
    place, base, length = entry_rows(cu, entry, L, PACKED)
    row = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    at = x + place * x_stride_b + h * x_stride_h + base * x_stride_l
    total = tl.sum(load_rows(at, row, channel, x_stride_l, x_stride_d, length, D), axis=0)
    there = tl.minimum(tl.maximum(length - block * BLOCK, 1), BLOCK).to(tl.float32)
    mean = tl.div_rn(total, tl.zeros((DP,), tl.float32) + there)
    tl.store(pools + (head * N + block) * D + channel, mean, mask=channel < D)


@triton.jit(do_not_specialize=["L", "HEADS", "N"])
def mean_of_pools_kernel(
    pools,
    cu,
    mean,
    L,
    HEADS,
    D,
    N,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    SLICE: tl.constexpr,
    PACKED: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Some channels of a head: mean (E, heads, D) over all rows from the pools (E, heads, N, D), always added in one
    order. CENTRE: the pools lose it, those of blocks without rows stay 0."""
    head = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * SLICE + tl.arange(0, SLICE)
    _, _, length = entry_rows(cu, head // HEADS, L, PACKED)
    blocks = tl.cdiv(length, BLOCK)
    step = tl.arange(0, STEP)
    pools += head * N * D
    total = tl.zeros((SLICE,), tl.float32)
    for start in range(0, blocks, STEP):
        block = start + step
        inside = (block < blocks)[:, None] & (channel < D)[None, :]
        rows = tl.minimum(tl.maximum(length - block * BLOCK, 0), BLOCK).to(tl.float32)
        part = tl.load(pools + block[:, None] * D + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(part * rows[:, None], axis=0)
    centre = tl.div_rn(total, tl.zeros((SLICE,), tl.float32) + tl.maximum(length, 1).to(tl.float32))
    tl.store(mean + head * D + channel, centre, mask=channel < D)
    if CENTRE:
        for start in range(0, blocks, STEP):
            block = start + step
            inside = (block < blocks)[:, None] & (channel < D)[None, :]
            at = pools + block[:, None] * D + channel[None, :]
            tl.store(at, tl.load(at, mask=inside, other=0.0) - centre[None, :], mask=inside)


class PooledKeys(NamedTuple):
    """pools (E, G, N, D) and mean (E, G, D), float32."""

    pools: Tensor
    mean: Tensor


def pool_triton(x: Tensor, block: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
    """Means of blocks, as ``routers.pool_blocks``: one launch, one pass over x.

    Args:
        x: (B, L, heads, D), or packed (T, heads, D), any strides, float16, bfloat16 or float32, D at most 256.
        block: rows of a block, a power of two.
        cu_seqlens: int32 (S + 1) of packed sequences.
        max_seqlen: the longest of them.

    Returns:
        (B or S, heads, N, D) float32.
    """
    x = x if cu_seqlens is None else x.unsqueeze(0)
    batch, length, heads, size = x.shape
    entries, longest = batch, length
    if cu_seqlens is not None:
        if max_seqlen is None:
            raise ValueError("max_seqlen: None given beside cu_seqlens; give the longest sequence as an int")
        entries, longest = cu_seqlens.shape[0] - 1, max_seqlen
    blocks = -(-longest // block)
    pools = torch.empty(entries, heads, blocks, size, device=x.device)
    if pools.numel():
        pool_kernel[(blocks * entries * heads,)](
            x,
            cu_seqlens,
            pools,
            *x.stride(),
            length,
            heads,
            size,
            blocks,
            BLOCK=block,
            DP=padded_head_size(size),
            PACKED=cu_seqlens is not None,
            num_warps=4,
        )
    return pools


def pool_keys_triton(
    k: Tensor, block: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, centre: bool = True
) -> PooledKeys:
    """Means of blocks of keys and of all keys: two launches, one pass over k.

    Args:
        k, block, cu_seqlens, max_seqlen: as :func:`pool_triton` takes them.
        centre: take the mean of all keys off the pools, which are then those of smoothed keys.
    """
    pools = pool_triton(k, block, cu_seqlens, max_seqlen)
    entries, heads, blocks, size = pools.shape
    mean = torch.empty(entries, heads, size, device=k.device)
    if mean.numel():
        mean_of_pools_kernel[(entries * heads, -(-size // _SLICE))](
            pools,
            cu_seqlens,
            mean,
            k.shape[-3],
            heads,
            size,
            blocks,
            BLOCK=block,
            STEP=_STEP,
            SLICE=_SLICE,
            PACKED=cu_seqlens is not None,
            CENTRE=centre,
            num_warps=8,
        )
    return PooledKeys(pools, mean)


def aot_cases() -> list[AotCase]:
    """Both kernels at head size 128; they use no matrix instruction."""
    sizes = dict.fromkeys(("L", "HEADS", "D", "N"), "i32")
    strides = {f"x_stride_{axis}": "i32" for axis in ("b", "l", "h")}
    pools = {"x": "*bf16", "cu": "*i32", "pools": "*fp32", **strides, **sizes}
    means = {"pools": "*fp32", "cu": "*i32", "mean": "*fp32", **sizes}
    fixed = {"BLOCK": 64, "PACKED": True}
    chips = dict.fromkeys(CAPABILITIES, ())
    return [
        AotCase(
            "sparse_linear_pool",
            pool_kernel,
            pools,
            {**fixed, "DP": 128, "x_stride_d": 1},
            chips,
            aligned=("x", "pools", "D", *strides),
        ),
        AotCase(
            "sparse_linear_mean_of_pools",
            mean_of_pools_kernel,
            means,
            {**fixed, "STEP": _STEP, "SLICE": _SLICE, "CENTRE": True},
            chips,
            num_warps=8,
        ),
    ]
