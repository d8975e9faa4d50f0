"""Depthwise convolution over (B, L, C) in PyTorch: the definition, and what runs on the CPU and in exported graphs.

Shapes: B batch, L rows, C channels, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, gated: bool
) -> Tensor:
    """A 2-D convolution over a height of 1: its channels-last layout is x as it lies, and libraries run it quickly.
    CPUs, on which oneDNN does not come to an end with many taps of bfloat16, get float32."""
    dtype = torch.float32 if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    narrow, x, weight = x.dtype, x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    wide = x.transpose(1, 2).unsqueeze(2)
    y = _conv(wide, weight.unsqueeze(2), bias, stride, padding)
    y = y.squeeze(2).transpose(1, 2).to(narrow)
    return F.glu(y, dim=-1) if gated else y


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """On x (B, C, 1, L). Autocast, which would make it 16 bits again, stays out."""
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, bias, (1, stride), (0, padding), groups=weight.shape[0])
