"""The door of depthwise convolution over (B, L, C). A caller who names a kernel gets that one or an error.

Shapes: B batch, L rows, C channels, K taps.
"""

import torch
from torch import Tensor

from allears.ops.conv.depthwise.reference import depthwise_reference
from allears.ops.triton_here import triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_BATCH = 65_535  # of a CUDA grid's third side


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    gated: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Each channel convolved with taps of its own, in the layout of linear layers.

    Args:
        x: (B, L, C).
        weight: (C, 1, K), as ``nn.Conv1d`` holds it.
        bias: (C,).
        stride, padding: as of ``F.conv1d``.
        gated: give the first half of the channels times the sigmoid of the second half, (B, L', C / 2).
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        (B, L', C) in the dtype of x, L' = (L + 2 padding - K) // stride + 1. Differentiable in x, weight and bias.

    Raises:
        ValueError: shapes do not fit, or the named kernel cannot run the call.
    """
    _check(x, weight, bias, stride, padding, gated)
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    refused = "" if kernel == "reference" else _refuses_triton(x, kernel)
    if refused and kernel == "triton":
        raise ValueError(f"kernel: 'triton' cannot run this call: {refused}; or use kernel='auto'")
    if kernel == "reference" or refused:
        return depthwise_reference(x, weight, bias, stride, padding, gated)
    return _run_triton(x, weight, bias, stride, padding, gated)


def _run_triton(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, gated: bool) -> Tensor:
    """By the operator where a graph or a gradient needs one, else straight to the kernel, which costs less time."""
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if learns or torch.compiler.is_compiling():
        from allears.ops.conv.depthwise.ops import depthwise_triton

        return depthwise_triton(x, weight, bias, stride, padding, gated)
    from allears.ops.conv.depthwise.triton_depthwise import conv_forward

    return conv_forward(x, weight, bias, stride, padding, gated)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, gated: bool) -> None:
    channels = x.shape[-1]
    if x.dim() != 3:
        raise ValueError(f"x: shape {tuple(x.shape)} given; depthwise convolution takes (B, L, C)")
    if weight.dim() != 3 or weight.shape[0] != channels or weight.shape[1] != 1:
        raise ValueError(f"weight: shape {tuple(weight.shape)} given; x has {channels} channels, so give (C, 1, K)")
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias: shape {tuple(bias.shape)} given; it must be (C,) = ({channels},)")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride, padding: {stride} and {padding} given; at least 1 and 0 are wanted")
    if gated and channels % 2:
        raise ValueError(f"gated: True given with {channels} channels; it needs an even number")


def _refuses_triton(x: Tensor, kernel: str) -> str:
    if x.device.type != "cuda" and kernel == "auto":
        return "runs on CUDA GPUs"
    missing = triton_missing()
    if missing:
        return missing
    if x.device.type != "cuda" and torch.cuda.is_available():
        return f"runs on CUDA GPUs; x is on {x.device}"
    if x.dtype not in _TRITON_DTYPES or x.shape[0] > _LARGEST_BATCH:
        return f"takes 16 and 32 bits and up to {_LARGEST_BATCH} entries; {x.dtype} and {x.shape[0]} given"
    return ""
