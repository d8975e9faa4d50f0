"""Sparse-linear attention with a soft map instead of block lists: what a router and ratio are fitted with (stage 1).

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size, N_q and N_k blocks.
"""

import torch
from torch import Tensor

from allears.ops.attention.call import check_tensors
from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.sparse_linear.blocks import Geometry
from allears.ops.attention.sparse_linear.inputs import check_mixing
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.reference import (
    by_query,
    by_token,
    linear_branch,
    mix,
    softmax_branch,
    split_heads,
)
from allears.ops.attention.sparse_linear.routers import top_k_count
from allears.ops.attention.sparse_linear.soft_top_k import soft_top_k


def soft_map(scores: Tensor, keep: float, *, geometry: Geometry, temperature: float = 0.1) -> Tensor:
    """:func:`soft_top_k` of the visible scores, with the sum that ``select_top_k`` counts; forced blocks are 1.

    Args:
        scores: (B, H, N_q, N_k).
        keep: share of the visible blocks, in (0, 1].

    Returns:
        (B, H, N_q, N_k) in [0, 1], differentiable.
    """
    forced = geometry.forced(scores.device)
    free = geometry.visible(scores.device) & ~forced
    budget = (top_k_count(keep, geometry, scores.device) - forced.sum(-1)).expand(scores.shape[:-1])
    return torch.where(forced, 1.0, soft_top_k(scores, budget, temperature, free))


def soft_sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    soft: Tensor,
    ratio: Tensor | None,
    options: SparseLinear,
    *,
    proj: tuple[Tensor, Tensor | None] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """O_s = softmax(S + log M) V and O_l with its keys weighted by 1 - M, put together as ``options.form`` has it.

    For M of zeros and ones that is the hard form, so what is fitted here holds there. The paper does not say how the
    soft mask enters; S * M inside the softmax would leave masked logits at 0 instead of -inf. It costs L_q x L_k
    memory: give it a part of the queries (whole blocks; not in causal calls).

    Args:
        q: (B, L_q, H, D).
        k, v: (B, L_k, G, D).
        soft: M, (B, H, N_q, N_k) in [0, 1], see :func:`soft_map`; what is not visible is left out, forced blocks are
            taken as 1.
        ratio, proj, causal, scale: as in ``sparse_linear_attention``.

    Returns:
        (B, L_q, H, D) in q's dtype, differentiable in all tensors.

    Raises:
        ValueError: shapes do not fit, or ``options.precision`` is not ``"exact"``.
    """
    check_tensors(q, k, v, None, False)
    geometry = Geometry.of(q, k, options, causal)
    wanted = (q.shape[0], q.shape[2], geometry.n_q, geometry.n_k)
    if tuple(soft.shape) != wanted or not soft.is_floating_point():
        raise ValueError(f"soft: {soft.dtype} of shape {tuple(soft.shape)} given; it must be floating, {wanted}")
    if options.precision != "exact":
        raise ValueError(f"options: precision {options.precision!r} given; the soft form has 'exact' only")
    check_mixing(ratio, proj, options, wanted[:3], q)
    factor = softmax_scale(scale, q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        heads = split_heads(q, k, v, geometry, options, factor)
        full, forced = geometry.full(q.device), geometry.forced(q.device)
        inside = torch.where(forced, 1.0, soft.to(heads.queries.dtype))
        picked = geometry.tokens(q.device) & by_token(inside > 0, geometry)
        log_weights = inside.clamp(min=torch.finfo(inside.dtype).tiny).log()
        sparse, _ = softmax_branch(heads, picked, factor, by_token(log_weights, geometry))
        if options.form != "sparse":
            weights = (1 - inside) * full
            linear = linear_branch(heads, by_token(weights, geometry), options.feature_map)
            sparse = mix(sparse, linear, by_query((weights > 0).any(-1), geometry), ratio, proj, geometry)
        return sparse.transpose(1, 2).to(q.dtype)
