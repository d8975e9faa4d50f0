"""Linear attention by the Triton kernels as ``torch.library`` operators with gradients.

What a backward needs beside the inputs, the means of phi(k)^T v and phi(k), are further results of the forward's
operator; the causal one makes its sums again. Nothing waits for the GPU.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, W = D padded to 16, 32, 64 or 128, K taps; S packed
sequences are (1, T, H, D) with E = S entries, else E = B.
"""

from typing import Any

import torch
from torch import Tensor


def _entries(q: Tensor, cu: Tensor | None) -> Any:
    return q.shape[0] if cu is None else cu.shape[0] - 1


def _call(kind: str, power: int, norm: str, eps: float, cu: Tensor | None, lengths: Tensor | None) -> Any:
    from allears.ops.attention.linear.one_call import Call

    return Call(kind, power, norm, eps, cu, lengths)


def of_heads(q: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight (D, K) or (H, D, K) and bias (D,) or (H, D) in float32, (H, D, K) and (H, D), contiguous."""
    heads, size = q.shape[2:]
    weight = None if weight is None else weight.float().expand(heads, size, -1).contiguous()
    return weight, None if bias is None else bias.float().expand(heads, size).contiguous()


def _or_empty(x: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    """An operator returns tensors: (0,) for what is None."""
    return tuple(x.new_empty(0, dtype=torch.float32) if one is None else one for one in given)


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _parameters_fake(
    q: Tensor, scale: Tensor | None, conv_weight: Tensor | None, with_bias: bool
) -> tuple[Tensor, ...]:
    bias = q.new_empty(q.shape[2:], dtype=torch.float32) if with_bias else None
    return _or_empty(q, *(None if x is None else _like(x) for x in (scale, conv_weight)), bias)


def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    kind: str,
    power: int,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over both directions. As the operator ``linear_triton`` it is differentiable in its first result.

    Args:
        q: (B, L_q, H, D), float16, bfloat16 or float32, any strides, D up to 128; packed (1, T, H, D).
        k, v: (B, L_k, H, D).
        scale: float32 (H, D), positive, or None.
        conv_weight, conv_bias: float32 (H, D, K) and (H, D), or None; without gradients also (D, K) and (D,).
        cu_seqlens: (S + 1,) of packed sequences.
        lengths: (B,), how many keys exist.
        kind, power, norm, eps: fields of ``LinearOptions``.

    Returns:
        Output like q; then mean phi(k)^T v (E, H, W, W) in the dtype of q, and mean phi(k) (E, H, W) in float32.
    """
    from allears.ops.attention.linear import triton_groups_host, triton_host

    call = _call(kind, power, norm, eps, cu_seqlens, lengths)
    with torch.cuda.device_of(q):
        if triton_groups_host.takes(q, k, v, call):
            return triton_groups_host.group_forward(q, k, v, scale, conv_weight, conv_bias, call)
        weight, bias = of_heads(q, conv_weight, conv_bias)
        return triton_host.linear_forward(q, k, v, scale, weight, bias, call)


linear_triton = torch.library.custom_op("allears::linear_attention_triton", linear_forward, mutates_args=())


@linear_triton.register_fake
def _linear_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, size = q.shape[2:]
    width = next(known for known in (16, 32, 64, 128) if size <= known)
    entries = _entries(q, rest[5])
    return (
        _like(q),
        q.new_empty((entries, heads, width, width)),
        q.new_empty((entries, heads, width), dtype=torch.float32),
    )


@torch.library.custom_op("allears::linear_attention_triton_backward", mutates_args=())
def linear_triton_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    with_bias: bool,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    matrix: Tensor,
    sums: Tensor,
    kind: str,
    power: int,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`linear_triton`: like q, k, v, contiguous, and in float32 like scale, conv_weight and
    conv_bias, empty where these are None."""
    from allears.ops.attention.linear import triton_host

    call = _call(kind, power, norm, eps, cu_seqlens, lengths)
    with torch.cuda.device_of(q):
        made = triton_host.linear_backward(d_out, q, k, v, scale, conv_weight, with_bias, matrix, sums, call)
    d_scale, d_conv, d_bias = _or_empty(q, *made[3:])
    return *made[:3], d_scale, d_conv, d_bias


@linear_triton_backward.register_fake
def _linear_backward_fake(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    with_bias: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v), *_parameters_fake(q, scale, conv_weight, with_bias)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, conv_bias, cu_seqlens, lengths = inputs[:8]
    ctx.save_for_backward(*tensors, cu_seqlens, lengths, *output[1:])
    ctx.with_bias, ctx.rest = conv_bias is not None, inputs[8:]
    ctx.set_materialize_grads(False)


def _linear_gradient(ctx: Any, d_out: Tensor | None, *of_means: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 12
    tensors, others = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
    made = linear_triton_backward(d_out, *tensors, ctx.with_bias, *others, *ctx.rest)
    there = (True, True, True, tensors[3] is not None, tensors[4] is not None, ctx.with_bias)
    return *(x if wanted else None for x, wanted in zip(made, there, strict=True)), *(None,) * 6


linear_triton.register_autograd(_linear_gradient, setup_context=_keep_linear)


@torch.library.custom_op("allears::causal_linear_attention_triton", mutates_args=())
def causal_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    kv: Tensor | None,
    k_sum: Tensor | None,
    count: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    kind: str,
    power: int,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention, L_q = L_k, differentiable in all results; arguments as :func:`linear_triton`, and the past of a
    stream: kv (E, H, D, D) and k_sum (E, H, D) in float32, or None for zeros, and count (E,) int64. The convolution
    begins with zeros.

    Returns:
        Output like q; kv and k_sum after the last key.
    """
    from allears.ops.attention.linear import triton_causal_host as host

    call = _call(kind, power, norm, eps, cu_seqlens, lengths)
    with torch.cuda.device_of(q):
        return host.causal_forward(q, k, v, scale, conv_weight, conv_bias, host.Sums(kv, k_sum, count), call)


@causal_triton.register_fake
def _causal_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (heads, size), entries = q.shape[2:], _entries(q, rest[8])
    kv = q.new_empty((entries, heads, size, size), dtype=torch.float32)
    return _like(q), kv, q.new_empty((entries, heads, size), dtype=torch.float32)


@torch.library.custom_op("allears::causal_linear_attention_triton_backward", mutates_args=())
def causal_triton_backward(
    d_out: Tensor,
    d_kv: Tensor | None,
    d_k_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    with_bias: bool,
    kv: Tensor | None,
    k_sum: Tensor | None,
    count: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    kind: str,
    power: int,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`causal_triton`, as :func:`linear_triton_backward` gives them, and of kv and k_sum."""
    from allears.ops.attention.linear import triton_causal_host as host

    call, past = _call(kind, power, norm, eps, cu_seqlens, lengths), host.Sums(kv, k_sum, count)
    with torch.cuda.device_of(q):
        made, of_kv, of_k_sum = host.causal_backward(
            d_out, d_kv, d_k_sum, q, k, v, scale, conv_weight, with_bias, past, call
        )
    d_scale, d_conv, d_bias = _or_empty(q, *made[3:])
    return *made[:3], d_scale, d_conv, d_bias, of_kv, of_k_sum


@causal_triton_backward.register_fake
def _causal_backward_fake(
    d_out: Tensor,
    d_kv: Tensor | None,
    d_k_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    with_bias: bool,
    kv: Tensor | None,
    k_sum: Tensor | None,
    count: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    of_state = count.shape + q.shape[2:]
    d_sums = q.new_empty((*of_state, q.shape[3]), dtype=torch.float32), q.new_empty(of_state, dtype=torch.float32)
    return _like(q), _like(k), _like(v), *_parameters_fake(q, scale, conv_weight, with_bias), *d_sums


def _keep_causal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *inputs[6:11], output[0])
    ctx.with_bias, ctx.rest = inputs[5] is not None, inputs[11:]
    ctx.set_materialize_grads(False)


def _causal_gradient(
    ctx: Any, d_out: Tensor | None, d_kv: Tensor | None, d_k_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    if d_out is None and d_kv is None and d_k_sum is None:
        return (None,) * 15
    *saved, out = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    tensors, past = saved[:5], saved[5:]
    if d_kv is None and d_k_sum is not None:
        d_kv = d_k_sum.new_zeros((*d_k_sum.shape, d_k_sum.shape[-1]))
    elif d_k_sum is None and d_kv is not None:
        d_k_sum = d_kv.new_zeros(d_kv.shape[:-1])
    made = causal_triton_backward(d_out, d_kv, d_k_sum, *tensors, ctx.with_bias, *past, *ctx.rest)
    there = (True, True, True, tensors[3] is not None, tensors[4] is not None, ctx.with_bias)
    there += (past[0] is not None, past[1] is not None)
    return *(x if wanted else None for x, wanted in zip(made, there, strict=True)), *(None,) * 7


causal_triton.register_autograd(_causal_gradient, setup_context=_keep_causal)
