"""Solvers that carry a state from t = 1 to t = 0.

A solver is a ``Step``: it takes one step of the equation. Deterministic ones (ODE) live here; a stochastic one that
also returns its
log-probability is another ``Step`` with a generator, and runs in the same ``integrate``.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from allears.diffusion.path import LinearPath

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), t (B,)) to the predicted x_0."""


class Step(Protocol):
    def __call__(self, denoise: Denoise, path: LinearPath, x: Tensor, t: float, t_next: float) -> Tensor: ...


def _velocity(denoise: Denoise, path: LinearPath, x: Tensor, t: float) -> Tensor:
    time = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
    return path.velocity(x, denoise(x, time), time)


def euler(denoise: Denoise, path: LinearPath, x: Tensor, t: float, t_next: float) -> Tensor:
    """First order; one network call. The step to t = 0 returns the predicted x_0 itself."""
    return x + (t_next - t) * _velocity(denoise, path, x, t)


def midpoint(denoise: Denoise, path: LinearPath, x: Tensor, t: float, t_next: float) -> Tensor:
    """Second order; two network calls, none of them at t = 0."""
    middle = 0.5 * (t + t_next)
    half = x + (middle - t) * _velocity(denoise, path, x, t)
    return x + (t_next - t) * _velocity(denoise, path, half, middle)


def heun(denoise: Denoise, path: LinearPath, x: Tensor, t: float, t_next: float) -> Tensor:
    """Second order; two network calls. The step that ends at t = 0 is Euler's: the velocity has no value there."""
    first = _velocity(denoise, path, x, t)
    guess = x + (t_next - t) * first
    if t_next <= 0:
        return guess
    return x + (t_next - t) * 0.5 * (first + _velocity(denoise, path, guess, t_next))


SOLVERS: dict[str, Step] = {"euler": euler, "midpoint": midpoint, "heun": heun}


def time_grid(steps: int) -> list[float]:
    """``steps`` + 1 equally spaced times from 1 to 0."""
    if steps < 1:
        raise ValueError(f"steps: {steps} given; at least 1 is needed")
    return [1 - index / steps for index in range(steps)] + [0.0]


def integrate(denoise: Denoise, path: LinearPath, x1: Tensor, times: Sequence[float], step: Step = euler) -> Tensor:
    """Carry ``x1`` along ``times`` (from 1 down to 0)."""
    if len(times) < 2 or any(b >= a for a, b in pairwise(times)):
        raise ValueError(f"times: {list(times)} given; at least two are needed, strictly falling")
    x = x1
    for t, t_next in pairwise(times):
        x = step(denoise, path, x, t, t_next)
    return x
