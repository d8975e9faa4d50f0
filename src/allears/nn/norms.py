"""Norms in the layout of linear layers, channels last.

Shapes: B batch, L rows, C channels, G groups; ... any leading sizes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.ops.norm.layer_norm import layer_norm
from allears.ops.rows import functions


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the channels of (B, L, C), by a kernel for many short rows where there is one."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # for export, which wants the number of channels as a constant
            return super().forward(input)
        if functions.takes(input, self.weight):
            return functions.layer_norm(input, self.weight, self.bias, self.eps)
        return layer_norm(input, self.weight, self.bias, self.eps)


class GlobalNorm(nn.Module):
    """What ``nn.GroupNorm`` of one group is on (B, C, L), on (B, L, C): mean and variance over all rows and channels of
    an entry, gain and bias of each channel (global layer norm; Luo and Mesgarani, Conv-TasNet, 2019).

    Args:
        channels: C.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation of x (B, L, C), each (B, 1, 1), in float32 at least."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        variance, mean = torch.var_mean(wide, dim=(1, 2), correction=0, keepdim=True)
        return mean, torch.rsqrt(variance + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        mean, inverse = self.statistics(x)
        gain = self.weight * inverse
        return torch.addcmul((self.bias - mean * gain).to(x.dtype), x, gain.to(x.dtype))

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        """``F.linear(self(x), weight)`` for a weight (C', C), with the norm behind the product, where rows are shorter
        if C' is less than C."""
        mean, inverse = self.statistics(x)
        narrow = weight * self.weight
        y = F.linear(x, narrow)
        shift = F.linear(self.bias, weight) - mean * inverse * narrow.sum(1)
        return torch.addcmul(shift.to(y.dtype), y, inverse.to(y.dtype))


class RMSGroupNorm(nn.Module):
    """Each of G groups of channels over its root mean square, times a gain of each channel; no mean is taken and no
    bias added (TF-Locoformer; Saijo et al., IWAENC 2024).

    x (..., C) to the same.

    Args:
        channels: C, a multiple of ``groups``.
        groups: G.
        eps: added to the mean square.
    """

    def __init__(self, channels: int, groups: int = 4, eps: float = 1e-5) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: {groups} does not divide channels {channels}")
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        if _plain_on_cpu(x) and self.weight.dtype == x.dtype:
            return self._by_products(x)
        parts = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight

    def _by_products(self, x: Tensor) -> Tensor:
        """The same in half the time on a CPU, where products with a narrow matrix are faster than the short loops of
        sums and of broadcasts over a group; and every version of ONNX has its operators."""
        channels = self.weight.shape[0] // self.groups
        spread = torch.eye(self.groups, device=x.device).repeat_interleave(channels, dim=1)  # (G, C)
        inverse = (x.square() @ spread.T).div_(channels).add_(self.eps).rsqrt_()
        return (inverse @ (spread * self.weight)).mul_(x)


def _plain_on_cpu(x: Tensor) -> bool:
    """float32 on a CPU, without gradients and autocast."""
    eager = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return eager and x.device.type == "cpu" and x.dtype == torch.float32
