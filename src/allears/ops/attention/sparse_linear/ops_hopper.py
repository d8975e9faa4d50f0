"""The 8-bit sparse-linear kernel for Hopper as ``torch.library`` operators without a gradient.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D = 128 head size, N_q blocks of 128 queries, N_k
blocks of 64 keys, R width of the row lists.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.ops import aligned_rows, like_output, no_sums
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.inputs import Projection
from allears.ops.attention.sparse_linear.ops import at_once, operator
from allears.ops.attention.sparse_linear.options import SparseLinear

BLOCK_Q, BLOCK_K = 128, 64


class Statistics(NamedTuple):
    """What one pass over q, k and v tells a router and the kernel.

    Args:
        q_pool: (B, H, N_q, D) float32, means of the queries of each block.
        k_pool: (B, G, N_k, D) float32, means of the keys of each block, as given.
        k_mean: (B, G, D) float32, mean of all keys; 0 where keys are not smoothed.
        v_max: (B, G, D) float32, largest magnitude of each channel of v.
    """

    q_pool: Tensor
    k_pool: Tensor
    k_mean: Tensor
    v_max: Tensor

    def without_pools(self) -> "Statistics":
        """What the kernel alone needs, so that the pools' memory is free."""
        nothing = self.k_mean[:0]
        return Statistics(nothing, nothing, self.k_mean, self.v_max)


def _aligned(x: Tensor) -> Tensor:
    """:func:`aligned_rows` of a 16-bit (B, L, heads, D), in a third of the time where it is as it should be."""
    a, b, c, last = x.stride()
    fits = last == 1 and a > 0 and b > 0 and c > 0 and not (a | b | c) % 8 and not x.data_ptr() % 16
    return x if fits else aligned_rows(x)


@operator("sparse_linear_statistics")
def _statistics(q: Tensor, k: Tensor, v: Tensor, smooth_k: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from allears.ops.attention.sparse_linear.hopper import host

    with torch.cuda.device_of(q):
        return tuple(host.statistics(_aligned(q), _aligned(k), _aligned(v), smooth_k))


@_statistics.register_fake
def _statistics_fake(q: Tensor, k: Tensor, v: Tensor, smooth_k: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (batch, queries, heads, size), (_, keys, groups, _) = q.shape, k.shape

    def empty(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    pools = empty(batch, heads, -(-queries // BLOCK_Q), size), empty(batch, groups, -(-keys // BLOCK_K), size)
    return *pools, empty(batch, groups, size), empty(batch, groups, size)


def block_statistics(q: Tensor, k: Tensor, v: Tensor, smooth_k: bool) -> Statistics:
    """q (B, L_q, H, 128), k and v (B, L_k, G, 128), float16 or bfloat16, on Hopper, any strides."""
    return Statistics(*at_once(_statistics, q, k, v, smooth_k))


@operator("sparse_linear_hopper")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    count: Tensor,
    ratio: Tensor,
    k_mean: Tensor,
    v_max: Tensor,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    from allears.ops.attention.sparse_linear.hopper import host

    with torch.cuda.device_of(q):
        out, lse = host.attend(
            _aligned(q), _aligned(k), _aligned(v), rows, count, ratio, k_mean, v_max, scale, need_lse
        )
    return out, lse if lse is not None else no_sums(q)


@_attend.register_fake
def _attend_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    count: Tensor,
    ratio: Tensor,
    k_mean: Tensor,
    v_max: Tensor,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    return like_output(q, need_lse)


def sparse_linear_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None,
    options: SparseLinear,
    *,
    proj: Projection | None,
    causal: bool,
    scale: float,
    need_lse: bool = True,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Run function of kernel ``"hopper"``: the form ``"sla2"``, bidirectional, in 8 bits; see
    :func:`sparse_linear_attention`. Without ``need_lse`` the second output is empty.
    """
    assert ratio is not None and proj is None and not causal, "the door sees to it"
    found = statistics or block_statistics(q, k, v, options.smooth_k)
    shape = (q.shape[0], q.shape[2], blocks.rows.shape[2])
    each = ratio.to(torch.float32).expand(shape)
    lists = blocks.rows.contiguous(), blocks.count.contiguous()
    return at_once(_attend, q, k, v, *lists, each, found.k_mean, found.v_max, scale, need_lse)
