"""Probability paths of conditional flow matching: t = 1 is the prior, t = 0 the data.

State: any tensor shape (B, ...); ``t`` is (B,) and is broadcast over the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


@dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x_0 + t (mean + sigma z), z standard normal.

    With the noisy recording as ``mean`` this is the path of FlowSE (Lee et al., ICASSP 2025: sigma_min 0, sigma_max
    ``sigma``); with ``mean`` zero it is rectified flow from a Gaussian. As sigma_min is 0, x_t - x_0 = t v: a network
    that predicts x_0 gives the velocity v = (x_t - x_0) / t, and the other way round.

    Args:
        sigma: standard deviation of the prior, > 0.
    """

    sigma: float

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma: {self.sigma} given; it must be positive")

    def prior(self, mean: Tensor, z: Tensor) -> Tensor:
        """x_1."""
        return mean + self.sigma * z

    def sample(self, x0: Tensor, mean: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x_t."""
        time = expand_time(t, x0)
        return (1 - time) * x0 + time * self.prior(mean, z)

    def velocity(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """dx/dt at x_t for the predicted ``x0``; t > 0."""
        return (x_t - x0) / expand_time(t, x_t)

    def score(self, x_t: Tensor, x0: Tensor, mean: Tensor, t: Tensor) -> Tensor:
        """Gradient of log p_t(x_t) where x0 is the posterior mean: -z / (sigma t), with z solved from x_t, x0 and
        ``mean``.
        """
        time = expand_time(t, x_t)
        z = (x_t - (1 - time) * x0 - time * mean) / (time * self.sigma)
        return -z / (time * self.sigma)

    def noise(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z in the shape of ``like``; drawn on the generator's device, so that a seed gives the same noise
        everywhere.
        """
        device = generator.device if generator is not None else like.device
        return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
