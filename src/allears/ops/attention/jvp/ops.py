"""The kernel as a ``torch.library`` operator, without a gradient.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

import torch
from torch import Tensor


@torch.library.custom_op("allears::attention_jvp", mutates_args=())
def attention_jvp_op(
    q: Tensor, k: Tensor, v: Tensor, d_q: Tensor | None, d_k: Tensor | None, d_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q, d_q (B, L_q, H, D), k, v, d_k, d_v (B, L_k, G, D) to output and tangent (B, L_q, H, D), contiguous.

    On a GPU, or in Triton's interpreter where torch has no CUDA.
    """
    from allears.ops.attention.jvp.triton_host import attention_jvp_triton

    with torch.cuda.device_of(q):
        return attention_jvp_triton(q, k, v, d_q, d_k, d_v, scale)


@attention_jvp_op.register_fake
def _attention_jvp_fake(
    q: Tensor, k: Tensor, v: Tensor, d_q: Tensor | None, d_k: Tensor | None, d_v: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)
