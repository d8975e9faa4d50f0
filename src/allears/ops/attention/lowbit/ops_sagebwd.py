"""The GPU kernels of sagebwd, INT8 attention that trains, as ``torch.library`` operators with gradients.

What a backward needs are further results of the forward's operator, so that autograd, torch.compile and checkpoints
keep or drop it as they do any tensor: beside v and the output the 8-bit Q and K, and a few numbers a row and a block.
Nothing waits for the GPU.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size, DP = D padded to
what the Triton kernels know, N blocks of 128 keys, M blocks of 128 queries; packed T_q, T_k rows of S sequences; E =
S if packed else B.
"""

from typing import Any

import torch
from torch import Tensor

from allears.ops.attention.lowbit.ops import aligned_rows, like_output, no_sums
from allears.ops.attention.lowbit.ops_sagebwd_reference import sagebwd_options
from allears.ops.attention.lowbit.quantise import KEY_BLOCK
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK

_TRITON_HEAD_SIZES = (32, 64, 128, 256)


@torch.library.custom_op("allears::sagebwd_attention_triton", mutates_args=())
def sagebwd_triton(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SageBwd by the Triton kernels, differentiable in its first two results.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D), any strides, float16, bfloat16 or float32, D up to 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1) of packed sequences.
        scale: factor on the logits.
        smooth_k, smooth_q, grad_scales: see :class:`LowBit`.

    Returns:
        Output like q and the log-sum-exp, float32 (B, H, L_q) or (H, T_q); then, for the backward and with B = 1 if
        packed, q8 (B, H, L_q, DP), q_scale (B, H, L_q), k8 (B, G, N * 128, DP), k_scale (B, G, N), k_mean (E, G, DP) or
        empty without smoothing, the log-sum-exp of the smoothed scores (B, H, L_q), and the means of Q (B, H, M, DP) or
        empty without smoothing.
    """
    from allears.ops.attention.lowbit import triton_host

    with torch.cuda.device_of(q):
        out, lse, saved = triton_host.sagebwd_forward(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            options=sagebwd_options(smooth_k, smooth_q, grad_scales),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    k_mean, q_mean = (mean if mean is not None else no_sums(q) for mean in (saved.k_mean, saved.q_mean))
    return out, lse, saved.q8, saved.q_scale, saved.k8, saved.k_scale, k_mean, saved.lse, q_mean


@sagebwd_triton.register_fake
def _triton_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    queries, heads, size = q.shape[-3:]
    keys, groups = k.shape[-3:-1]
    padded = next(known for known in _TRITON_HEAD_SIZES if size <= known)
    if cu_seqlens_q is None:
        batch = entries = q.shape[0]
        blocks = (keys + KEY_BLOCK - 1) // KEY_BLOCK
    else:
        batch, entries = 1, cu_seqlens_q.shape[0] - 1
        blocks = keys // KEY_BLOCK + entries
    means = (queries + QUERY_BLOCK - 1) // QUERY_BLOCK
    rows, blocked = (batch, heads, queries), (batch, groups, blocks)
    return (
        *like_output(q),
        q.new_empty((*rows, padded), dtype=torch.int8),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty((batch, groups, blocks * KEY_BLOCK, padded), dtype=torch.int8),
        q.new_empty(blocked, dtype=torch.float32),
        q.new_empty((entries, groups, padded) if smooth_k else (0,), dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty((batch, heads, means, padded) if smooth_q else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("allears::sagebwd_attention_triton_backward", mutates_args=())
def sagebwd_triton_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    out: Tensor,
    q8: Tensor,
    q_scale: Tensor,
    k8: Tensor,
    k_scale: Tensor,
    k_mean: Tensor,
    smoothed: Tensor,
    q_mean: Tensor,
    k: Tensor | None,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool,
    grad_scales: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sagebwd_triton` from what it returned, and with ``smooth_q`` from k: like q, k and v,
    contiguous, in the dtype of v."""
    from allears.ops.attention.lowbit import triton_host

    saved = triton_host.TritonSaved(
        q8, q_scale, k8, k_scale, v, k_mean if smooth_k else None, out, smoothed, cu_seqlens_q, cu_seqlens_k
    )
    saved = saved._replace(q_mean=q_mean, k=k) if smooth_q else saved
    options = sagebwd_options(smooth_k, smooth_q, grad_scales)
    with torch.cuda.device_of(d_out):
        return triton_host.sagebwd_backward(d_out, saved, d_lse=d_lse, causal=causal, scale=scale, options=options)


@sagebwd_triton_backward.register_fake
def _triton_backward_fake(d_out: Tensor, d_lse: Tensor | None, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return d_out.new_empty(d_out.shape), v.new_empty(v.shape), v.new_empty(v.shape)


def _keep_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, *saved = output
    smooth_q = inputs[8]
    ctx.save_for_backward(*inputs[2:5], out, *saved, inputs[1] if smooth_q else None)
    ctx.rest = inputs[5:]
    ctx.set_materialize_grads(False)


def _triton_gradient(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *of_saved: None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    if d_out is None and d_lse is None:
        return None, None, None, *nothing
    d_out = torch.zeros_like(ctx.saved_tensors[3]) if d_out is None else d_out
    return *sagebwd_triton_backward(d_out, d_lse, *ctx.saved_tensors, *ctx.rest), *nothing


sagebwd_triton.register_autograd(_triton_gradient, setup_context=_keep_triton)


@torch.library.custom_op("allears::sagebwd_attention_hopper", mutates_args=())
def sagebwd_hopper(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, smooth_k: bool, return_lse: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SageBwd with ``grad_scales="row"`` by the kernels for Hopper, differentiable in its first result if ``train``.

    Args:
        q: (B, L_q, H, D), float16 or bfloat16, D 64 or 128, any strides (what is not aligned is copied).
        k, v: (B, L_k, G, D).
        scale: factor on the logits.
        smooth_k: see :class:`LowBit`.

    Returns:
        Output like q and the log-sum-exp, float32 (B, H, L_q), empty without ``return_lse``; then, for the backward and
        empty without ``train``, q8 (B, H, L_q, D), q_scale (B, H, L_q), the log-sum-exp in base 2 of the smoothed
        scores (B, H, L_q), k8 (B, G, N * 128, D), and the scales of K and V (B, G, N, 2).
    """
    from allears.ops.attention.lowbit.hopper.host import attend, quantise_kv

    with torch.cuda.device_of(q):
        kv = quantise_kv(aligned_rows(k), aligned_rows(v), "int8", smooth_k)
        made = attend(aligned_rows(q), kv, k.shape[1], "int8", causal, scale, need_lse=return_lse, save_q=train)
        out, lse = made.out, made.lse if made.lse is not None else no_sums(q)
        if made.q8 is None or made.q_scale is None or made.lse2 is None:
            return out, lse, *_nothing_saved(q)
        # An operator's results must not share memory, and the host makes these two of one tensor.
        return out, lse, made.q8, made.q_scale, made.lse2, kv.k, kv.scales


def _nothing_saved(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def empty(dtype: torch.dtype) -> Tensor:
        return q.new_empty((0,), dtype=dtype)

    return empty(torch.int8), empty(torch.float32), empty(torch.float32), empty(torch.int8), empty(torch.float32)


@sagebwd_hopper.register_fake
def _hopper_fake(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, smooth_k: bool, return_lse: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out, lse = like_output(q)[0], like_output(q, return_lse)[1]
    if not train:
        return out, lse, *_nothing_saved(q)
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1:3]
    blocks = (keys + KEY_BLOCK - 1) // KEY_BLOCK
    rows = (batch, heads, queries)
    return (
        out,
        lse,
        q.new_empty((*rows, size), dtype=torch.int8),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty((batch, groups, blocks * KEY_BLOCK, size), dtype=torch.int8),
        q.new_empty((batch, groups, blocks, 2), dtype=torch.float32),
    )


@torch.library.custom_op("allears::sagebwd_attention_hopper_backward", mutates_args=())
def sagebwd_hopper_backward(
    d_out: Tensor,
    v: Tensor,
    out: Tensor,
    q8: Tensor,
    q_scale: Tensor,
    lse2: Tensor,
    k8: Tensor,
    scales: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sagebwd_hopper` from what it returned: like q, k and v, contiguous, in their dtype."""
    from allears.ops.attention.lowbit.hopper.host import Forward, QuantisedKV, attend_backward

    with torch.cuda.device_of(d_out):
        saved = Forward(out.contiguous(), None, q8, q_scale, lse2)
        kv = QuantisedKV(k8, k8, scales, None)  # the backward takes V from v
        return attend_backward(aligned_rows(d_out), aligned_rows(v), kv, saved, causal, scale)


@sagebwd_hopper_backward.register_fake
def _hopper_backward_fake(d_out: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return d_out.new_empty(d_out.shape), v.new_empty(v.shape), v.new_empty(v.shape)


def _keep_hopper(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, *saved = output
    ctx.save_for_backward(inputs[2], out, *saved)
    ctx.causal, ctx.scale, *_, ctx.train = inputs[3:]
    ctx.set_materialize_grads(False)


def _hopper_gradient(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, *of_saved: None
) -> tuple[Tensor | None, ...]:
    if d_lse is not None or not ctx.train:
        raise ValueError(
            "d_lse: the kernels for Hopper have no gradient of the log-sum-exp, nor of a call made with train=False; "
            "use kernel='triton'"
        )
    nothing = (None,) * 5
    if d_out is None:
        return None, None, None, *nothing
    return *sagebwd_hopper_backward(d_out, *ctx.saved_tensors, ctx.causal, ctx.scale), *nothing


sagebwd_hopper.register_autograd(_hopper_gradient, setup_context=_keep_hopper)
