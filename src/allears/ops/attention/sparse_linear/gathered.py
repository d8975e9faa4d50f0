"""Sparse-linear attention on a CPU without masks of all queries and keys: the chosen key blocks are gathered, and the
linear branch sums states of whole blocks.

Work and memory fall with the share of blocks that is chosen, as in the GPU kernels. Float32 (float64 for float64),
differentiable by autograd.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size, N_q and N_k blocks of S_q queries and
S_k keys, R width of the row lists.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, check_blocks, linear_weights
from allears.ops.attention.sparse_linear.inputs import Projection, check_call
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.reference import Heads, by_query, mix, split_heads


def sparse_linear_gathered(
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
    """See :func:`~allears.ops.attention.sparse_linear.reference.sparse_linear_reference`, of which it computes the
    exact, bidirectional calls of sequences of one length.

    Returns:
        Output like q (B, L_q, H, D); log-sum-exp over the selected keys, (B, H, L_q), float32 or float64.
    """
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    geometry, _ = check_call(q, k, v, blocks, ratio, options, proj, causal, *packing)
    assert not causal and cu_seqlens_q is None and options.precision == "exact", "the door asks for no others"
    if not torch.compiler.is_compiling():
        check_blocks(blocks, geometry)
    factor = softmax_scale(scale, q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        heads = split_heads(q, k, v, geometry, options, factor)
        queries = _in_blocks(heads.queries, geometry.block_q, geometry.n_q)
        out, lse = _softmax_branch(queries, heads, blocks, geometry, factor)
        if options.form != "sparse":
            weights = linear_weights(blocks, geometry)
            linear = _linear_branch(queries, heads, weights, geometry, options)
            out = mix(out, linear, by_query(weights.any(-1), geometry), ratio, proj, geometry)
        return out.transpose(1, 2).to(q.dtype), lse + heads.mean_logits


def _in_blocks(x: Tensor, size: int, count: int) -> Tensor:
    """(B, H, L, D) to (B, H, N, S, D), zeros behind the last row."""
    return F.pad(x, (0, 0, 0, size * count - x.shape[2])).unflatten(2, (count, size))


def _there(geometry: Geometry, device: torch.device) -> Tensor:
    """(N_k, S_k) bool: the key exists."""
    count = geometry.n_k * geometry.block_k
    return (torch.arange(count, device=device) < geometry.longest[1]).view(geometry.n_k, geometry.block_k)


def _softmax_branch(
    queries: Tensor, heads: Heads, blocks: Blocks, geometry: Geometry, factor: float
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, N_q, S_q, D) against the keys of their blocks: (B, H, L_q, D), and the log-sum-exp (B, H, L_q)."""
    place = torch.arange(blocks.rows.shape[-1], device=queries.device)
    valid = place < blocks.count[..., None]
    at = blocks.rows.long().masked_fill(~valid, 0)
    picked = (_there(geometry, queries.device)[at] & valid[..., None]).flatten(-2)[..., None, :]
    keys, values = (
        _take(_in_blocks(x, geometry.block_k, geometry.n_k), at).flatten(3, 4) for x in (heads.keys, heads.values)
    )
    logits = queries @ keys.transpose(-1, -2) * factor
    blind = ~picked.any(-1, keepdim=True)
    logits = logits.masked_fill(~picked, -math.inf).masked_fill(blind, 0.0)
    out = logits.softmax(-1).masked_fill(blind, 0.0) @ values
    lse = logits.logsumexp(-1) if logits.shape[-1] else logits.sum(-1)
    lse = lse.masked_fill(blind[..., 0], -math.inf)
    return out.flatten(2, 3)[:, :, : geometry.longest[0]], lse.flatten(2)[..., : geometry.longest[0]]


def _take(x: Tensor, at: Tensor) -> Tensor:
    """The blocks of x (B, H, N_k, S_k, D) at (B, H, N_q, R): (B, H, N_q, R, S_k, D)."""
    batch, heads = at.shape[:2]
    b = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    h = torch.arange(heads, device=x.device).view(1, -1, 1, 1)
    return x[b, h, at]


def _linear_branch(queries: Tensor, heads: Heads, weights: Tensor, geometry: Geometry, options: SparseLinear) -> Tensor:
    """Linear attention over the key blocks whose weight (B, H, N_q, N_k) is True: (B, H, L_q, D); 0 where there are
    none."""
    there = _there(geometry, queries.device)[..., None]
    features = feature_map(_in_blocks(heads.keys, geometry.block_k, geometry.n_k), options.feature_map) * there
    values = F.pad(_in_blocks(heads.values, geometry.block_k, geometry.n_k), (0, 1), value=1.0)
    states = features.transpose(-1, -2) @ values  # (B, H, N_k, D, D + 1)
    summed = (weights.to(states.dtype) @ states.flatten(3)).unflatten(-1, states.shape[-2:])
    found = feature_map(queries, options.feature_map) @ summed
    total = found[..., -1:]
    out = found[..., :-1] / total.masked_fill(total == 0, 1.0)
    return out.flatten(2, 3)[:, :, : geometry.longest[0]]
