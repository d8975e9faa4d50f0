"""Smoothing: what K and Q lose before they are quantised, and what the scores get back.

Shapes: B batch, L tokens (L_q queries, L_k keys), H query heads, G key heads (H a multiple of G), D head size,
M = ceil(L_q / 128) blocks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.lowbit.online_softmax import LOG2_E

QUERY_BLOCK = 128  # queries that share a mean


def smooth_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """K without its mean over tokens (SageAttention, arXiv 2410.02367, section 4.2).

    Each row of the scores moves by ``scale * q . k_mean``, so that the softmax is unchanged.

    Args:
        k: (B, L_k, G, D), one sequence along L_k (sequences that were packed together are smoothed one by one).

    Returns:
        float32 (B, L_k, G, D), and the mean, float32 (B, G, D); the mean of no keys is 0.
    """
    wide = k.float()
    mean = wide.mean(1) if k.shape[1] else wide.new_zeros(k.shape[0], *k.shape[2:])
    return wide - mean.unsqueeze(1), mean


def smooth_queries(q: Tensor, block: int = QUERY_BLOCK) -> tuple[Tensor, Tensor]:
    """Q without the mean of each block of ``block`` tokens (SageAttention3, arXiv 2505.11594).

    The scores lose ``q_mean . k``, which :func:`query_correction` gives back. A last block that is shorter has the mean
    of its own tokens.

    Args:
        q: (B, L_q, H, D).

    Returns:
        float32 (B, L_q, H, D), and the means, float32 (B, M, H, D).
    """
    wide = q.float()
    length = q.shape[1]
    blocks = F.pad(wide, (0, 0, 0, 0, 0, -length % block)).unflatten(1, (-(-length // block), block))
    count = torch.full((blocks.shape[1],), float(block), device=q.device)
    if length % block:
        count[-1] = length % block
    mean = blocks.sum(2) / count[:, None, None]
    return wide - mean.repeat_interleave(block, dim=1)[:, :length], mean


def query_correction(q_mean: Tensor, k: Tensor) -> Tensor:
    """The term of the scores that smoothed queries lose, in float32: (B, H, M, L_k), not yet scaled.

    Args:
        q_mean: (B, M, H, D), from :func:`smooth_queries`.
        k: (B, L_k, G, D), after its own smoothing, not quantised.
    """
    ratio = q_mean.shape[2] // k.shape[2]
    keys = k.float().repeat_interleave(ratio, dim=2)
    return torch.einsum("bmhd,bnhd->bhmn", q_mean.float(), keys)


def key_mean_logits(q: Tensor, k_mean: Tensor) -> Tensor:
    """``q . k_mean`` in float32, (B, H, L_q): what the log-sum-exp of smoothed keys lacks, before the softmax scale."""
    ratio = q.shape[2] // k_mean.shape[1]
    return torch.einsum("blhd,bhd->bhl", q.float(), k_mean.float().repeat_interleave(ratio, dim=1))


def corrected(
    scores: Callable[[slice], Tensor], correction: Tensor, factor: float, queries: int, groups: int
) -> Callable[[slice], Tensor]:
    """``scores`` (tile -> (B, G, R, L_q, N), base 2) plus the correction of smoothed queries, (B, H, M, L_k)."""
    added = (correction * (factor * LOG2_E)).unflatten(1, (groups, -1))

    def with_correction(tile: slice) -> Tensor:
        return scores(tile) + added[..., tile].repeat_interleave(QUERY_BLOCK, dim=3)[:, :, :, :queries]

    return with_correction
