"""Draws of noise levels for training, as TrigFlow's angles.

Shapes: B batch.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from allears.diffusion.trigflow import angle_of_time

LEAST_TIME = 1e-4
"""No draw of :class:`ShiftedTimes` is closer to the data than this time of rectified flow."""


class Angles(Protocol):
    """A distribution of noise levels."""

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        """(B,) in (0, pi / 2], float64, on the generator's device."""
        ...


@dataclass(frozen=True)
class LogNormalTimes:
    """The ratio of noise to data, tan(a), is log-normal.

    Args:
        mean, std: of log tan(a). rCM on Wan 1.3B has 0.7 and 1.6; for T latent frames -0.8 + ln(T) / 2 and 1.6 (arXiv
            2510.08431, table of settings).
    """

    mean: float = 0.7
    std: float = 1.6

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std: {self.std} given; the standard deviation of log tan(a) must be positive")

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(batch, generator=generator, device=generator.device, dtype=torch.float64)
        return torch.exp(self.mean + self.std * z).atan()


@dataclass(frozen=True)
class ShiftedTimes:
    """Rectified flow's time is u' = s u / (1 + (s - 1) u) for u uniform in [0, 1] (SD3, arXiv 2403.03206, eq. 23).

    Args:
        shift: s, at least 1; rCM has 5.
    """

    shift: float = 5.0

    def __post_init__(self) -> None:
        if not self.shift >= 1:
            raise ValueError(f"shift: {self.shift} given; it must be at least 1, which is uniform")

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
        t = self.shift * u / (1 + (self.shift - 1) * u)
        return angle_of_time(t.clamp(LEAST_TIME, 1.0))


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal in the shape, dtype and place of x, drawn on the generator's device."""
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)


def warmup_ratio(step: int, steps: int) -> float:
    """Share of a warm-up of ``steps`` that is over at ``step``, 0 to 1."""
    return 1.0 if steps <= 0 else min(1.0, max(0.0, step / steps))


def published_mean(latent_frames: int) -> float:
    """The mean of :class:`LogNormalTimes` for so many latent frames: -0.8 + ln(T) / 2 (arXiv 2510.08431)."""
    if latent_frames < 1:
        raise ValueError(f"latent_frames: {latent_frames} given; at least 1 is needed")
    return -0.8 + 0.5 * math.log(latent_frames)
