"""SpargeAttn's training-free choice of blocks (arXiv 2502.18137), as one more router.

Shapes: B batch (S sequences of a packed one), L rows (T of a packed batch), H query heads, G key heads, D head size,
N blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.call import Packing
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, blocks_from_map, map_from_blocks
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.routers import (
    key_mean,
    pool_blocks,
    pooled_scores,
    select_mass,
    select_top_k,
    sequences,
)
from allears.ops.attention.sparsity import check_rule


@torch.no_grad()
def spargeattn_blocks(
    q: Tensor,
    k: Tensor,
    *,
    keep: float | None = None,
    mass: float | None = None,
    similarity: float | None = None,
    options: SparseLinear | None = None,
    scale: float | None = None,
    causal: bool = False,
    packing: Packing | None = None,
) -> Blocks:
    """The best blocks by pooled scores, but all where the mean of a block says little about its rows.

    The self-similarity of a block is the mean of the cosines of all pairs of its rows, |mean of x / |x||^2, of the
    smoothed keys. A query block below ``similarity`` reads every visible key block. A key block below it is read by
    every query block, and has no part in the scores of the others.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D).
        k: (B, L_k, G, D), or packed (T_k, G, D).
        keep, mass: exactly one of them: the share of the visible blocks (``select_top_k``), or of the softmax of the
            scores (``select_mass``).
        similarity: threshold in [0, 1]; None trusts every mean.
        options: block sizes and smoothing of the keys.
        scale: of the logits; ``1 / sqrt(D)`` for None.

    Raises:
        ValueError: both or none of ``keep`` and ``mass`` are given, or a number is out of range.
    """
    check_rule(keep, mass, similarity)
    options = options or SparseLinear(form="sparse")
    geometry = Geometry.of(q, k, options, causal, packing)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = pooled_scores(q, k, options, scale=factor, causal=causal, packing=packing)
    if similarity is None:
        return _by_rule(scores, keep, mass, geometry)
    unlike_q = (_similarity_q(q, options, packing) < similarity)[..., None]
    unlike_k = (_similarity_k(k, options, causal, packing) < similarity)[:, :, None]
    unlike_k = unlike_k.repeat_interleave(q.shape[-2] // k.shape[-2], 1)
    blocks = _by_rule(scores.masked_fill(unlike_k, -math.inf), keep, mass, geometry)
    read = map_from_blocks(blocks, geometry.n_k) | unlike_q | unlike_k
    return blocks_from_map(read & geometry.visible(q.device))


def _by_rule(scores: Tensor, keep: float | None, mass: float | None, geometry: Geometry) -> Blocks:
    if keep is not None:
        return select_top_k(scores, keep, geometry=geometry)
    assert mass is not None
    return select_mass(scores, mass, geometry=geometry)


def _similarity_q(q: Tensor, options: SparseLinear, packing: Packing | None) -> Tensor:
    """(B, H, N_q)."""
    of_q, _ = sequences(packing)
    return pool_blocks(F.normalize(q.float(), dim=-1), options.block_q, *of_q).square().sum(-1)


def _similarity_k(k: Tensor, options: SparseLinear, causal: bool, packing: Packing | None) -> Tensor:
    """(B, G, N_k)."""
    _, of_k = sequences(packing)
    wide = k.float()
    if options.smooth_k and not causal:
        mean = key_mean(wide, of_k[0])
        if packing is None:
            wide = wide - mean[:, None]
        else:
            wide = wide - mean.repeat_interleave(packing.cu_seqlens_k.diff(), 0, output_size=k.shape[0])
    return pool_blocks(F.normalize(wide, dim=-1), options.block_k, *of_k).square().sum(-1)
