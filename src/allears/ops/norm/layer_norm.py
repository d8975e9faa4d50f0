"""Layer norm over the channels of (B, L, C) (Ba et al., 2016), for many short rows.

PyTorch's CUDA kernel gives each row a block of 128 threads, most of which have nothing to do where C is 64; the Triton
kernel gives a block as many rows as fill it. It has no backward: with gradients, in a compiled graph and on other
devices PyTorch's own runs.

Shapes: B batch, L rows, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.triton_here import triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

_LARGEST_CHANNELS = 1024
_LARGEST_BATCH = 65_535  # of a CUDA grid's second side
_FEW_ROWS = 4096  # below, a call costs the time of its launch
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, kernel: str = "auto") -> Tensor:
    """Each row less its mean, over its standard deviation, times ``weight`` plus ``bias``.

    Args:
        x: (B, L, C).
        weight, bias: (C,).
        eps: added to the variance.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        (B, L, C) in the dtype of x; under autocast of a CUDA device float32 by the reference, as PyTorch has it, and
        autocast's dtype by the kernel, which is what the next linear layer would make of it.

    Raises:
        ValueError: shapes do not fit, or the named kernel cannot run the call.
    """
    channels = x.shape[-1]
    if x.dim() != 3 or tuple(weight.shape) != (channels,) or tuple(bias.shape) != (channels,):
        raise ValueError(
            f"x, weight, bias: shapes {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)} given; wanted "
            f"are (B, L, C), (C,) and (C,)"
        )
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    refused = "" if kernel == "reference" else _refuses_triton(x, weight, bias, kernel)
    if refused and kernel == "triton":
        raise ValueError(f"kernel: 'triton' cannot run this call: {refused}; or use kernel='auto'")
    if kernel == "reference" or refused:
        return F.layer_norm(x, (channels,), weight, bias, eps)
    from allears.ops.norm.triton_layer_norm import layer_norm_forward

    mixed = torch.is_autocast_enabled(x.device.type)
    return layer_norm_forward(x, weight, bias, eps, torch.get_autocast_dtype(x.device.type) if mixed else x.dtype)


def _refuses_triton(x: Tensor, weight: Tensor, bias: Tensor, kernel: str) -> str:
    if torch.compiler.is_compiling():
        return "a compiled graph makes a kernel of its own, with what stands around"
    if kernel == "auto" and (x.device.type != "cuda" or x.shape[0] * x.shape[1] < _FEW_ROWS):
        return "pays for many rows on a CUDA GPU"
    missing = triton_missing()
    if missing:
        return missing
    if x.device.type != "cuda" and torch.cuda.is_available():
        return f"runs on CUDA GPUs; x is on {x.device}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return "it has no backward and gradients are asked for"
    if x.dtype not in _DTYPES or x.shape[-1] > _LARGEST_CHANNELS or x.shape[0] > _LARGEST_BATCH:
        return (
            f"takes 16 and 32 bits, {_LARGEST_CHANNELS} channels and {_LARGEST_BATCH} entries at most; {x.dtype} and "
            f"{tuple(x.shape)} given"
        )
    return ""
