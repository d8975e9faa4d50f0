"""Depthwise convolution by the Triton kernel as ``torch.library`` operators with gradients.

Shapes: B batch, L rows in, M rows out, C channels, K taps.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("allears::depthwise_conv_triton", mutates_args=())
def depthwise_triton(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, gated: bool) -> Tensor:
    """x (B, L, C), weight (C, 1, K), bias (C,) or None to (B, M, C), or if gated (B, M, C / 2).

    float16, bfloat16 or float32; the weight may be wider than x.
    """
    from allears.ops.conv.depthwise.triton_depthwise import conv_forward

    return conv_forward(x, weight, bias, stride, padding, gated)


@depthwise_triton.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, gated: bool) -> Tensor:
    rows = (x.shape[1] + 2 * padding - weight.shape[-1]) // stride + 1
    return x.new_empty((x.shape[0], rows, x.shape[2] // (2 if gated else 1)))


@torch.library.custom_op("allears::depthwise_conv_triton_backward", mutates_args=())
def depthwise_triton_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like x, and in float32 (C, 1, K) and (C,)."""
    from allears.ops.conv.depthwise.triton_depthwise import conv_backward

    return conv_backward(d_out, x, weight, stride, padding)


@depthwise_triton_backward.register_fake
def _backward_fake(
    d_out: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = {"dtype": torch.float32}
    return x.new_empty(x.shape), x.new_empty(weight.shape, **wide), x.new_empty(x.shape[-1:], **wide)


@torch.library.custom_op("allears::depthwise_gate_triton_backward", mutates_args=())
def gate_triton_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
) -> Tensor:
    """Out of the gradient (B, M, C / 2) of the gated form that of the convolution, (B, M, C)."""
    from allears.ops.conv.depthwise.triton_depthwise import gate_backward

    return gate_backward(d_out, x, weight, bias, stride, padding)


@gate_triton_backward.register_fake
def _gate_fake(d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return d_out.new_empty((*d_out.shape[:2], x.shape[2]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, stride, padding, gated = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.sizes, ctx.gated = (stride, padding), gated


def _gradient(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    if ctx.gated:
        d_out = gate_triton_backward(d_out, x, weight, bias, *ctx.sizes)
    d_x, d_weight, d_bias = depthwise_triton_backward(d_out, x, weight, *ctx.sizes)
    return d_x, d_weight.to(weight.dtype), None if bias is None else d_bias.to(bias.dtype), None, None, None


depthwise_triton.register_autograd(_gradient, setup_context=_keep)
