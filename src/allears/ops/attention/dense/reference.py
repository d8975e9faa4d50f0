"""Softmax attention as it is written in the textbook, in float32 (float64 for float64 input).

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size.
"""

import math
from typing import Any

import torch
from torch import Tensor

from allears.ops.attention.call import Packing
from allears.ops.attention.dense.masks import causal_mask
from allears.ops.attention.dense.packing import run_padded


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    **packing: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """q (B, L_q, H, D), k and v (B, L_k, G, D), mask broadcastable to (B, H, L_q, L_k): boolean (True = look) or added
    to the logits. Packed sequences: see :class:`~allears.ops.attention.call.Packing`.

    Returns (B, L_q, H, D) in the dtype of q, and with ``return_lse`` the log-sum-exp (B, H, L_q) of the masked logits.
    A query that may look at nothing gives zeros, and the log-sum-exp -inf.
    """
    if packing:
        return run_padded(reference_attention, q, k, v, Packing(**packing), causal, scale, return_lse)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _attend(q.to(wide), k.to(wide), v.to(wide), mask, causal, scale)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    queries = q.transpose(1, 2)
    keys = k.transpose(1, 2).repeat_interleave(groups, dim=1)
    values = v.transpose(1, 2).repeat_interleave(groups, dim=1)
    logits = queries @ keys.transpose(-1, -2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    if causal:
        logits = logits.masked_fill(~causal_mask(q.shape[1], k.shape[1], q.device), -math.inf)
    blind = (logits == -math.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0.0)
    weights = logits.softmax(-1).masked_fill(blind, 0.0)
    lse = logits.logsumexp(-1) if k.shape[1] else logits.sum(-1)
    return (weights @ values).transpose(1, 2), lse.masked_fill(blind[..., 0], -math.inf)
