"""torch's flash attention as operators that also return the log-sum-exp, differentiable through both outputs.

``allears::flash_cpu`` is torch's CPU kernel; ``allears::flash_packed`` its CUDA kernel (FlashAttention-2, Dao, 2023) in
the form for packed sequences, causal at the bottom right. torch's own functions give a log-sum-exp without a gradient.
Its gradient here is the kernel's own backward once more: with V = 0, dO = e_1 and O = -dlse e_1 the term
dS = P (dO V^T - rowsum(dO O)) is P dlse, and dQ and dK follow from it.

Shapes: B batch, L_q queries, L_k keys, H and G heads, D head size; T_q and T_k rows of S packed sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


@torch.library.custom_op("allears::flash_cpu", mutates_args=(), device_types="cpu")
def flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k, v (B, L, H, D) of equal heads, mask added and in their dtype, causal for L_q = L_k only.

    Returns (B, L_q, H, D) and the log-sum-exp (B, H, L_q) in float32 (float64 for float64). The mask gets no gradient.
    """
    out, lse = _CPU(*_heads_first(q, k, v), 0.0, causal, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@flash_cpu.register_fake
def _flash_cpu_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=dtype)


@torch.library.custom_op("allears::flash_cpu_backward", mutates_args=(), device_types="cpu")
def flash_cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV (B, L, H, D) from dO and from what the forward returned."""
    grad, q, k, v, out = _heads_first(grad, q, k, v, out)
    grads = _CPU_BACKWARD(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in grads)
    return dq, dk, dv


@flash_cpu_backward.register_fake
def _flash_cpu_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op("allears::flash_packed", mutates_args=(), device_types="cuda")
def flash_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q (T_q, H, D), k and v (T_k, G, D), 16-bit, D a multiple of 8 up to 256; offsets int32.

    Returns (T_q, H, D) and the log-sum-exp (H, T_q) in float32; a query without keys gives 0 and +inf.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=scale
    )
    if lse.shape != (q.shape[1], q.shape[0]):
        raise RuntimeError(f"this torch returns a log-sum-exp of shape {tuple(lse.shape)} for packed sequences")
    return out.contiguous(), lse.contiguous()


@flash_packed.register_fake
def _flash_packed_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("allears::flash_packed_backward", mutates_args=(), device_types="cuda")
def flash_packed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV of :func:`flash_packed`."""
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        *(grad.contiguous(), q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(0.0, causal, no_dropout, q.new_empty(0, dtype=torch.float32)),
        scale=scale,
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@flash_packed_backward.register_fake
def _flash_packed_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    """All tensors in order, then the outputs; the remaining arguments as they are."""
    ctx.set_materialize_grads(False)
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output)
    ctx.rest = inputs[len(tensors) :]


def _lse_operands(dlse: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """dO and O that make the backward kernel return the gradient of the log-sum-exp: e_1 and -dlse e_1."""
    pad = (0, out.shape[-1] - 1)
    dlse = dlse.transpose(-1, -2)[..., None]
    return F.pad(torch.ones_like(dlse), pad).to(out.dtype), F.pad(-dlse, pad).to(out.dtype)


def _add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _flash_cpu_gradient(ctx, grad: Tensor | None, dlse: Tensor | None):
    q, k, v, mask, out, lse = ctx.saved_tensors
    dq = dk = dv = None
    if grad is not None:
        dq, dk, dv = flash_cpu_backward(grad, q, k, v, mask, out, lse, *ctx.rest)
    if dlse is not None:
        unit, minus = _lse_operands(dlse, out)
        more_q, more_k, _ = flash_cpu_backward(unit, q, k, torch.zeros_like(v), mask, minus, lse, *ctx.rest)
        dq, dk = _add(dq, more_q), _add(dk, more_k)
    return dq, dk, dv, None, None, None


def _flash_packed_gradient(ctx, grad: Tensor | None, dlse: Tensor | None):
    q, k, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    dq = dk = dv = None
    if grad is not None:
        dq, dk, dv = flash_packed_backward(grad, q, k, v, cu_q, cu_k, out, lse, *ctx.rest)
    if dlse is not None:
        unit, minus = _lse_operands(dlse, out)
        more_q, more_k, _ = flash_packed_backward(unit, q, k, torch.zeros_like(v), cu_q, cu_k, minus, lse, *ctx.rest)
        dq, dk = _add(dq, more_q), _add(dk, more_k)
    return dq, dk, dv, None, None, None, None, None, None


flash_cpu.register_autograd(_flash_cpu_gradient, setup_context=_save)
flash_packed.register_autograd(_flash_packed_gradient, setup_context=_save)
