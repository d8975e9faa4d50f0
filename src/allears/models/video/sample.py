"""From noise and a caption to a video: the flow solved with classifier-free guidance (Ho and Salimans, 2022), or a few
calls of a distilled network.

Shapes: B videos, T frames, H rows, W columns, M words.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from allears.diffusion.few_steps import few_step_angles, sample_few
from allears.diffusion.path import LinearPath, expand_time
from allears.diffusion.solvers import SOLVERS, integrate, time_grid
from allears.models.video.config import MOST_FEW_STEPS, VideoConfig
from allears.models.video.loss import Velocity


def shifted_times(steps: int, shift: float) -> list[float]:
    """``steps`` + 1 flow times from 1 to 0, denser near 1 for a ``shift`` above 1.

    Raises:
        ValueError: ``steps`` is below 1 or ``shift`` not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift: {shift} given; wanted more than 0")
    return [shift * u / (1 + (shift - 1) * u) for u in time_grid(steps)]


def guided(velocity: Velocity, guidance: float) -> Velocity:
    """v without caption + guidance (v with caption - v without): two passes in one batch; ``velocity`` itself at 1."""
    if guidance == 1:
        return velocity

    def both(x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        pair = velocity(torch.cat([x, x]), torch.cat([t, t]), torch.cat([tokens, torch.zeros_like(tokens)]))
        with_caption, without = pair.chunk(2)
        return torch.lerp(without, with_caption, guidance)

    return both


def draw_noise(config: VideoConfig, seeds: list[int]) -> Tensor:
    """z (B, 3, T, H, W), one seed a video, drawn on the CPU: the same on every device, in every batch."""
    return next(noises(config, seeds))


def noises(config: VideoConfig, seeds: list[int]) -> Iterator[Tensor]:
    """:func:`draw_noise`, and after it others of the same seeds, without end."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(3, *config.video_shape, generator=draw) for draw in draws])


def generate(
    velocity: Velocity,
    config: VideoConfig,
    tokens: Tensor,
    noise: Tensor,
    steps: int | None = None,
    guidance: float | None = None,
    solver: str = "euler",
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Videos (B, 3, T, H, W) in [0, 1] for captions (B, M), from noise (B, 3, T, H, W).

    Args:
        velocity: the network, or what computes the same.
        steps, guidance: the configuration's where not given. Guidance other than 1 doubles the work.
        solver: ``euler``, ``midpoint`` or ``heun``; the last two call the network twice a step.
        on_step: told how many calls of the network are done, from 1.

    Raises:
        ValueError: the steps are not 1 to 1,000, the guidance is below 0, or the solver is unknown.
    """
    steps = config.steps if steps is None else steps
    guidance = config.guidance if guidance is None else guidance
    if not 1 <= steps <= 1000:
        raise ValueError(f"steps: {steps} given; 1 to 1000 make sense here")
    if not guidance >= 0:
        raise ValueError(f"guidance: {guidance} given; wanted 0 or more, 1 for none")
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is unknown; known are {', '.join(SOLVERS)}")
    field, calls = guided(velocity, guidance), 0

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        clean = x - expand_time(t, x) * field(x, t, tokens).float()
        calls += 1
        if on_step is not None:
            on_step(calls)
        return clean

    times = shifted_times(steps, config.shift)
    return (0.5 + 0.5 * integrate(denoise, LinearPath(1.0), noise, times, SOLVERS[solver])).clamp(0.0, 1.0)


@torch.no_grad()
def generate_few(
    velocity: Velocity,
    config: VideoConfig,
    tokens: Tensor,
    seeds: list[int],
    steps: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Videos (B, 3, T, H, W) in [0, 1] for captions (B, M), from a distilled network without guidance.

    Args:
        velocity: the network.
        seeds: one a video; the first noise is that of :func:`draw_noise`, the noise between steps follows it.
        steps: the configuration's where not given.
        on_step: told how many calls of the network are done, from 1.

    Raises:
        ValueError: the steps are not 1 to :data:`~allears.models.video.config.MOST_FEW_STEPS`.
    """
    steps = config.steps if steps is None else steps
    if not 1 <= steps <= MOST_FEW_STEPS:
        raise ValueError(
            f"steps: {steps} given; weights that were distilled to a few steps take 1 to {MOST_FEW_STEPS} of them"
        )
    stream, calls = noises(config, seeds), 0

    def fresh(_: Tensor | None = None) -> Tensor:
        return next(stream).to(tokens.device)

    def counted(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        nonlocal calls
        found = velocity(x, t, condition).float()
        calls += 1
        if on_step is not None:
            on_step(calls)
        return found

    made = sample_few(counted, fresh(), tokens, few_step_angles(steps), "sde", fresh)
    return (0.5 + 0.5 * made).clamp(0.0, 1.0)


def calls_of(steps: int, solver: str) -> int:
    """Network calls that :func:`generate` makes; those of ``euler`` for an unknown solver."""
    return {"midpoint": 2 * steps, "heun": 2 * steps - 1}.get(solver, steps)
