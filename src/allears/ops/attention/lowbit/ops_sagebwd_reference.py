"""The reference of sagebwd, INT8 attention that trains, as a ``torch.library`` operator with a gradient, on any device.

Its backward runs the forward again for the 8-bit copies, and keeps none of them. Autocast is off inside. Packed
sequences run one by one, which waits for the GPU.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size; packed T_q, T_k
rows of S sequences.
"""

from typing import Any, cast

import torch
from torch import Tensor

from allears.ops.attention.lowbit.ops import like_output
from allears.ops.attention.lowbit.ops_reference import without_autocast
from allears.ops.attention.lowbit.options import GradScales, LowBit
from allears.ops.attention.lowbit.sagebwd_reference import sagebwd_backward, sagebwd_forward
from allears.ops.attention.lowbit.varlen import backward_over_sequences, over_sequences


def sagebwd_options(smooth_k: bool, smooth_q: bool, grad_scales: str) -> LowBit:
    """The options of sagebwd from what an operator takes."""
    return LowBit(smooth_k=smooth_k, smooth_q=smooth_q, grad_scales=cast(GradScales, grad_scales))


@torch.library.custom_op("allears::sagebwd_attention_reference", mutates_args=())
def sagebwd_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool,
    grad_scales: str,
) -> tuple[Tensor, Tensor]:
    """SageBwd by its reference, differentiable in both results.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D); float16, bfloat16 or float32, D up to 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1) of packed sequences.
        scale: factor on the logits.
        smooth_k, smooth_q, grad_scales: see :class:`LowBit`.

    Returns:
        Output like q and the log-sum-exp, float32 (B, H, L_q) or (H, T_q), both contiguous.
    """
    options = sagebwd_options(smooth_k, smooth_q, grad_scales)

    def one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return sagebwd_forward(q, k, v, causal=causal, scale=scale, options=options)[:2]

    with without_autocast(q):
        if cu_seqlens_q is None or cu_seqlens_k is None:
            out, lse = one(q, k, v)
        else:
            out, lse = over_sequences(one, q, k, v, cu_seqlens_q, cu_seqlens_k)
    return out.contiguous(), lse.contiguous()


@sagebwd_reference.register_fake
def _reference_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like_output(q)


@torch.library.custom_op("allears::sagebwd_attention_reference_backward", mutates_args=())
def sagebwd_reference_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool,
    grad_scales: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sagebwd_reference`; the forward runs again for what it saves."""
    how: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "options": sagebwd_options(smooth_k, smooth_q, grad_scales),
    }

    def one(q: Tensor, d_out: Tensor, k: Tensor, v: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        _, _, saved = sagebwd_forward(q, k, v, **how)
        return sagebwd_backward(d_out, saved, d_lse=d_lse, **how)

    with without_autocast(q):
        if cu_seqlens_q is None or cu_seqlens_k is None:
            d_q, d_k, d_v = one(q, d_out, k, v, d_lse)
        else:
            d_q, d_k, d_v = backward_over_sequences(one, (q, d_out), (k, v), (d_lse,), cu_seqlens_q, cu_seqlens_k)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@sagebwd_reference_backward.register_fake
def _reference_backward_fake(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_reference(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]
    ctx.set_materialize_grads(False)


def _reference_gradient(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (2 + len(ctx.rest))
    if d_out is None and d_lse is None:
        return None, None, None, *nothing
    d_out = torch.zeros_like(ctx.saved_tensors[0]) if d_out is None else d_out
    return *sagebwd_reference_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.rest), *nothing


sagebwd_reference.register_autograd(_reference_gradient, setup_context=_keep_reference)
