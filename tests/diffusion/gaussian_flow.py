"""A Gaussian world in which everything is known: data N(mean, scale^2), its velocity, and its consistency function.

Shapes: B batch, N numbers of a state; states (B, N), times (B,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianFlow:
    mean: float | Tensor
    scale: float | Tensor

    def velocity(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """E[z - x_0 | x_t]."""
        time = t[:, None]
        share = (x - (1 - time) * self.mean) / ((1 - time) ** 2 * self.scale**2 + time**2)
        return time * share - (self.mean + (1 - time) * self.scale**2 * share)

    def clean(self, x: Tensor, angle: Tensor) -> Tensor:
        """Where the flow takes x_a at a = 0: the flow keeps the rank of each number."""
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return self.mean + self.scale * (x - cos * self.mean) / (cos**2 * self.scale**2 + sin**2).sqrt()

    def consistent(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """The velocity of a network whose prediction of x_0 is ``clean``."""
        time = t[:, None]
        length = (time**2 + (1 - time) ** 2).sqrt()
        return (x - self.clean(x / length, torch.atan2(t, 1 - t))) / time
