"""Layer norm, linear layers and scaled residuals over many short rows, with gradients by Triton kernels.

PyTorch sums the gradients of gains and biases by kernels that are made for few rows or many channels, and gives each
row of a layer norm a block of threads; where C is 64 and the rows are hundreds of thousands, that is a third of the
time of a training step. Each function here computes what PyTorch's does.

Shapes: ... any leading sizes, C channels, N channels out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from allears.ops.triton_here import triton_missing

_FEW_ROWS = 4096
_LARGEST_CHANNELS = 2048
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels pay for x (..., C): gradients are wanted, of many rows of 16 or 32 bits on a CUDA GPU."""
    if x.device.type != "cuda" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    wanted = any(t.requires_grad for t in (x, *others))
    return wanted and x.dtype in _DTYPES and x.numel() >= _FEW_ROWS * x.shape[-1] and not triton_missing()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``: x (..., C), weight (N, C), bias (N,) or None to (..., N); under autocast in autocast's dtype."""
    if bias is None or weight.shape[0] > _LARGEST_CHANNELS or not takes(x, weight, bias):
        return F.linear(x, weight, bias)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        return _Linear.apply(x.to(dtype), weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``F.layer_norm`` over the last axis; under autocast in autocast's dtype, as the next linear layer wants it."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _LayerNorm.apply(x, weight, bias, eps, dtype)


def add_scaled(x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
    """``x + gain * y``: x and y (..., C), gain (C,); in the wider dtype of the three."""
    if gain.shape[0] > _LARGEST_CHANNELS or not takes(y, x, gain):
        return torch.addcmul(x, y, gain)
    return _AddScaled.apply(x, y, gain)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        narrow = weight.to(x.dtype)
        ctx.save_for_backward(x, narrow)
        ctx.dtypes = weight.dtype, bias.dtype
        return F.linear(x, narrow, bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        from allears.ops.rows.triton_rows import column_sum

        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        d_x = (flat @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        d_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        d_bias = column_sum(flat) if ctx.needs_input_grad[2] else None
        return d_x, _as(d_weight, ctx.dtypes[0]), _as(d_bias, ctx.dtypes[1])


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        from allears.ops.norm.triton_layer_norm import layer_norm_forward

        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return layer_norm_forward(x, weight, bias, eps, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        from allears.ops.rows.triton_rows import layer_norm_backward

        x, weight = ctx.saved_tensors
        d_x, d_weight, d_bias = layer_norm_backward(grad, x, weight, ctx.eps)
        return d_x, d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype), None, None


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(y, gain)
        ctx.x_dtype = x.dtype
        return torch.addcmul(x, y, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore
        from allears.ops.rows.triton_rows import scale_backward

        y, gain = ctx.saved_tensors
        d_y, d_gain = scale_backward(grad, y, gain)
        return grad.to(ctx.x_dtype), d_y, d_gain.to(gain.dtype)


def _as(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
