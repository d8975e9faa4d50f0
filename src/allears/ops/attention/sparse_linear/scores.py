"""Scores of blocks from their means and a router's projections.

Shapes: B batch, H query heads, G key heads (H a multiple of G), D head size, N_q and N_k blocks of queries and keys.
"""

import torch
from torch import Tensor

from allears.ops.attention.lowbit.inputs import LARGEST_HEAD_SIZE
from allears.ops.attention.sparse_linear.ops import at_once, sparse_linear_scores
from allears.ops.attention.sparse_linear.routers import block_scores
from allears.ops.triton_here import triton_missing


def projected_scores(
    q_pool: Tensor,
    k_pool: Tensor,
    k_mean: Tensor | None,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    scale: float,
) -> Tensor:
    """Logits of blocks (B, H, N_q, N_k): scale * (q_pool proj_q) . ((k_pool - k_mean) proj_k), in float32 by torch; on
    a GPU, where nobody asks for a gradient, by a kernel whose last product has TF32 factors.

    Args:
        q_pool: (B, H, N_q, D), see :func:`pool_blocks`.
        k_pool: (B, G, N_k, D), smoothed, or with ``k_mean`` (B, G, D) as given.
        proj_q, proj_k: (H, D, D) and (G, D, D), or None for both.
    """
    given = [x for x in (q_pool, k_pool, proj_q, proj_k) if x is not None]
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if (
        q_pool.is_cuda
        and not learned
        and all(x.dtype == torch.float32 for x in given)
        and q_pool.shape[-1] <= LARGEST_HEAD_SIZE
        and not triton_missing()
    ):
        return at_once(sparse_linear_scores, q_pool, k_pool, k_mean, proj_q, proj_k, scale)
    if k_mean is not None:
        k_pool = k_pool - k_mean[:, :, None]
    if proj_q is not None and proj_k is not None:
        q_pool, k_pool = q_pool.float() @ proj_q.float(), k_pool.float() @ proj_k.float()
    return block_scores(q_pool, k_pool, scale)
