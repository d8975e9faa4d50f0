"""rCM (``allears.diffusion.rcm``) as an objective of the training loop, for any model.

Shapes: B batch; a state is (B, ...).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from allears.diffusion.rcm import RcmNets, RcmStep
from allears.diffusion.trigflow import Velocity

AsVelocity = Callable[[nn.Module], Velocity]
"""A network as a velocity of rectified flow, (x, t, condition)."""

PUBLISHED_ADAMW: dict[str, Any] = {"betas": (0.0, 0.999), "weight_decay": 0.01, "grad_clip": 0.0}
"""Settings of :class:`~allears.train.TrainConfig` with which rCM was published (arXiv 2510.08431)."""


class StudentAndCritic(nn.Module):
    """What the loop trains: the student and, unless score distillation is off, the critic; both start as the teacher.

    Args:
        teacher: is copied, and not changed.
        with_critic: whether there is a critic.
    """

    def __init__(self, teacher: nn.Module, with_critic: bool = True) -> None:
        super().__init__()
        self.student = copy.deepcopy(teacher).requires_grad_(True)
        self.critic = copy.deepcopy(teacher).requires_grad_(True) if with_critic else None


class RcmObjective:
    """A step of rCM on what ``draw`` gives; the loop's model is a :class:`StudentAndCritic`.

    The loop has one optimiser and one learning rate. In the student's steps the critic has no gradient and is left
    alone, and the other way round; with several processes it gets a gradient of zero, which under betas (0, 0.999)
    moves nothing but the weight decay.

    Args:
        step: the settings.
        teacher: fixed; moved by the caller to the device of the training, and taken in evaluation mode.
        as_velocity: of the student and of the critic.
        teacher_velocity: of the teacher, with its guidance; ``as_velocity(teacher)`` by default.
        draw: (step, generator) to clean states of about unit variance (B, ...), float32, and their condition; called
            without autocast. What it draws must follow from its arguments.
        score: the student in evaluation mode to metrics.
    """

    def __init__(
        self,
        step: RcmStep,
        teacher: nn.Module,
        as_velocity: AsVelocity,
        draw: Callable[[int, torch.Generator], tuple[Tensor, Any]],
        score: Callable[[nn.Module], dict[str, float]],
        teacher_velocity: Velocity | None = None,
    ) -> None:
        self.step, self.as_velocity, self.draw, self.score = step, as_velocity, draw, score
        teacher.eval().requires_grad_(False)
        self.teacher = teacher_velocity or as_velocity(teacher)

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        assert isinstance(model, StudentAndCritic)
        with torch.autocast(generator.device.type, enabled=False):
            x0, condition = self.draw(step, generator)
        critic = None if model.critic is None else self.as_velocity(model.critic)
        nets = RcmNets(self.as_velocity(model.student), self.teacher, critic)
        loss, parts = self.step.loss(nets, x0, condition, step, generator)
        return loss, dict(parts)

    def validate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, StudentAndCritic)
        return self.score(model.student)
