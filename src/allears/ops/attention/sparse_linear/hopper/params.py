"""What the kernels for Hopper are given: the structures of ``prepare.cu`` and ``forward.cu``, and their scratch memory.

Shapes: B batch, C key heads of a launch, D = 128 head size, N_k blocks of 64 keys.
"""

import ctypes
from ctypes import c_float, c_int, c_longlong, c_void_p
from itertools import accumulate
from typing import NamedTuple

from allears.ops.attention.sparse_linear.ops_hopper import BLOCK_K

HEAD_DIM = 128
COLUMNS = 136  # of h: the channels of V, one of ones, and what fills up to a multiple of 8


class PrepareParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "q", "k", "v", "q_pool", "k_pool", "k_mean", "v_max", "partial", "done", "records", "k_scale", "counter",
        )
    ) + tuple(
        (f"{x}_{axis}", c_longlong) for x in ("q", "k", "v") for axis in ("batch", "row", "head")
    ) + tuple(
        (name, c_int)
        for name in (
            "heads", "groups", "queries", "keys", "q_blocks", "k_blocks", "q_parts", "k_parts", "smooth",
            "first_group", "all_groups",
        )
    )  # fmt: skip


class ForwardParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "lse", "rows", "counts", "ratio", "records", "k_scale", "k_mean", "v_max", "partial", "share_ones",
            "totals", "total_ones", "counter",
        )
    ) + tuple(
        (name, c_int)
        for name in (
            "batches", "heads", "groups", "queries", "keys", "q_blocks", "k_blocks", "width", "splits",
            "first_head", "all_heads", "ratio_batch", "ratio_head", "ratio_block", "share_row",
        )
    ) + (("scale", c_float),)  # fmt: skip


class Scratch(NamedTuple):
    """Bytes of what C key heads need between kernels, one after the other, each from a multiple of 256 on.

    Args:
        records: (B * C, N_k, 3, 64 * D) bytes: K, phi(K) and V of each block, as the products read them.
        k_scale: (B * C, N_k) float32.
        shares: (splits, B * C, D, D) float32, shares of the sum of h over all blocks.
        share_ones: (splits, B * C, D) float32, the same of a column of ones.
        totals: (B * C, D, D) float32, their sum in the order of the kernel's registers.
        total_ones: (B * C, D) float32, of the column of ones.
        counter: an int32.
    """

    records: int
    k_scale: int
    shares: int
    share_ones: int
    totals: int
    total_ones: int
    counter: int

    @classmethod
    def of(cls, key_heads: int, k_blocks: int, splits: int) -> "Scratch":
        state = key_heads * HEAD_DIM * 4
        records, scales = key_heads * k_blocks * 3 * BLOCK_K * HEAD_DIM, key_heads * k_blocks * 4
        return cls(records, scales, splits * state * HEAD_DIM, splits * state, state * HEAD_DIM, state, 4)

    def places(self) -> tuple[list[int], int]:
        """Where each begins, and how many bytes they are together."""
        *starts, end = accumulate((-(-size // 256) * 256 for size in self), initial=0)
        return starts, end
