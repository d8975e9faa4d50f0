"""Depthwise convolution as a module, in the layout of linear layers.

Shapes: B batch, L rows, C channels, K taps.
"""

from torch import Tensor, nn

from allears.ops.conv.depthwise import depthwise_conv


class DepthwiseConv1d(nn.Conv1d):
    """x (B, L, C) to (B, L', C): each channel with taps of its own. Weights are named and shaped as of ``nn.Conv1d``.

    Args:
        channels: C.
        kernel_size: K.
        stride: rows between outputs.
        padding: zeros on either side; ``None`` for (K - 1) // 2, which keeps the length if K is odd and the stride 1.
        bias: whether there is one.
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int = 1, padding: int | None = None, bias: bool = True
    ) -> None:
        padding = (kernel_size - 1) // 2 if padding is None else padding
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=bias)

    def forward(
        self, input: Tensor, gated: bool = False, gain: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """The convolution of ``input`` (B, L, C).

        Args:
            input: (B, L, C).
            gated: give the first half of the channels times the sigmoid of the second, (B, L', C / 2).
            gain, shift: (C,), an affine map of the output, worked into the taps (a batch norm at rest).
        """
        weight, bias = self.weight, self.bias
        if gain is not None:
            weight = weight * gain[:, None, None]
            bias = None if bias is None else bias * gain
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return depthwise_conv(input, weight, bias, stride=self.stride[0], padding=int(self.padding[0]), gated=gated)
