"""The blocks of TF-Locoformer (Saijo et al., IWAENC 2024) on sequences of any axis.

Shapes: M sequences, L rows, D channels, C hidden channels, K taps.
"""

from torch import Tensor, nn

from allears.models.separate.config import LocoformerSize, SeparateConfig
from allears.nn.attention import SelfAttention
from allears.nn.linear_attention import FocusedLinearAttention, GatedLinearAttention
from allears.nn.norms import RMSGroupNorm
from allears.ops.attention import AttentionSpec
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.conv_glu import conv_swiglu, runs_kernel
from allears.ops.conv_glu.reference import conv_swiglu_branch


class ConvSwiGlu(nn.Module):
    """Feed-forward with a neighbourhood: convolution of K taps to 2 C, the first half times SiLU of the second,
    transposed convolution back. x (M, L, D) to the same.

    Row l sees rows l - K + 1 to l + K - 1.
    """

    def __init__(self, channels: int, hidden: int, kernel: int) -> None:
        super().__init__()
        self.before = (kernel - 1) // 2
        self.widen = nn.Conv1d(channels, 2 * hidden, kernel)
        self.narrow = nn.ConvTranspose1d(hidden, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return conv_swiglu_branch(x, *self.weights(), self.before)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias of the first convolution, then of the second."""
        assert self.widen.bias is not None and self.narrow.bias is not None
        return self.widen.weight, self.widen.bias, self.narrow.weight, self.narrow.bias


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
        self.fused = config.attention != "published"
        self.norms = nn.ModuleList([RMSGroupNorm(size.channels, size.groups) for _ in range(2)])
        self.feeds = nn.ModuleList([ConvSwiGlu(size.channels, size.hidden, size.kernel) for _ in range(2)])
        self.attention = (LinearAttentionBranch if linear else SoftmaxAttentionBranch)(config, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self._feed(0, x)
        x = self.attention(x)
        return self._feed(1, x)

    def _feed(self, which: int, x: Tensor) -> Tensor:
        """A feed-forward with its norm and residual: one operator where it has kernels, which takes the norm's gain as
        a part of the first weight. The published form, which others are measured against, has none."""
        norm, feed = self.norms[which], self.feeds[which]
        assert isinstance(norm, RMSGroupNorm) and isinstance(feed, ConvSwiGlu)
        weights = feed.weights()
        if not self.fused or not runs_kernel(x, *weights, groups=norm.groups):
            return x + feed(norm(x))
        gained = weights[0] * norm.weight[:, None]
        return conv_swiglu(x, gained, *weights[1:], groups=norm.groups, eps=norm.eps, before=feed.before)
