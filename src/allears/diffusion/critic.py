"""Score distillation with a critic (DMD; Yin et al., arXiv 2311.18828), which regularises consistency in rCM.

The critic ("fake score") is a network trained to denoise what the student makes; where it and the teacher disagree, the
student's distribution is denser or thinner than the teacher's.

Shapes: B batch; a state is (B, ...), an angle (B,).
"""

from typing import Any

import torch
from torch import Tensor

from allears.diffusion.angles import Angles, noise_like
from allears.diffusion.path import expand_time
from allears.diffusion.trigflow import NOISE_RAD, Field, TrigFlow, mix


def squared_error(x: Tensor, target: Tensor) -> Tensor:
    """Sum of (x - target)^2 over all but the batch, (B,); an entry with a number that is not finite counts 0 and gives
    no gradient."""
    difference = (x - target).flatten(1)
    sound = torch.isfinite(difference).all(dim=1, keepdim=True)
    return torch.where(sound, difference, 0.0).square().sum(1)


def roll_out(
    student: TrigFlow, noise: Tensor, condition: Any, calls: int, angles: Angles, generator: torch.Generator
) -> Tensor:
    """What the student makes of ``noise`` in so many calls, with fresh noise between them; (B, ...).

    The first call is at pure noise, the next ones at falling angles drawn from ``angles``; the gradient goes through
    the last call alone.
    """
    angle = torch.full((noise.shape[0],), NOISE_RAD, dtype=torch.float64, device=noise.device)
    x = noise
    with torch.no_grad():
        for _ in range(calls - 1):
            clean = student(x, angle, condition).clean
            angle = torch.minimum(angles.draw(len(noise), generator).to(noise.device), angle)
            x = mix(clean, noise_like(clean, generator), angle)
    return student(x, angle, condition).clean


def score_loss(made: Tensor, critic: Field, teacher: Field) -> Tensor:
    """(B,): its gradient with respect to ``made`` is 2 (x0_critic - x0_teacher) / mean |made - x0_teacher|.

    Args:
        made: the student's clean state, with its graph.
        critic, teacher: of ``made`` with noise.
    """
    with torch.no_grad():
        wide = made.to(torch.float64)
        size = (wide - teacher.clean).abs().flatten(1).mean(1).clamp_min(1e-5)
        gradient = (critic.clean.to(torch.float64) - teacher.clean) / expand_time(size, wide)
        target = (wide - gradient).to(made.dtype)
    return squared_error(made, target)


def critic_loss(critic: TrigFlow, made: Tensor, condition: Any, angle_rad: Tensor, noise: Tensor) -> Tensor:
    """(B,): squared error of the critic's field on ``made`` with ``noise``, ||x0_critic - made||^2 / sin(a)^2."""
    target = mix(noise, -made, angle_rad)  # cos(a) z - sin(a) x_0
    return squared_error(critic(mix(made, noise, angle_rad), angle_rad, condition).field, target)
