"""The feed-forward with a neighbourhood in PyTorch: the definition, and what runs on CPUs and in float32 and wider.

Shapes: M sequences, L rows, D channels, C hidden channels, K taps; ... any leading sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_swiglu_reference(
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    narrow_bias: Tensor,
    groups: int,
    eps: float,
    before: int,
) -> Tensor:
    """See :func:`~allears.ops.conv_glu.call.conv_swiglu`; x (..., L, D) to the same, in its dtype."""
    parts = x.unflatten(-1, (groups, -1))
    normed = F.rms_norm(parts, parts.shape[-1:], eps=eps).flatten(-2).flatten(0, -3)
    widen_weight, widen_bias = widen_weight.to(x.dtype), widen_bias.to(x.dtype)
    narrow_weight, narrow_bias = narrow_weight.to(x.dtype), narrow_bias.to(x.dtype)
    branch = conv_swiglu_branch(normed, widen_weight, widen_bias, narrow_weight, narrow_bias, before)
    return x + branch.view(x.shape).to(x.dtype)


def conv_swiglu_branch(
    x: Tensor, widen_weight: Tensor, widen_bias: Tensor, narrow_weight: Tensor, narrow_bias: Tensor, before: int
) -> Tensor:
    """Without norm and residual: a convolution of K taps to 2 C, the first half times SiLU of the second, a transposed
    convolution back.

    The convolutions are 2-D over a height of 1: their channels-last layout is x as it lies.

    Args:
        x: (M, L, D).
        widen_weight, widen_bias: (2 C, D, K) and (2 C,), as ``nn.Conv1d`` holds them.
        narrow_weight, narrow_bias: (C, D, K) and (D,), as ``nn.ConvTranspose1d`` holds them.
        before: rows before its own that a hidden row sees, of the K - 1 others.

    Returns:
        (M, L, D), in the dtype of x, or of autocast.
    """
    after = widen_weight.shape[-1] - 1 - before
    padded = F.pad(x, (0, 0, before, after)).transpose(1, 2).unsqueeze(2)
    value, gate = F.conv2d(padded, widen_weight.unsqueeze(2), widen_bias).chunk(2, dim=1)
    y = F.conv_transpose2d(value * F.silu(gate), narrow_weight.unsqueeze(2), narrow_bias)
    return y[:, :, 0, before : before + x.shape[1]].transpose(1, 2)


def operand_dtype(x: Tensor) -> torch.dtype:
    """Of the products for x: that of autocast where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
