"""The blocks of SepReformer (Shin et al., NeurIPS 2024) on (B, T, F), channels last throughout.

Shapes: B batch (entries, or entries times talkers J), T frames, F channels, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.separate.config import SeparateConfig, SepReformerSize
from allears.models.separate.ega import GlobalAttention
from allears.nn.depthwise import DepthwiseConv1d
from allears.nn.layer_scale import LayerScale
from allears.nn.linear import Linear
from allears.nn.linear_attention import FocusedLinearAttention, GatedLinearAttention
from allears.nn.norms import GlobalNorm, LayerNorm
from allears.nn.slices import add_slices, map_slices
from allears.ops.attention.linear.options import LinearOptions

_LOCAL_TAPS = 65


class FeedForward(nn.Module):
    """Gated convolutional feed-forward: norm, to 6 F, depthwise convolution of 3 taps, gate, to F, scaled, added.

    Its hidden layer is the widest tensor of the network; without gradients it is made a slice at a time.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.widen = Linear(channels, 6 * channels)
        self.conv = DepthwiseConv1d(6 * channels, 3)
        self.narrow = Linear(3 * channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.scale = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        return add_slices(self._branch, x, self.scale.weight, 6 * x.shape[-1], halo=1)

    def _branch(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.conv(self.widen(self.norm(x)), gated=True))
        return self.dropout(self.narrow(hidden))


class LocalAttention(nn.Module):
    """Convolutional local attention: norm, gate, depthwise convolution of 65 taps, to 2 F with batch norm and GELU,
    back to F, scaled, added. In evaluation the batch norm is worked into the layer before it.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)
        self.enter = Linear(channels, 2 * channels)
        self.conv = DepthwiseConv1d(channels, _LOCAL_TAPS)
        self.widen = Linear(channels, 2 * channels)
        self.widen_norm = nn.BatchNorm1d(2 * channels)
        self.narrow = Linear(2 * channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.scale = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.scale(self._leave(_normalised(self.widen_norm, self.widen(self._enter(x)))), x)
        gain, shift = _affine(self.widen_norm)
        weight, bias = self.widen.weight * gain[:, None], self.widen.bias * gain + shift

        def branch(x: Tensor) -> Tensor:
            return self._leave(F.linear(self._enter(x), weight, bias))

        return add_slices(branch, x, self.scale.weight, 3 * x.shape[-1], halo=_LOCAL_TAPS // 2)

    def _enter(self, x: Tensor) -> Tensor:
        return self.conv(F.glu(self.enter(self.norm(x)), dim=-1))

    def _leave(self, h: Tensor) -> Tensor:
        return self.dropout(self.narrow(F.gelu(h)))


class SpeakerAttention(nn.Module):
    """Softmax attention between the J talkers of each frame, without positions; scaled and added. (B * J, T, F).

    J is 2 or 3, so that the products are written out rather than left to matrices of 2 x 2.
    """

    def __init__(self, channels: int, heads: int, talkers: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.talkers = heads, talkers
        self.norm = LayerNorm(channels)
        self.qkv = Linear(channels, 3 * channels)
        self.out = Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.scale = LayerScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        return add_slices(self._branch, x, self.scale.weight, max(3, self.talkers) * x.shape[-1])

    def _branch(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(0, (-1, self.talkers)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.unbind(-3)  # (B, J, T, H, D)
        scores = (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1) * q.shape[-1] ** -0.5
        weights = scores.softmax(2).to(v.dtype)
        y = (weights.unsqueeze(-1) * v.unsqueeze(1)).sum(2)
        return self.dropout(self.out(y.flatten(-2).flatten(0, 1)))


class GlobalBlock(nn.Module):
    """Attention over all frames, softmax or linear, and a feed-forward.

    Args:
        config: of the separator.
        size: of its family.
        ratio: frames of this stage for one at the lowest rate.
    """

    def __init__(self, config: SeparateConfig, size: SepReformerSize, ratio: int) -> None:
        super().__init__()
        self.linear = config.attention == "fla"
        self.gated = config.gated
        if self.linear:
            inner = FocusedLinearAttention(
                size.channels, size.heads, options=LinearOptions(power=config.power), conv_taps=config.conv_taps
            )
            self.norm = None if config.gated else LayerNorm(size.channels)
            self.attention = GatedLinearAttention(inner, LayerNorm) if config.gated else inner
        else:
            fused = config.attention == "optimised"
            self.attention = GlobalAttention(size.channels, size.heads, ratio, size.dropout, fused)
        self.feed = FeedForward(size.channels, size.dropout)

    def forward(self, x: Tensor, relative: Tensor | None) -> Tensor:
        if not self.linear:
            return self.feed(self.attention(x, relative))
        if self.norm is not None:
            return self.feed(x + self.attention(self.norm(x)))
        return self.feed(self.attention(x))


class LocalBlock(nn.Sequential):
    """Local attention and a feed-forward."""

    def __init__(self, size: SepReformerSize) -> None:
        super().__init__(LocalAttention(size.channels, size.dropout), FeedForward(size.channels, size.dropout))


class SpeakerBlock(nn.Sequential):
    """Attention between talkers and a feed-forward."""

    def __init__(self, size: SepReformerSize, talkers: int) -> None:
        attention = SpeakerAttention(size.channels, size.heads, talkers, size.dropout)
        super().__init__(attention, FeedForward(size.channels, size.dropout))


class Halve(nn.Module):
    """To half as many frames: depthwise convolution of 5 taps with a stride of 2, batch norm, GELU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv1d(channels, 5, stride=2)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            gain, shift = _affine(self.norm)
            return F.gelu(self.conv(x, gain=gain, shift=shift))
        return F.gelu(_normalised(self.norm, self.conv(x)))


class Split(nn.Module):
    """One sequence to one for each talker: (B, T, F) to (B * J, T, F), a norm over each."""

    def __init__(self, channels: int, talkers: int) -> None:
        super().__init__()
        self.talkers = talkers
        self.widen = Linear(channels, 4 * channels * talkers)
        self.narrow = Linear(2 * channels * talkers, channels * talkers)
        self.norm = GlobalNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        width = 4 * x.shape[-1] * self.talkers
        y = map_slices(lambda x: self.narrow(F.glu(self.widen(x), dim=-1)), x, width)
        return self.norm(y.unflatten(-1, (self.talkers, -1)).transpose(1, 2).flatten(0, 1))


def _normalised(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """``norm`` over all rows of x (B, T, C)."""
    return norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Gain and shift of a batch norm in evaluation, (C,) each."""
    assert norm.running_mean is not None and norm.running_var is not None
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return gain, norm.bias - norm.running_mean * gain
