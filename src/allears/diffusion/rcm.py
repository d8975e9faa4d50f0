"""One step of distillation to few steps: score-regularised continuous-time consistency (rCM, arXiv 2510.08431).

The step knows no model: networks are velocities (x, t, condition) of rectified flow, and the caller's optimiser takes
the loss. ``turn`` says whose gradient it has: the student's or the critic's.

>>> step = RcmStep(RcmSettings())
>>> nets = RcmNets(student=student, teacher=guided(teacher, 5.0, nothing), critic=critic)
>>> loss, parts = step.loss(nets, x0, condition, index, generator)

Shapes: B batch; a state is (B, ...), an angle (B,).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from allears.diffusion.angles import LogNormalTimes, ShiftedTimes, noise_like, warmup_ratio
from allears.diffusion.critic import critic_loss, roll_out, score_loss, squared_error
from allears.diffusion.path import expand_time
from allears.diffusion.tangent import Derivative, consistency_tangent, normalise_tangent, velocity_tangent
from allears.diffusion.trigflow import Field, TrigFlow, Velocity, mix

Turn = Literal["student", "critic"]


@dataclass(frozen=True)
class RcmSettings:
    """How a student is distilled; the defaults are those published for Wan 1.3B.

    Published beside: learning rates 2e-6 (student) and 4e-7 (critic), AdamW with betas (0, 0.999), weight decay 0.01,
    no clipping of gradients, batch 256, 10,000 iterations.

    Args:
        warmup_steps: steps in which the student alone is trained and the tangent grows from the teacher's field.
        student_every: after the warm-up, one step in so many is the student's, the others are the critic's.
        score_weight: weight of score distillation against consistency; 0 trains without a critic.
        rollout_calls: most calls of the student in what the critic judges; they cycle from 1 to this.
        derivative, derivative_step: see :func:`~allears.diffusion.tangent.velocity_tangent`.
        tangent_floor: c in g / (||g|| + c).
        consistency_angles: noise levels of the consistency term.
        score_angles: noise levels at which the critic and the teacher judge, and of the roll-out.
    """

    warmup_steps: int = 1000
    student_every: int = 5
    score_weight: float = 0.01
    rollout_calls: int = 4
    derivative: Derivative = "exact"
    derivative_step: float = 1e-3
    tangent_floor: float = 0.1
    consistency_angles: LogNormalTimes = LogNormalTimes()  # noqa: RUF009
    score_angles: ShiftedTimes = ShiftedTimes()  # noqa: RUF009

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("student_every", 1), ("score_weight", 0), ("rollout_calls", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be at least {least}")
        if self.derivative not in get_args(Derivative):
            raise ValueError(f"derivative: {self.derivative!r} given; known are {', '.join(get_args(Derivative))}")
        for name in ("derivative_step", "tangent_floor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be positive")


class RcmNets(NamedTuple):
    """The networks as velocities of rectified flow.

    Args:
        student: what is trained; starts as a copy of the teacher.
        teacher: fixed, with its guidance; see :func:`~allears.diffusion.trigflow.guided`.
        critic: trained beside the student, starts as a copy of the teacher, without guidance. ``None`` where
            ``score_weight`` is 0.
    """

    student: Velocity
    teacher: Velocity
    critic: Velocity | None = None


@dataclass(frozen=True)
class RcmStep:
    """The loss of a training step; a value without state, so that a resumed run equals an unbroken one."""

    settings: RcmSettings = RcmSettings()

    def turn(self, step: int) -> Turn:
        """Whose step it is: the student's through the warm-up, then one in ``student_every``."""
        late = step - self.settings.warmup_steps
        if late < 0 or self.settings.score_weight == 0 or late % self.settings.student_every == 0:
            return "student"
        return "critic"

    def rollout_calls(self, step: int) -> int:
        """Calls of the student in this step's roll-out, 1 to ``rollout_calls``, in turn for either network."""
        late = max(0, step - self.settings.warmup_steps)
        student_steps = late // self.settings.student_every
        count = student_steps if self.turn(step) == "student" else late - 1 - student_steps
        return 1 + count % self.settings.rollout_calls

    def loss(
        self, nets: RcmNets, x0: Tensor, condition: Any, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its parts for a log.

        The gradient is that of the network whose turn it is; the other one gets none. What is drawn follows from
        ``generator``. Sums run over all elements of an entry, so that the consistency term is near 1 at any size of
        state (a mean would make the score term depend on it).

        Args:
            x0: (B, ...) clean states of about unit variance, float32; best made by the teacher.
            condition: handed to the networks.
            step: index of the step, from 0.
            generator: on any device; the noise goes to that of x0.

        Raises:
            ValueError: ``score_weight`` is not 0 and there is no critic.
        """
        if self.settings.score_weight and nets.critic is None:
            raise ValueError("critic: None given, and score_weight is not 0; give a critic, or set score_weight to 0")
        if self.turn(step) == "critic":
            return self.critic_loss(nets, x0, condition, step, generator)
        consistency = self.consistency_loss(nets, x0, condition, step, generator)
        parts = {"consistency": consistency.detach().mean()}
        total = consistency
        if self.settings.score_weight and step >= self.settings.warmup_steps:
            score = self.score_loss(nets, x0, condition, step, generator)
            parts["score"] = score.detach().mean()
            total = total + self.settings.score_weight * score
        return total.mean(), parts

    def consistency_loss(
        self, nets: RcmNets, x0: Tensor, condition: Any, step: int, generator: torch.Generator
    ) -> Tensor:
        """(B,): ||F - sg(F) - g||^2 with the normalised tangent g, whose gradient moves the student's F along g."""
        settings = self.settings
        student, teacher = TrigFlow(nets.student), TrigFlow(nets.teacher)
        angle = settings.consistency_angles.draw(len(x0), generator).to(x0.device)
        x = mix(x0, noise_like(x0, generator), angle)
        with torch.no_grad():
            flow = teacher(x, angle, condition).field
            speed = angle.cos() * angle.sin()
            differentiate = velocity_tangent(settings.derivative, settings.derivative_step)
            _, change = student.with_tangent(x, angle, condition, expand_time(speed, x) * flow, speed, differentiate)
        field = student(x, angle, condition).field
        with torch.no_grad():
            ratio = warmup_ratio(step, settings.warmup_steps)
            g = consistency_tangent(x, angle, field, flow, change, ratio)
            target = field + normalise_tangent(g, settings.tangent_floor)
        return squared_error(field, target)

    def score_loss(self, nets: RcmNets, x0: Tensor, condition: Any, step: int, generator: torch.Generator) -> Tensor:
        """(B,): distance of the student's roll-out from where the critic and the teacher would move it."""
        assert nets.critic is not None
        made, angle, noise = self._made(nets, x0, condition, step, generator)
        with torch.no_grad():
            x = mix(made, noise, angle)
            seen: list[Field] = [TrigFlow(net)(x, angle, condition) for net in (nets.critic, nets.teacher)]
        return score_loss(made, seen[0], seen[1])

    def critic_loss(
        self, nets: RcmNets, x0: Tensor, condition: Any, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flow matching of the critic on the student's roll-out."""
        assert nets.critic is not None
        with torch.no_grad():
            made, angle, noise = self._made(nets, x0, condition, step, generator)
        loss = critic_loss(TrigFlow(nets.critic), made, condition, angle, noise).mean()
        return loss, {"critic": loss.detach()}

    def _made(
        self, nets: RcmNets, x0: Tensor, condition: Any, step: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the student makes of noise, and an angle and noise at which to judge it."""
        angles = self.settings.score_angles
        start = noise_like(x0, generator)
        made = roll_out(TrigFlow(nets.student), start, condition, self.rollout_calls(step), angles, generator)
        return made, angles.draw(len(x0), generator).to(x0.device), noise_like(x0, generator)
