"""Layers over frames and bands that hear no later frame. What they remember is a value: it goes in and comes out.

Pieces of any length, one after another, give what the whole gives. Shapes: B batch, C channels, T frames, F bands, K
taps in time, H heads, D numbers of a frame; "..." any leading sizes.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_SLOPE = 0.1


class CausalConv(nn.Module):
    """Convolution over frames and bands, batch norm, leaky ReLU: (B, C, T, F) to (B, C', T, F'), F' = ceil(F / stride).

    Args:
        channels_in, channels_out: C and C'.
        taps: K; a frame hears itself and the K - 1 before it.
        bands: width of the kernel over bands, odd.
        stride: over bands.
        groups: of channels that do not meet.
        plain: the convolution alone, with a bias.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        taps: int = 1,
        bands: int = 3,
        stride: int = 1,
        groups: int = 1,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.taps = taps
        self.conv = nn.Conv2d(
            channels_in,
            channels_out,
            (taps, bands),
            stride=(1, stride),
            padding=(0, bands // 2),
            groups=groups,
            bias=plain,
        )
        self.norm = None if plain else nn.BatchNorm2d(channels_out)
        self.bends = not plain

    def initial(self, batch: int, bands: int) -> Tensor:
        """The silent past, (B, C, K - 1, F)."""
        return self.conv.weight.new_zeros(batch, self.conv.in_channels, self.taps - 1, bands)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, T, F) and the K - 1 frames before it, to the output and the past of what follows."""
        if self.taps > 1:
            x = torch.cat([past, x], dim=2)
            past = x[:, :, 1 - self.taps :]
        conv = self.conv  # its function, and not itself: in a step, calls of modules would be a third of the time
        y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
        if self.norm is not None:
            y = self.norm(y)
        return F.leaky_relu(y, _SLOPE) if self.bends else y, past

    def fuse(self) -> None:
        """Work the batch norm at rest into the convolution: one operation less, and the same output."""
        if self.norm is not None:
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), None


class BandsUp(nn.Module):
    """Twice as many bands, less one: x (B, C, T, F) to (B, C', T, 2 F - 1), the inverse of a stride of 2.

    A convolution over bands makes two outputs for each, which are laid side by side (sub-pixel convolution; Shi et
    al., CVPR 2016): every output has as many inputs as its neighbours.
    """

    def __init__(self, channels_in: int, channels_out: int, plain: bool = False) -> None:
        super().__init__()
        self.twice = CausalConv(channels_in, 2 * channels_out, plain=plain)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.twice(x, x)
        batch, channels, frames, bands = y.shape
        y = y.reshape(batch, channels // 2, 2, frames, bands).permute(0, 1, 3, 4, 2)
        return y.reshape(batch, channels // 2, frames, 2 * bands)[..., : 2 * bands - 1]


def fuse_norms(net: nn.Module) -> None:
    """Work every batch norm of the causal convolutions in ``net``, which is at rest (``eval``), into its weights."""
    for module in net.modules():
        if isinstance(module, CausalConv):
            module.fuse()


def in_float32(device: torch.device) -> AbstractContextManager[None]:
    """No autocast inside; nothing at all where there is none, as to enter and leave costs more than a small layer."""
    on = torch.is_autocast_enabled(device.type)
    return cast(AbstractContextManager[None], torch.autocast(device.type, enabled=False)) if on else nullcontext()


def recur(gru: nn.GRU, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """A GRU of one layer in float32, also under autocast: x (T, B, D) and (1, B, D') to (T, B, D') and the next."""
    with in_float32(x.device):
        return cast(tuple[Tensor, Tensor], gru(x.float(), last))


def hold_peaks(x: Tensor, release: float, last: Tensor) -> tuple[Tensor, Tensor]:
    """Up at once, down slowly: h_t = max(x_t, h_{t-1} - release).

    Args:
        x: (..., T); in decibels or logarithms, where the release is that of a decaying peak.
        release: what is lost from frame to frame.
        last: h before the first frame, (...).

    Returns:
        h (..., T), and its last frame (...).
    """
    frames = x.shape[-1]
    if frames == 1:
        held = torch.maximum(x, last[..., None] - release)
    else:
        slope = release * torch.arange(1, frames + 1, device=x.device, dtype=x.dtype)
        held = torch.cat([last[..., None], x + slope], dim=-1).cummax(dim=-1).values[..., 1:] - slope
    return held, held[..., -1]


def running_mean(x: Tensor, rate: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """A mean over time that forgets: y_t = y_{t-1} + (1 - exp(-rate)) (x_t - y_{t-1}).

    All T frames are one product with the (T, T) matrix of weights of each head: meant for at most some hundred frames.

    Args:
        x: (B, H, T, D).
        rate: (H,), positive; 1 / rate is the time constant in frames.
        last: y before the first frame, (B, H, D).

    Returns:
        y (B, H, T, D), and its last frame (B, H, D).
    """
    frames = x.shape[2]
    new = (1.0 - torch.exp(-rate))[:, None, None]
    if frames == 1:
        y = torch.lerp(last[:, :, None], x, new)
        return y, y[:, :, 0]
    time = torch.arange(frames, device=x.device, dtype=x.dtype)
    age = time[:, None] - time
    weights = torch.exp(-rate[:, None, None] * age.clamp_min(0)) * new * (age >= 0)
    kept = torch.exp(-rate[:, None, None] * (time[:, None] + 1))
    y = weights @ x + kept * last[:, :, None]
    return y, y[:, :, -1]
