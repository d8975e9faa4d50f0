"""From a noisy waveform to a clean one: the flow solved on the compressed spectrum."""

from collections.abc import Callable

import torch
from torch import Tensor

from allears.diffusion.path import LinearPath
from allears.diffusion.solvers import SOLVERS, integrate, time_grid
from allears.models.enhance.config import EnhanceConfig
from allears.models.enhance.state import level_of, to_state, to_waveform

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The network, or what computes the same: x_t and y (B, T, F, 2), t (B,), to the clean state (B, T, F, 2)."""


def sampler(config: EnhanceConfig, steps: int | None, solver: str | None) -> tuple[int, str]:
    """Steps and solver to sample with; ``None`` takes the configuration's.

    Raises:
        ValueError: the steps are not 1 to 30, or the solver is unknown.
    """
    steps, solver = config.steps if steps is None else steps, config.solver if solver is None else solver
    if not 1 <= steps <= 30:
        raise ValueError(f"steps: {steps} given; 1 to 30 make sense here")
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is unknown; known are {', '.join(SOLVERS)}")
    return steps, solver


def enhance(
    net: Predict,
    config: EnhanceConfig,
    noisy: Tensor,
    steps: int | None = None,
    solver: str | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noisy waveforms (B, S) at the core's rate to clean ones (B, S).

    Args:
        steps: solver steps, 1 to 30; the default is the configuration's.
        solver: ``euler``, ``midpoint`` or ``heun``; the last two call the network twice a step.
        noise: z of the prior, in the shape of the state; drawn from ``generator`` if not given.

    Raises:
        ValueError: see :func:`sampler`.
    """
    steps, solver = sampler(config, steps, solver)
    level = level_of(noisy)
    y = to_state(noisy / level, config)
    path = LinearPath(config.sigma)
    z = path.noise(y, generator) if noise is None else noise
    start = path.prior(y if config.prior == "noisy" else torch.zeros_like(y), z)
    clean = integrate(
        lambda x, t: net(x, y, t).to(torch.float32),
        path,
        start,
        time_grid(steps),
        SOLVERS[solver],
    )
    return to_waveform(clean, noisy.shape[-1], config) * level
