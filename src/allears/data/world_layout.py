"""From a spec of the small world to places: where each thing is in each frame, and where the camera looks.

Units: 1 is the frame's width and height; x runs to the right and y down; angles are in radians, clockwise.

Shapes: B videos, K things, T frames.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from allears.data.world import BACKGROUNDS, COLOURS, MOST_THINGS, SHAPES, SIZES, Thing, WorldSpec

HORIZON = 0.6
"""Height at which wall and floor meet."""
BOTTOM = {"ball": 1.0, "box": 0.84, "triangle": 0.62, "star": 0.92}
"""How far a thing that stands reaches down from its centre, over its radius."""

_WIDTH = {"ball": 0.95, "box": 0.84, "triangle": 0.62, "star": 0.62}


@dataclass(frozen=True)
class Layout:
    """Places of a batch, all float32 but the indices. Slots of things that are not there have radius 0.

    Args:
        x, y, angle: (B, K, T), centres and turns; slot 0 is painted first, and so the farthest away.
        radius: (B, K).
        shape, colour: (B, K) int64, of ``SHAPES`` and ``COLOURS``.
        slot: (B, K) int64, the slot of the k-th thing of the spec.
        pan, zoom: (B, T), what the camera moved to the right, and its magnification.
        background: (B,) int64, of ``BACKGROUNDS``.
        phases: (B, 4), of the bands on wall and floor.
    """

    x: Tensor
    y: Tensor
    angle: Tensor
    radius: Tensor
    shape: Tensor
    colour: Tensor
    slot: Tensor
    pan: Tensor
    zoom: Tensor
    background: Tensor
    phases: Tensor

    def to(self, device: torch.device | str) -> "Layout":
        return Layout(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def lay_out(specs: Sequence[WorldSpec], frames: int) -> Layout:
    """Places of the things of each spec in ``frames`` frames, on the CPU; the same spec gives the same ones.

    Raises:
        ValueError: no spec, or fewer than two frames.
    """
    if not specs or frames < 2:
        raise ValueError(f"specs, frames: {len(specs)} and {frames} given; wanted 1 or more specs and 2 or more frames")
    count, time = len(specs), np.linspace(0.0, 1.0, frames)
    places = np.zeros((3, count, MOST_THINGS, frames), np.float32)
    radius = np.zeros((count, MOST_THINGS), np.float32)
    kinds = np.zeros((3, count, MOST_THINGS), np.int64)
    camera = np.zeros((2, count, frames), np.float32)
    background, phases = np.zeros(count, np.int64), np.zeros((count, 4), np.float32)
    for b, given in enumerate(specs):
        spec, rng = given.with_background(), np.random.default_rng([given.seed, 5])
        camera[:, b] = _camera(spec.camera, time, rng)
        background[b], phases[b] = tuple(BACKGROUNDS).index(spec.background or ""), rng.uniform(0, 2 * math.pi, 4)
        paths = _paths(spec, time, rng)
        behind = spec.relation in ("and", "beside", "behind")
        kinds[2, b] = (0, 1) if behind or len(paths) == 1 else (1, 0)
        for k, (thing, (path, size)) in enumerate(zip(spec.things, paths, strict=True)):
            slot = kinds[2, b, k]
            places[:, b, slot], radius[b, slot] = path, size
            kinds[:2, b, slot] = SHAPES.index(thing.shape), tuple(COLOURS).index(thing.colour)
    arrays = (*places, radius, *kinds, *camera, background, phases)
    return Layout(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def _camera(kind: str, time: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pan and zoom, symmetric about the middle of the clip; both drawn whatever the kind, so that a seed keeps them."""
    pan, ratio = rng.uniform(0.3, 0.4), rng.uniform(1.45, 1.65)
    sign = {"pans left": -1, "pans right": 1}.get(kind, 0)
    power = {"zooms in": 1, "zooms out": -1}.get(kind, 0)
    return sign * pan * (time - 0.5), ratio ** (power * (time - 0.5))


Path = tuple[tuple[np.ndarray, np.ndarray, np.ndarray], float]
"""x, y and angle (T,), and the radius."""


def _paths(spec: WorldSpec, time: np.ndarray, rng: np.random.Generator) -> list[Path]:
    sizes = [SIZES[thing.size] * rng.uniform(0.95, 1.05) for thing in spec.things]
    if len(sizes) == 1:
        return [(_path(spec.things[0], sizes[0], 0.5, 0.83, 0.54, time, rng), sizes[0])]
    side = rng.choice((-1, 1))
    if spec.relation in ("and", "beside"):
        centres, grounds, way = (0.5 + 0.25 * side, 0.5 - 0.25 * side), (0.83, 0.83), 0.27
    else:
        gap = side * _gap(spec, sizes)
        centres, way = (0.5 + gap / 2, 0.5 - gap / 2), 0.54
        grounds = (0.81, 0.86) if spec.relation == "behind" else (0.86, 0.81)
    return [
        (_path(thing, size, centre, ground, way, time, rng), size)
        for thing, size, centre, ground in zip(spec.things, sizes, centres, grounds, strict=True)
    ]


def _gap(spec: WorldSpec, sizes: list[float]) -> float:
    """Between the middles of two things, of which one hides a part of the other: of one that stays a third, of one that
    leaves the ground more, as it is seen whole in the air."""
    motion = spec.things[0].motion
    if motion.startswith("rolls"):
        return 0.0
    widths = [_WIDTH[thing.shape] * size for thing, size in zip(spec.things, sizes, strict=True)]
    cover, hidden = widths if spec.relation == "in front of" else widths[::-1]
    return cover + 0.2 * hidden if motion in ("stays", "spins") else 0.5 * (cover + hidden)


def _path(
    thing: Thing, radius: float, centre: float, ground: float, way: float, time: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.full_like(time, centre + rng.uniform(-0.03, 0.03))
    y = np.full_like(time, ground - BOTTOM[thing.shape] * radius + rng.uniform(-0.01, 0.01))
    angle = np.full_like(time, 0.0)
    top = rng.uniform(0.1, 0.18)
    if thing.motion.startswith("rolls"):
        sign = 1 if thing.motion == "rolls right" else -1
        moved = sign * way * rng.uniform(0.95, 1.08) * (time - 0.5)
        x, angle = x + moved, moved / radius
    elif thing.motion == "falls":
        done = np.minimum(time / rng.uniform(0.6, 0.8), 1.0) ** 2
        y = top + (y - top) * done
    elif thing.motion == "rises":
        done = np.clip((time - 0.08) / rng.uniform(0.7, 0.85), 0.0, 1.0)
        y = y + (top - y) * (done * done * (3 - 2 * done))
    elif thing.motion == "bounces":
        phase = (time * rng.uniform(2.0, 2.5) + rng.uniform(0.0, 0.2)) % 1.0
        y = y - rng.uniform(0.28, 0.34) * 4 * phase * (1 - phase)
    elif thing.motion == "spins":
        angle = 2 * math.pi * rng.uniform(0.95, 1.25) * rng.choice((-1, 1)) * time
    return x, y, angle
