"""Attention and its derivative along given tangents, as it is written, in float32 (float64 for float64 input).

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size.
"""

import math

import torch
from torch import Tensor


def attention_jvp_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor | None,
    d_k: Tensor | None,
    d_v: Tensor | None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and its directional derivative (rCM, arXiv 2510.08431, section 3.1).

    With S the logits and P their softmax: dS = scale (dq k^T + q dk^T) and dO = P dv + (P * dS) v - rowsum(P * dS) O.

    Args:
        q: (B, L_q, H, D).
        k, v: (B, L_k, G, D).
        d_q, d_k, d_v: tangents shaped as q, k and v; ``None`` stands for zeros.
        scale: factor on the logits; ``None`` means D^-0.5.

    Returns:
        Output and tangent, (B, L_q, H, D) in the dtype of q.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    groups = q.shape[2] // k.shape[2]

    def per_head(x: Tensor) -> Tensor:
        return x.to(wide).transpose(1, 2)

    def shared(x: Tensor) -> Tensor:
        return per_head(x).repeat_interleave(groups, dim=1)

    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = per_head(q), shared(k), shared(v)
        weights = (queries @ keys.mT * factor).softmax(-1)
        out = weights @ values
        change = torch.zeros_like(weights)
        if d_q is not None:
            change = change + per_head(d_q) @ keys.mT
        if d_k is not None:
            change = change + queries @ shared(d_k).mT
        moved = weights * change * factor
        tangent = moved @ values - moved.sum(-1, keepdim=True) * out
        if d_v is not None:
            tangent = tangent + weights @ shared(d_v)
    return out.transpose(1, 2).to(q.dtype), tangent.transpose(1, 2).to(q.dtype)
