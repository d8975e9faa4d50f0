"""Sparse-linear attention by Triton kernels as a ``torch.library`` operator with gradients.

Beside q, k, v and the block lists its backward needs the output, the log-sum-exp and the mean of K, which are results
of the forward's operator, so that autograd, torch.compile and checkpoints keep or drop them as they do any tensor.
Nothing waits for the GPU.

Shapes: B batch, E entries (B, or S packed sequences), L_q queries, L_k keys, packed T_q, T_k rows, H query heads, G key
heads, D head size, N_q, N_k blocks, R width of the row lists.
"""

from typing import Any

import torch
from torch import Tensor

from allears.ops.attention.lowbit.ops import like_output
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.options import SparseLinear


@torch.library.custom_op("allears::sparse_linear_attention_triton", mutates_args=())
def sparse_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    count: Tensor,
    linear: Tensor | None,
    ratio: Tensor | None,
    k_mean: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    form: str,
    block_q: int,
    block_k: int,
    feature_map: str,
    smooth_k: bool,
    precision: str,
    backward: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward, differentiable in its first and its last result with respect to q, k, v and ratio.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D), any strides, float16, bfloat16 or float32, D up to 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        rows, count, linear: see :class:`Blocks`.
        ratio: (E, H, N_q) float32 of the form "sla2", else None.
        k_mean: (E, G, D) float32 of a router that has made it already, or None. Gradients go through it as the mean
            of k that it is, whether it is given or not.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1) of packed sequences, of which the longest have max_seqlen_q queries
            and max_seqlen_k keys.
        form, block_q, block_k, feature_map, smooth_k, precision, backward: see :class:`SparseLinear`.
        scale: factor on the logits of the softmax branch.

    Returns:
        Output like q, of the form "sla" that of the softmax branch; the log-sum-exp, float32 (B, H, L_q) or (H, T_q),
        without a gradient; k_mean where it is made, else empty; the output of the linear branch, like q, of the form
        "sla", else empty.
    """
    from allears.ops.attention.sparse_linear.triton_host import sparse_linear_forward_triton

    options = SparseLinear(form, block_q, block_k, feature_map, smooth_k, precision, backward)  # pyrefly: ignore
    with torch.cuda.device_of(q):
        made = sparse_linear_forward_triton(
            q,
            k,
            v,
            Blocks(rows, count, linear),
            ratio,
            options,
            causal=causal,
            scale=scale,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            k_mean=k_mean,
        )
    mean = made.k_mean if made.k_mean is not None and k_mean is None else made.lse.new_empty(0)
    return made.out, made.lse, mean, made.o_linear if made.o_linear is not None else made.out.new_empty(0)


@sparse_linear_attention_triton.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    count: Tensor,
    linear: Tensor | None,
    ratio: Tensor | None,
    k_mean: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    form: str,
    block_q: int,
    block_k: int,
    feature_map: str,
    smooth_k: bool,
    precision: str,
    backward: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = like_output(q)
    makes_mean = k_mean is None and smooth_k and not causal and (form != "sparse" or precision != "exact")
    mean = lse.new_empty((rows.shape[0], *k.shape[-2:]) if makes_mean else (0,))
    return out, lse, mean, q.new_empty(q.shape if form == "sla" else (0,))


@torch.library.custom_op("allears::sparse_linear_attention_triton_backward", mutates_args=())
def sparse_linear_attention_triton_backward(
    d_out: Tensor,
    d_linear: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    count: Tensor,
    linear: Tensor | None,
    ratio: Tensor | None,
    k_mean: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    form: str,
    block_q: int,
    block_k: int,
    feature_map: str,
    smooth_k: bool,
    precision: str,
    backward: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`sparse_linear_attention_triton` from its arguments and what it returned: like q, k and v,
    contiguous, and like ratio, empty without one. d_linear is that of its last result in the form "sla", else None.
    """
    from allears.ops.attention.sparse_linear import triton_bwd_host

    options = SparseLinear(form, block_q, block_k, feature_map, smooth_k, precision, backward)  # pyrefly: ignore
    lists = (Blocks(rows, count, linear), options, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    with torch.cuda.device_of(q):
        d_q, d_k, d_v, d_ratio = triton_bwd_host.packed_backward(
            d_out, d_linear, out, lse, (q, k, v), ratio, k_mean, *lists, scale
        )
    return d_q, d_k, d_v, d_ratio if d_ratio is not None else lse.new_empty(0)


@sparse_linear_attention_triton_backward.register_fake
def _backward_fake(
    d_out: Tensor, d_linear: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratio = rest[3]
    d_ratio = lse.new_empty(0 if ratio is None else ratio.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_ratio


_TENSORS = 10  # of the forward's arguments, k_mean the eighth


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, lse, mean, _ = output
    tensors = [*inputs[:_TENSORS]]
    tensors[7] = mean if mean.numel() else tensors[7]
    ctx.save_for_backward(out, lse, *tensors)
    ctx.rest = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, d_mean: Tensor | None, d_linear: Tensor | None
) -> tuple[Tensor | None, ...]:
    if d_lse is not None or d_mean is not None:
        raise ValueError(
            "lse: its gradient is asked for, which the Triton kernels of sparse-linear attention do not have; take "
            "return_lse=False, detach it, or use kernel='reference'"
        )
    nothing = (None,) * len(ctx.rest)
    if d_out is None and d_linear is None:
        return (None,) * _TENSORS + nothing
    saved = ctx.saved_tensors  # once, as checkpoints ask
    out = saved[0]
    d_out = torch.zeros_like(out) if d_out is None else d_out
    if ctx.rest[2] != "sla":
        d_linear = None
    elif d_linear is None:
        d_linear = torch.zeros_like(out)
    d_q, d_k, d_v, d_ratio = sparse_linear_attention_triton_backward(d_out, d_linear, *saved, *ctx.rest)
    mixes = ctx.rest[2] == "sla2"
    return d_q, d_k, d_v, None, None, None, d_ratio if mixes else None, None, None, None, *nothing


sparse_linear_attention_triton.register_autograd(_gradient, setup_context=_keep)
