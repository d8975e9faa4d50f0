"""The blocks of TF-Locoformer (Saijo et al., IWAENC 2024) on sequences of any axis.

Shapes: M sequences, L rows, D channels, C hidden channels, K taps.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.separate.config import LocoformerSize, SeparateConfig
from allears.nn.attention import SelfAttention
from allears.nn.linear_attention import FocusedLinearAttention, GatedLinearAttention
from allears.nn.norms import RMSGroupNorm
from allears.ops.attention import AttentionSpec
from allears.ops.attention.linear.options import LinearOptions


class ConvSwiGlu(nn.Module):
    """Feed-forward with a neighbourhood: convolution of K taps to 2 C, the first half times SiLU of the second,
    transposed convolution back. x (M, L, D) to the same.

    Row l sees rows l - K + 1 to l + K - 1. The convolutions are 2-D over a height of 1: their channels-last layout is x
    as it lies.
    """

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.before = (kernel - 1) // 2
        self.widen = nn.Conv1d(channels, 2 * hidden, kernel)
        self.narrow = nn.ConvTranspose1d(hidden, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        after = self.widen.kernel_size[0] - 1 - self.before
        padded = F.pad(x, (0, 0, self.before, after)).transpose(1, 2).unsqueeze(2)
        value, gate = F.conv2d(padded, self.widen.weight.unsqueeze(2), self.widen.bias).chunk(2, dim=1)
        y = F.conv_transpose2d(value * F.silu(gate), self.narrow.weight.unsqueeze(2), self.narrow.bias)
        return y[:, :, 0, self.before : self.before + x.shape[1]].transpose(1, 2)


class LinearAttentionBranch(nn.Module):
    """x (M, L, D) + focused linear attention of its norm, gated or not. Without rotary positions.

    One residual: the released FLA-TFLocoformer adds it twice here, once inside the gated module and once around it.
    """

    def __init__(self, config: SeparateConfig, size: LocoformerSize) -> None:
        super().__init__()
        options = LinearOptions(power=config.power)
        inner = FocusedLinearAttention(size.channels, size.heads, options=options, conv_taps=config.conv_taps)

        def norm(channels: int) -> nn.Module:
            return RMSGroupNorm(channels, size.groups)

        self.norm = None if config.gated else norm(size.channels)
        self.attention = GatedLinearAttention(inner, norm) if config.gated else inner

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) if self.norm is None else x + self.attention(self.norm(x))


class SoftmaxAttentionBranch(nn.Module):
    """x (M, L, D) + softmax attention of its norm, with rotary positions and without biases."""

    def __init__(self, config: SeparateConfig, size: LocoformerSize) -> None:
        super().__init__()
        kernel = "reference" if config.attention == "published" else "auto"
        self.norm = RMSGroupNorm(size.channels, size.groups)
        self.attention = SelfAttention(size.channels, size.heads, spec=AttentionSpec(kernel=kernel))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class MacaronLayer(nn.Module):
    """Feed-forward, attention, feed-forward, each behind a norm and with a residual; along one axis, (M, L, D).

    The factor 1/2 of the paper's feed-forward residuals is left out, as in the authors' code.

    Args:
        config: of the separator.
        linear: linear attention in place of softmax attention.
    """

    def __init__(self, config: SeparateConfig, linear: bool) -> None:
        super().__init__()
        assert config.locoformer is not None
        size = config.locoformer
        self.width = max(4 * size.hidden, 3 * size.channels)
        self.norms = nn.ModuleList([RMSGroupNorm(size.channels, size.groups) for _ in range(2)])
        self.feeds = nn.ModuleList([ConvSwiGlu(size.channels, size.hidden, size.kernel) for _ in range(2)])
        self.attention = (LinearAttentionBranch if linear else SoftmaxAttentionBranch)(config, size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.feeds[0](self.norms[0](x))
        x = self.attention(x)
        return x + self.feeds[1](self.norms[1](x))
