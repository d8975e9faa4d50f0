"""Depthwise convolution over (B, L, C), the layout of linear layers: no copies to channels-first and back."""

from allears.ops.conv.depthwise.call import depthwise_conv

__all__ = ["depthwise_conv"]
