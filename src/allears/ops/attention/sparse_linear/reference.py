"""Sparse-linear attention as its equations have it, with masks of all queries and keys; the README has the equations.

Everything is computed in float32 (float64 for float64) and differentiated by autograd.

Shapes: B batch (S sequences of a packed one), L_q queries, L_k keys, T_q and T_k rows of a packed batch, H query heads,
G key heads (H a multiple of G), D head size, N_q and N_k blocks.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, check_blocks, linear_weights, map_from_blocks
from allears.ops.attention.sparse_linear.inputs import Padding, Projection, check_call
from allears.ops.attention.sparse_linear.lowbit_reference import lowbit_softmax_branch
from allears.ops.attention.sparse_linear.options import FeatureMap, SparseLinear


class Heads(NamedTuple):
    """Operands by head, keys and values repeated for the query heads that share them.

    Args:
        queries: (B, H, L_q, D).
        keys: (B, H, L_k, D), smoothed.
        values: (B, H, L_k, D).
        mean_logits: (B, H, L_q), scale * q . k_mean, which the smoothed keys lack.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    mean_logits: Tensor


def sparse_linear_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None,
    options: SparseLinear,
    *,
    proj: Projection | None = None,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`~allears.ops.attention.sparse_linear.sparse_linear_attention`, whose arguments these are.

    On the CPU the block lists are read and checked.

    Returns:
        Output like q; natural log-sum-exp over the selected keys, (B, H, L_q) or packed (H, T_q), float32 or float64.
    """
    geometry, packing = check_call(
        q, k, v, blocks, ratio, options, proj, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        check_blocks(blocks, geometry)
    factor = softmax_scale(scale, q.shape[-1])
    padding = Padding(q, k, packing)
    with torch.autocast(q.device.type, enabled=False):
        heads = split_heads(padding.queries(q), padding.keys(k), padding.keys(v), geometry, options, factor)
        seen = geometry.tokens(q.device)
        picked = by_token(map_from_blocks(blocks, geometry.n_k), geometry) & seen
        if options.precision == "exact":
            sparse, lse = softmax_branch(heads, picked, factor)
        else:
            sparse, lse = lowbit_softmax_branch(
                heads.queries, heads.keys, heads.values, picked, factor, options, q.dtype
            )
        if options.form != "sparse":
            weights = linear_weights(blocks, geometry)
            weighed = (by_token(weights, geometry) & seen).to(sparse.dtype)
            linear = linear_branch(heads, weighed, options.feature_map)
            sparse = mix(sparse, linear, by_query(weights.any(-1), geometry), ratio, proj, geometry)
        out = sparse.transpose(1, 2).to(q.dtype)
        return padding.packed(out, lse + heads.mean_logits)


def split_heads(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, options: SparseLinear, factor: float) -> Heads:
    """q (B, L_q, H, D), k and v (B, L_k, G, D), zeros in padding, to wide operands by head with smoothed keys."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[2] // k.shape[2]
    queries, keys, values = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    mean_logits = queries.new_zeros(queries.shape[:-1])
    if options.smooth_k and not geometry.causal:
        length = torch.as_tensor(geometry.length_k, device=q.device).reshape(-1, 1, 1, 1)
        mean = keys.sum(2, keepdim=True) / length.clamp(min=1)
        exists = torch.arange(k.shape[1], device=q.device)[:, None] < length
        keys = (keys - mean).masked_fill(~exists, 0.0)
        mean_logits = factor * (queries * mean.repeat_interleave(groups, 1)).sum(-1)
    return Heads(queries, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), mean_logits)


def by_token(of_blocks: Tensor, geometry: Geometry) -> Tensor:
    """(B, H, N_q, N_k) to (B, H, L_q, L_k)."""
    rows = by_query(of_blocks.transpose(-1, -2), geometry).transpose(-1, -2)
    return rows.repeat_interleave(geometry.block_k, -1)[..., : geometry.longest_k]


def by_query(of_blocks: Tensor, geometry: Geometry) -> Tensor:
    """(..., N_q) to (..., L_q)."""
    return of_blocks.repeat_interleave(geometry.block_q, -1)[..., : geometry.longest_q]


def softmax_branch(heads: Heads, picked: Tensor, factor: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the picked keys (B, H, L_q, L_k), and its log-sum-exp of the smoothed logits.

    ``bias`` is added to the logits. A query without keys has the output 0 and -inf.
    """
    logits = heads.queries @ heads.keys.transpose(-1, -2) * factor
    logits = logits if bias is None else logits + bias
    blind = ~picked.any(-1, keepdim=True)
    logits = logits.masked_fill(~picked, -math.inf).masked_fill(blind, 0.0)
    out = logits.softmax(-1).masked_fill(blind, 0.0) @ heads.values
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.sum(-1)
    return out, lse.masked_fill(blind[..., 0], -math.inf)


def linear_branch(heads: Heads, weights: Tensor, kind: FeatureMap) -> Tensor:
    """Linear attention over keys weighted by (B, H, L_q, L_k); 0 where no weight is left."""
    products = feature_map(heads.queries, kind) @ feature_map(heads.keys, kind).transpose(-1, -2) * weights
    total = products.sum(-1, keepdim=True)
    empty = total == 0
    return products @ heads.values / total.masked_fill(empty, 1.0)


def mix(
    sparse: Tensor,
    linear: Tensor,
    has_linear: Tensor,
    ratio: Tensor | None,
    proj: Projection | None,
    geometry: Geometry,
) -> Tensor:
    """Both branches (B, H, L_q, D) as one; a query whose ``has_linear`` (B, H, L_q) is False keeps the sparse one."""
    there = has_linear[..., None]
    if ratio is not None:
        share = ratio.to(sparse.dtype).expand(*has_linear.shape[:2], geometry.n_q)
        share = torch.where(there, by_query(share, geometry)[..., None], 1.0)
        return share * sparse + (1 - share) * linear
    assert proj is not None
    weight, bias = proj
    added = linear @ weight.to(sparse.dtype).T
    added = added if bias is None else added + bias.to(sparse.dtype)
    return sparse + torch.where(there, added, 0.0)
