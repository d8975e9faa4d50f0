"""TrigFlow around a rectified-flow network: noise levels as angles, and the network's field and its tangent.

TrigFlow (Lu and Song, arXiv 2410.11081): x_a = cos(a) x_0 + sin(a) z for an angle a from 0 (data) to pi / 2 (noise), z
standard normal; its probability flow is dx/da = F, and x_0 = cos(a) x_a - sin(a) F. Rectified flow's time at the same
ratio of noise to data is t = sin(a) / (cos(a) + sin(a)), and its state is x_a / (cos(a) + sin(a)) (rCM, arXiv
2510.08431, appendix): a network trained for one runs in the other unchanged.

Shapes: B batch; a state is (B, ...), a time or an angle (B,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allears.diffusion.path import expand_time

Velocity = Callable[[Tensor, Tensor, Any], Tensor]
"""(x (B, ...), t (B,) in [0, 1], condition) to dx/dt, where x = (1 - t) x_0 + t z and z is standard normal."""

VelocityTangent = Callable[[Velocity, Tensor, Tensor, Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(velocity, x, t, condition, dx (B, ...), dt (B,)) to the velocity and its derivative along (dx, dt); see
``tangent.py``."""

NOISE_RAD = math.pi / 2
"""The angle of pure noise."""


class Field(NamedTuple):
    """What a network says of a state: dx/da, and the clean state that follows from it, each (B, ...)."""

    field: Tensor
    clean: Tensor


def rectified_time(angle_rad: Tensor) -> Tensor:
    """Rectified flow's time in [0, 1] of angles in [0, pi / 2]."""
    sin, cos = angle_rad.sin(), angle_rad.cos()
    return sin / (sin + cos)


def angle_of_time(t: Tensor) -> Tensor:
    """The inverse of :func:`rectified_time`."""
    return torch.atan2(t, 1 - t)


def mix(clean: Tensor, noise: Tensor, angle_rad: Tensor) -> Tensor:
    """x_a = cos(a) x_0 + sin(a) z."""
    return expand_time(angle_rad.cos(), clean) * clean + expand_time(angle_rad.sin(), clean) * noise


@dataclass(frozen=True)
class TrigFlow:
    """A rectified-flow network as one of TrigFlow.

    Factors are computed in the dtype of the angles, which should be float64 (cos near pi / 2), and applied in that of
    the state, float32 or float64. The network may compute in less.

    Args:
        velocity: the network; its data has about unit variance.
    """

    velocity: Velocity

    def __call__(self, x: Tensor, angle_rad: Tensor, condition: Any = None) -> Field:
        """x (B, ...), angle_rad (B,) in [0, pi / 2].

        F = ((cos - sin) x + v) / (cos + sin), which has no 0 / 0 at either end.
        """
        plus, minus = _sum_and_difference(angle_rad, x)
        v = self.velocity(x / plus, rectified_time(angle_rad).to(x.dtype), condition).to(x.dtype)
        field = (minus * x + v) / plus
        return Field(field, _clean(x, field, angle_rad))

    def with_tangent(
        self, x: Tensor, angle_rad: Tensor, condition: Any, d_x: Tensor, d_angle: Tensor, differentiate: VelocityTangent
    ) -> tuple[Field, Tensor]:
        """The field, and dF along (d_x (B, ...), d_angle (B,)); the network alone is given to ``differentiate``."""
        plus, minus = _sum_and_difference(angle_rad, x)
        step = expand_time(d_angle, x)
        time = rectified_time(angle_rad).to(x.dtype)
        d_time = (d_angle / (angle_rad.cos() + angle_rad.sin()) ** 2).to(x.dtype)
        d_state = d_x / plus - x * (minus / plus**2) * step
        v, d_v = differentiate(self.velocity, x / plus, time, condition, d_state, d_time)
        v, d_v = v.to(x.dtype), d_v.to(x.dtype)
        field = (minus * x + v) / plus
        tangent = (minus * d_x + d_v) / plus - (x + field * (minus / plus)) * step
        return Field(field, _clean(x, field, angle_rad)), tangent


def _sum_and_difference(angle_rad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    sin, cos = angle_rad.sin(), angle_rad.cos()
    return expand_time(cos + sin, x), expand_time(cos - sin, x)


def _clean(x: Tensor, field: Tensor, angle_rad: Tensor) -> Tensor:
    return expand_time(angle_rad.cos(), x) * x - expand_time(angle_rad.sin(), x) * field


def guided(velocity: Velocity, weight: float, unconditional: Any) -> Velocity:
    """``velocity`` with classifier-free guidance, v_u + weight (v_c - v_u) (Ho and Salimans, arXiv 2207.12598).

    Args:
        weight: 1 is the conditional network alone; Wan's teacher has 5.
        unconditional: the condition of v_u, such as the embedding of a negative prompt.
    """

    def both(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        without = velocity(x, t, unconditional)
        return without + weight * (velocity(x, t, condition) - without)

    return both


def from_clean(predict: Velocity, least_time: float = 1e-3) -> Velocity:
    """The velocity of a network that predicts x_0: v = (x - x_0) / t.

    Args:
        predict: (x, t, condition) to x_0.
        least_time: below it t counts as this in the quotient, which would amplify the network's error.
    """

    def velocity(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return (x - predict(x, t, condition).to(x.dtype)) / expand_time(t.clamp_min(least_time), x)

    return velocity
