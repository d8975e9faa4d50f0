"""torch's scaled_dot_product_attention in our layout: it picks cuDNN, flash, memory-efficient or plain kernels
itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.dense.reference import causal_mask


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """As :func:`reference_attention`, in the dtype of the inputs; a masked call must leave each query at least one
    key.
    """
    flag = causal and mask is None and q.shape[1] == k.shape[1]
    if causal and not flag:
        look = causal_mask(q.shape[1], k.shape[1], q.device)
        if mask is None:
            mask = look
        else:
            mask = mask & look if mask.dtype == torch.bool else mask.masked_fill(~look, float("-inf"))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=flag,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
