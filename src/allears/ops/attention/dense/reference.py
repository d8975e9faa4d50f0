"""Softmax attention as it is written in the textbook, in float32 (float64 for float64 input).

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size.
"""

import math

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(L_q, L_k) boolean, True where a query may look; aligned at the bottom right."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """q (B, L_q, H, D), k and v (B, L_k, G, D), mask broadcastable to (B, H, L_q, L_k):
    boolean (True = look) or added to the logits.

    A query that may look at nothing gives zeros.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    groups = q.shape[2] // k.shape[2]
    queries = q.transpose(1, 2).to(wide)
    keys = k.transpose(1, 2).to(wide).repeat_interleave(groups, dim=1)
    values = v.transpose(1, 2).to(wide).repeat_interleave(groups, dim=1)
    logits = queries @ keys.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(wide)
    if causal:
        logits = logits.masked_fill(~causal_mask(q.shape[1], k.shape[1], q.device), -math.inf)
    blind = (logits == -math.inf).all(-1, keepdim=True)
    weights = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return (weights @ values).transpose(1, 2).to(q.dtype)
