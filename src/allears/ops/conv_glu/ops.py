"""The feed-forward by the Triton kernels as ``torch.library`` operators with gradients: a compiled graph holds them
whole. Of the forward pass only its inputs are kept.

Shapes: A, B outer sizes, L rows, D channels, C hidden channels, K taps.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("allears::conv_swiglu_triton", mutates_args=())
def conv_swiglu_triton(
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    narrow_bias: Tensor,
    groups: int,
    eps: float,
    before: int,
    dtype: torch.dtype,
) -> Tensor:
    """Arguments as :func:`~allears.ops.conv_glu.call.conv_swiglu`, x (A, B, L, D), ``dtype`` of the products; the
    output is as x, strides too."""
    from allears.ops.conv_glu.triton_host import conv_swiglu_forward

    return conv_swiglu_forward(x, widen_weight, widen_bias, narrow_weight, narrow_bias, groups, eps, before, dtype)


@conv_swiglu_triton.register_fake
def _fake(
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    narrow_bias: Tensor,
    groups: int,
    eps: float,
    before: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("allears::conv_swiglu_triton_backward", mutates_args=())
def conv_swiglu_triton_backward(
    d_y: Tensor,
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    groups: int,
    eps: float,
    before: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients as x, and in float32 (2 C, D, K), (2 C,), (C, D, K) and (D,)."""
    from allears.ops.conv_glu.triton_host import conv_swiglu_backward

    return conv_swiglu_backward(d_y, x, widen_weight, widen_bias, narrow_weight, groups, eps, before, dtype)


@conv_swiglu_triton_backward.register_fake
def _backward_fake(
    d_y: Tensor,
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    groups: int,
    eps: float,
    before: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = widen_weight.shape, widen_bias.shape, narrow_weight.shape, x.shape[-1:]
    made = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    return torch.empty_like(x), *made  # type: ignore


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, widen_weight, widen_bias, narrow_weight, narrow_bias, *ctx.how = inputs
    ctx.save_for_backward(x, widen_weight, widen_bias, narrow_weight)
    ctx.dtypes = [weight.dtype for weight in (widen_weight, widen_bias, narrow_weight, narrow_bias)]


def _gradient(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    d_x, *made = conv_swiglu_triton_backward(d_y, *ctx.saved_tensors, *ctx.how)
    return d_x, *(d.to(dtype) for d, dtype in zip(made, ctx.dtypes, strict=True)), None, None, None, None


def _no_second_gradient(ctx: Any, *slopes: Tensor) -> None:
    raise NotImplementedError(
        "conv_swiglu: its kernels have no second derivatives; call it with kernel='reference' for these"
    )


conv_swiglu_triton.register_autograd(_gradient, setup_context=_keep)
conv_swiglu_triton_backward.register_autograd(_no_second_gradient)
