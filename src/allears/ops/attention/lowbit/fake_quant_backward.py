"""The two backward forms of fake-quantised attention; ``fake_quant.py`` says what they are.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, R = H / G, D head size, N keys of a tile.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from allears.ops.attention.lowbit.inputs import check_inputs, softmax_scale
from allears.ops.attention.lowbit.online_softmax import (
    LOG2_E,
    exp2_below,
    hidden_keys,
    key_tiles,
    merge_heads,
    of_seen,
    split_heads,
)
from allears.ops.attention.lowbit.rounding import Rounding, rounded_operands, rounded_scores
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK, key_mean_logits, smooth_queries

Scores = Callable[[slice], Tensor]


def drop_in_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    d_lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's backward from the given q, k, v; P and dS are rounded to q's dtype before they are multiplied.

    Args:
        d_out, q, out: (B, L_q, H, D).
        k, v: (B, L_k, G, D).
        lse: (B, H, L_q), of the logits of the given k; ``d_lse`` its gradient.

    Returns:
        dQ (B, L_q, H, D), dK and dV (B, L_k, G, D), in q's dtype.
    """
    check_inputs(q, k, v)
    factor = softmax_scale(scale, q.shape[-1])
    groups, dtype = k.shape[2], q.dtype
    rows, d_rows = split_heads(q.float(), groups), split_heads(d_out.float(), groups)
    columns, values = k.transpose(1, 2).float(), v.transpose(1, 2).float()
    shift = (d_out.float() * out.float()).sum(-1).transpose(1, 2)
    shift = (shift if d_lse is None else shift - of_seen(d_lse, lse)).unflatten(1, (groups, -1)).unsqueeze(-1)
    log2_sum = (lse * LOG2_E).unflatten(1, (groups, -1)).unsqueeze(-1)
    d_q, d_k, d_v = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(values)

    def scores(tile: slice) -> Tensor:
        return (rows @ columns[:, :, None, tile].transpose(-1, -2)) * (factor * LOG2_E)

    for tile in key_tiles(k.shape[1]):
        weights = exp2_below(_masked(scores, tile, q.shape[1], k.shape[1], causal), log2_sum)
        d_logits = weights * (d_rows @ values[:, :, None, tile].transpose(-1, -2) - shift)
        d_logits = d_logits.to(dtype).float()
        d_v[:, :, tile] = (weights.to(dtype).float().transpose(-1, -2) @ d_rows).sum(2)
        d_k[:, :, tile] = (d_logits.transpose(-1, -2) @ rows).sum(2)
        d_q += d_logits @ columns[:, :, None, tile]
    return (
        merge_heads(d_q * factor).to(dtype),
        (d_k * factor).transpose(1, 2).to(dtype),
        d_v.transpose(1, 2).to(dtype),
    )


def matched_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    rounding: Rounding,
    *,
    smooth_q: bool,
    smooth_k: bool,
    d_lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative of the rounded forward, straight through every rounding.

    O' is computed again here; a kernel may keep it from its forward instead. Arguments and results as in
    :func:`drop_in_backward`; ``rounding``, ``smooth_q`` and ``smooth_k`` are those of the forward.
    """
    check_inputs(q, k, v)
    factor = softmax_scale(scale, q.shape[-1])
    groups, dtype, queries, keys = k.shape[2], q.dtype, q.shape[1], k.shape[1]
    parts = rounded_operands(q, k, v, rounding, smooth_q=smooth_q, smooth_k=smooth_k)
    scores = rounded_scores(parts, factor)
    rows, d_rows = split_heads(parts.queries, groups), split_heads(d_out.float(), groups)
    columns, values = parts.keys.transpose(1, 2), parts.values.transpose(1, 2)
    smoothed = lse if parts.k_mean is None else lse - factor * key_mean_logits(q, parts.k_mean)
    log2_sum = (smoothed * LOG2_E).unflatten(1, (groups, -1)).unsqueeze(-1)

    maximum = torch.full_like(log2_sum, -math.inf)
    maxima, wide_out = [], torch.zeros_like(d_rows)
    for tile in key_tiles(keys):
        logits = _masked(scores, tile, queries, keys, causal)
        maximum = torch.maximum(maximum, logits.amax(-1, keepdim=True))
        maxima.append(maximum)
        wide_out += exp2_below(logits, log2_sum) @ values[:, :, None, tile]
    shift = (d_rows * wide_out).sum(-1, keepdim=True)
    d_sums = None if d_lse is None else of_seen(d_lse, lse).unflatten(1, (groups, -1)).unsqueeze(-1)
    if d_sums is not None:
        shift = shift - d_sums

    d_q, d_k, d_v = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(values)
    d_from_mean = torch.zeros_like(rows)  # dS times what K lost by rounding: only the mean of q sees it
    means = None if parts.q_mean is None else _spread(parts.q_mean, groups, queries)
    for tile, maximum in zip(key_tiles(keys), maxima, strict=True):
        logits = _masked(scores, tile, queries, keys, causal)
        weights = exp2_below(logits, log2_sum)
        rounded = rounding.weights(exp2_below(logits, maximum)) * exp2_below(maximum, log2_sum)
        d_logits = weights * (d_rows @ values[:, :, None, tile].transpose(-1, -2) - shift)
        d_logits = d_logits.to(dtype).float()
        d_v[:, :, tile] = (rounded.to(dtype).float().transpose(-1, -2) @ d_rows).sum(2)
        d_k[:, :, tile] = (d_logits.transpose(-1, -2) @ (rows if means is None else rows + means)).sum(2)
        d_q += d_logits @ columns[:, :, None, tile]
        if means is not None:
            lost = (parts.smooth_keys - parts.keys).transpose(1, 2)[:, :, None, tile]
            d_from_mean += d_logits @ lost
    if means is not None:
        d_q = d_q + _spread(_block_means(d_from_mean), groups, queries)
    d_q, d_k = d_q * factor, d_k * factor
    if parts.k_mean is not None:
        d_mean = -d_k.sum(2)
        if d_sums is not None:
            d_q = d_q + factor * d_sums * parts.k_mean[:, :, None, None]
            d_mean = d_mean + factor * (d_sums * split_heads(q.float(), groups)).sum((2, 3))
        d_k = d_k + d_mean.unsqueeze(2) / max(keys, 1)
    return merge_heads(d_q).to(dtype), d_k.transpose(1, 2).to(dtype), d_v.transpose(1, 2).to(dtype)


def _masked(scores: Scores, tile: slice, queries: int, keys: int, causal: bool) -> Tensor:
    logits = scores(tile)
    return logits.masked_fill(hidden_keys(queries, keys, tile, logits.device), -math.inf) if causal else logits


def _block_means(x: Tensor) -> Tensor:
    """(B, G, R, L_q, D) -> the mean of each block of 128 queries, (B, M, H, D)."""
    return smooth_queries(merge_heads(x))[1]


def _spread(means: Tensor, groups: int, queries: int) -> Tensor:
    """Means of blocks (B, M, H, D) -> one for each query, (B, G, R, L_q, D)."""
    return split_heads(means.repeat_interleave(QUERY_BLOCK, dim=1)[:, :queries], groups)
