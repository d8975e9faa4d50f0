"""Samplers for networks that were distilled to a few steps.

A distilled network gives x_0 from any noise level in one call. Either its answer gets fresh noise at the next, lower
level (``sde``; Song et al., consistency models, arXiv 2303.01469, algorithm 1), or the state moves straight along the
velocity (``ode``), which is sharper and less forgiving.

Shapes: B batch; a state is (B, ...).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from allears.diffusion.angles import noise_like
from allears.diffusion.trigflow import NOISE_RAD, Velocity

Kind = Literal["sde", "ode"]

PAPER_MIDDLE_RAD = (1.3, 1.0, 0.6)
"""Angles between the first and the last, as in rCM's paper (arXiv 2510.08431)."""
CODE_MIDDLE_RAD = (1.5, 1.4, 1.0)
"""The same in its released code later on, with better looks."""


def few_step_angles(
    steps: int, sigma_max: float = 80.0, middle_rad: Sequence[float] = CODE_MIDDLE_RAD
) -> tuple[float, ...]:
    """``steps`` + 1 angles from atan(``sigma_max``) to 0; of ``middle_rad`` the first ``steps`` - 1 are taken.

    Args:
        steps: calls of the network, 1 to ``len(middle_rad)`` + 1.
        sigma_max: ratio of noise to data at the start: 80 to 1600 on Wan, more for quality and less for diversity;
            ``math.inf`` starts at pure noise.

    Raises:
        ValueError: there are too few angles for the steps, or they do not fall from the first to 0.
    """
    if not 1 <= steps <= len(middle_rad) + 1:
        raise ValueError(
            f"steps: {steps} given; with {len(middle_rad)} angles in middle_rad 1 to {len(middle_rad) + 1} are possible"
        )
    return _falling((math.atan(sigma_max), *middle_rad[: steps - 1], 0.0))


def sample_few(
    velocity: Velocity,
    noise: Tensor,
    condition: Any,
    angles_rad: Sequence[float],
    kind: Kind = "sde",
    generator: torch.Generator | Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Clean states (B, ...) from standard normal ``noise``, one call of the network for each angle but the last.

    Args:
        velocity: the distilled network, as a velocity of rectified flow.
        angles_rad: falling from at most pi / 2 to 0; see :func:`few_step_angles`.
        generator: of the fresh noise of ``sde``, or what gives it for a state; needed with more than one step.

    Raises:
        ValueError: the angles do not fall, the kind is unknown, or a generator is missing.
    """
    angles = _falling(angles_rad)
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} given; known are {', '.join(get_args(Kind))}")
    if kind == "sde" and len(angles) > 2 and generator is None:
        raise ValueError("generator: None given; the sde sampler draws noise between steps, so give one with a seed")
    times = [math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles]
    x = noise / (math.sin(angles[0]) + math.cos(angles[0]))
    for t, t_next in pairwise(times):
        now = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device).to(x.dtype)
        v = velocity(x, now, condition).to(x.dtype)
        if kind == "ode" or t_next == 0:
            x = x - (t - t_next) * v
        else:
            assert generator is not None
            fresh = noise_like(x, generator) if isinstance(generator, torch.Generator) else generator(x)
            x = (1 - t_next) * (x - t * v) + t_next * fresh
    return x


def _falling(angles_rad: Sequence[float]) -> tuple[float, ...]:
    angles = tuple(float(angle) for angle in angles_rad)
    falls = len(angles) >= 2 and all(b < a for a, b in pairwise(angles))
    if not falls or angles[-1] != 0 or angles[0] > NOISE_RAD + 1e-9:
        raise ValueError(f"angles_rad: {angles} given; they must fall from pi / 2 at most to 0, two at least")
    return angles
