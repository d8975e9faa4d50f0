"""Derivatives of a network along a trajectory, and the tangent of continuous-time consistency.

Shapes: B batch; a state is (B, ...), a time or an angle (B,).
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from allears.diffusion.path import expand_time
from allears.diffusion.trigflow import Velocity, VelocityTangent
from allears.ops.attention.jvp.call import DualAttention

Derivative = Literal["exact", "semi", "finite"]
"""``exact``: forward-mode differentiation. ``semi``: exact in x, a central difference in t, where a time embedding is
too rough in 16 bits. ``finite``: a central difference along both; for networks without a forward mode."""


def velocity_tangent(how: Derivative = "exact", step: float = 1e-3) -> VelocityTangent:
    """A way to differentiate a velocity along (dx, dt).

    ``exact`` costs about two calls of the network in one pass, ``semi`` four and ``finite`` three. Attention by torch's
    function has its tangent from :mod:`allears.ops.attention.jvp`.

    Args:
        step: half the distance of a difference: in t for ``semi``; for ``finite``, the factor on (dx, dt).

    Raises:
        ValueError: ``how`` is unknown or the step not positive.
    """
    if how not in get_args(Derivative):
        raise ValueError(f"derivative: {how!r} given; known are {', '.join(get_args(Derivative))}")
    if not step > 0:
        raise ValueError(f"derivative_step: {step} given; it must be positive")

    def exact(
        velocity: Velocity, x: Tensor, t: Tensor, condition: Any, d_x: Tensor, d_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        with DualAttention():
            return torch.func.jvp(lambda x, t: velocity(x, t, condition), (x, t), (d_x, d_t))  # type: ignore

    def semi(
        velocity: Velocity, x: Tensor, t: Tensor, condition: Any, d_x: Tensor, d_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        with DualAttention():
            v, d_v = torch.func.jvp(lambda x: velocity(x, t, condition), (x,), (d_x,))  # type: ignore
        slope = (velocity(x, t + step, condition) - velocity(x, t - step, condition)) / (2 * step)
        return v, d_v + slope * expand_time(d_t, slope)

    def finite(
        velocity: Velocity, x: Tensor, t: Tensor, condition: Any, d_x: Tensor, d_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        ahead = velocity(x + step * d_x, t + step * d_t, condition)
        behind = velocity(x - step * d_x, t - step * d_t, condition)
        return velocity(x, t, condition), (ahead - behind) / (2 * step)

    return {"exact": exact, "semi": semi, "finite": finite}[how]


def tangent_error(
    velocity: Velocity, x: Tensor, t: Tensor, condition: Any, d_x: Tensor, d_t: Tensor, step: float = 1e-3
) -> float:
    """Relative L2 distance of the exact tangent from a central difference; near 1 where a kernel without a forward mode
    cuts the tangent in silence. To be asked once, in float32, before a training.
    """
    with torch.no_grad():
        _, exact = velocity_tangent("exact")(velocity, x, t, condition, d_x, d_t)
        _, finite = velocity_tangent("finite", step)(velocity, x, t, condition, d_x, d_t)
    return float((exact - finite).norm() / finite.norm().clamp_min(1e-12))


def consistency_tangent(
    x: Tensor, angle_rad: Tensor, student: Tensor, teacher: Tensor, d_student: Tensor, ratio: float = 1.0
) -> Tensor:
    """cos(a) df/da of the consistency function f = cos(a) x - sin(a) F along the teacher's flow, warmed up.

    g = -cos sqrt(1 - r^2 sin^2) (F - F_teacher) - r (cos sin x + J), with J = cos sin dF/da (sCM, arXiv 2410.11081,
    section 4.1; rCM, arXiv 2510.08431, algorithm 1). At r = 0 it leads to the teacher's field, and at r = 1 it is the
    full tangent. The paper's released code, as here, lets r weigh J too; without that the warm-up would warm nothing
    up.

    Args:
        x: x_a, (B, ...).
        angle_rad: (B,).
        student, teacher: F of either, (B, ...).
        d_student: J, the tangent of the student's F along (cos sin F_teacher, cos sin).
        ratio: r, 0 to 1.
    """
    sin, cos = angle_rad.sin(), angle_rad.cos()
    pull = expand_time(cos * (1 - (ratio * sin) ** 2).sqrt(), x)
    return -pull * (student - teacher) - ratio * (expand_time(cos * sin, x) * x + d_student)


def normalise_tangent(g: Tensor, floor: float = 0.1) -> Tensor:
    """g / (||g|| + floor), the norm over each entry of the batch, in float64 (arXiv 2410.11081, section 4.1)."""
    wide = g.to(torch.float64)
    norm = wide.flatten(1).norm(dim=1)
    return (wide / (expand_time(norm, wide) + floor)).to(g.dtype)
