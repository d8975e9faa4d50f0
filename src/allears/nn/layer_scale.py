"""A learned weight for each channel of what a block adds (LayerScale; Touvron et al., Going deeper with image
transformers, ICCV 2021).

Shapes: ... any leading sizes, C channels.
"""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """y (..., C) times a gain of each channel, which begins near 0, so that deep stacks begin as their residuals.

    Args:
        channels: C.
        start: the gains of an untrained module.
    """

    def __init__(self, channels: int, start: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), start))

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """gain * y, or ``residual`` + gain * y in one pass over memory."""
        return y * self.weight if residual is None else torch.addcmul(residual, y, self.weight)
