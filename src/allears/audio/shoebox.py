"""Rectangular rooms as plain values, and how to draw them at random.

Coordinates are metres from one corner; axes are length (x), width (y), height (z).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from allears.core import config

SPEED_OF_SOUND_M_S = 343.0

Point = tuple[float, float, float]
Walls = tuple[float, float, float, float, float, float]


def absorption_for_rt60(size_m: Point, rt60_s: float, formula: str = "image") -> float:
    """The share of energy that every wall must take so that the reverberation time is ``rt60_s``.

    ``image`` is what the image sources of a shoebox do, see :func:`_image_rt60_s`. ``sabine`` has
    T = 24 ln(10) V / (c S a), ``eyring`` the same with -ln(1 - a) for a (Kuttruff, Room Acoustics, chapter 5). Both
    suppose that sound goes evenly in all directions; in a shoebox it stays longer between the walls that lie far apart,
    and walls chosen by them give 1.1 to 2 times the time asked for.

    Raises:
        ValueError: ``rt60_s`` is not positive, or too short for Sabine's formula (a > 1).
    """
    if not rt60_s > 0:
        raise ValueError(f"rt60_s: got {rt60_s}, wanted seconds above 0")
    if formula == "image":
        return 1 - math.exp(-_image_rt60_s(size_m, (1.0, 1.0, 1.0)) / rt60_s)
    x, y, z = size_m
    exponent = 24 * math.log(10) * x * y * z / (SPEED_OF_SOUND_M_S * 2 * (x * y + y * z + z * x) * rt60_s)
    if formula == "eyring":
        return 1 - math.exp(-exponent)
    if formula != "sabine":
        raise ValueError(f"formula: got {formula!r}, wanted 'image', 'eyring' or 'sabine'")
    if exponent > 1:
        raise ValueError(f"rt60_s: {rt60_s} s is too short for a room of {size_m} m by Sabine's formula; use 'image'")
    return exponent


def _image_rt60_s(size_m: Point, exponents: Point) -> float:
    """Reverberation time (T30, -5 to -35 dB) of a shoebox's image sources.

    Sound that leaves in direction n meets the walls across axis i c |n_i| / L_i times a second, and each time loses
    ``exponents[i]`` nepers of energy. The energy still to come at t is the mean over n of exp(-g t) / g, where g is the
    sum of those losses; the time is read off the line through its level in dB.
    """
    steps = (np.arange(16) + 0.5) / 16  # one eighth of the sphere: height and azimuth, even in area
    height, azimuth = steps[:, None], steps * (math.pi / 2)
    across = np.sqrt(1 - height**2)
    parts = (across * np.cos(azimuth), across * np.sin(azimuth), np.broadcast_to(height, (16, 16)))
    per_metre = [exponent / side for exponent, side in zip(exponents, size_m, strict=True)]
    rate = SPEED_OF_SOUND_M_S * np.tensordot(per_metre, parts, axes=1).ravel()
    if rate.min() <= 0:
        return math.inf
    time = np.linspace(0, 12 * np.mean(1 / rate), 300)
    while True:
        level = 10 * np.log10((np.exp(-time[:, None] * rate) / rate).sum(1) / (1 / rate).sum())
        if level[-1] < -35:
            break
        time = 2 * time
    inside = (level <= -5) & (level >= -35)
    return float(-60 / np.polyfit(time[inside], level[inside], 1)[0])


@dataclass(frozen=True)
class Room:
    """A shoebox with one source and one or several microphones.

    Attributes:
        size_m: length, width, height.
        absorption: share of energy that each wall takes, 0 to 1; in the order x=0, x=end, y=0, y=end, floor, ceiling.
        source_m: the source; inside the room.
        mics_m: the microphones; inside the room, none at the source.

    Raises:
        ValueError: a value is out of its range.
    """

    size_m: Point
    absorption: Walls
    source_m: Point
    mics_m: tuple[Point, ...]

    def __post_init__(self) -> None:
        if not all(side > 0 for side in self.size_m):
            raise ValueError(f"size_m: got {self.size_m}, wanted three lengths above 0")
        if len(self.absorption) != 6 or not all(0 <= share <= 1 for share in self.absorption):
            raise ValueError(f"absorption: got {self.absorption}, wanted six shares from 0 to 1")
        if not self.mics_m:
            raise ValueError("mics_m: got none, wanted at least one microphone")
        for name, point in [("source_m", self.source_m), *(("mics_m", mic) for mic in self.mics_m)]:
            if len(point) != 3 or not all(0 <= at <= side for at, side in zip(point, self.size_m, strict=True)):
                raise ValueError(f"{name}: {point} is not inside the room of {self.size_m} m")
        if min(self.distances_m) < 1e-3:
            raise ValueError(f"mics_m: a microphone lies at the source {self.source_m}; keep 1 mm or more apart")

    @classmethod
    def with_rt60(
        cls, size_m: Point, rt60_s: float, source_m: Point, mics_m: tuple[Point, ...], formula: str = "image"
    ) -> "Room":
        """A room whose walls are all alike and give the reverberation time ``rt60_s`` by ``formula``."""
        return cls(size_m, (absorption_for_rt60(size_m, rt60_s, formula),) * 6, source_m, mics_m)

    @property
    def distances_m(self) -> tuple[float, ...]:
        """From the source to each microphone."""
        return tuple(math.dist(self.source_m, mic) for mic in self.mics_m)

    @property
    def rt60_s(self) -> float:
        """Reverberation time of the room's image sources; infinite where no wall absorbs, 0 where all take all."""
        if min(self.absorption) >= 1:
            return 0.0
        nepers = [-math.log1p(-min(share, 1 - 1e-6)) for share in self.absorption]
        x, y, z = ((nepers[axis] + nepers[axis + 1]) / 2 for axis in (0, 2, 4))
        return _image_rt60_s(self.size_m, (x, y, z))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` gives an equal room back."""
        return config.to_dict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Room":
        return config.from_dict(cls, values)


@dataclass(frozen=True)
class RoomRanges:
    """What :func:`random_room` draws from, evenly between the two ends of each range.

    Attributes:
        length_m, width_m, height_m: the room's sides.
        rt60_s: reverberation time, as :attr:`Room.rt60_s` tells it.
        distance_m: from the source to the centre of the microphones.
        wall_margin_m: nothing stands nearer to a wall than this.
        mic_offsets_m: the microphones about their centre, turned by a random angle about the vertical.
    """

    length_m: tuple[float, float] = (3.0, 10.0)
    width_m: tuple[float, float] = (2.5, 8.0)
    height_m: tuple[float, float] = (2.3, 4.0)
    rt60_s: tuple[float, float] = (0.15, 0.9)
    distance_m: tuple[float, float] = (0.3, 4.0)
    wall_margin_m: float = 0.4
    mic_offsets_m: tuple[Point, ...] = field(default=((0.0, 0.0, 0.0),))


def random_room(rng: np.random.Generator, ranges: RoomRanges | None = None) -> Room:
    """A room drawn from ``ranges``. The same generator state (PCG64) gives the same room anywhere.

    Raises:
        ValueError: the ranges leave no place for source and microphones.
    """
    ranges = ranges or RoomRanges()
    for _ in range(200):
        sides = (rng.uniform(*ranges.length_m), rng.uniform(*ranges.width_m), rng.uniform(*ranges.height_m))
        size = np.array(sides)
        rt60_s = float(rng.uniform(*ranges.rt60_s))
        centre = ranges.wall_margin_m + rng.uniform(size=3) * np.maximum(size - 2 * ranges.wall_margin_m, 0)
        angle = rng.uniform(0, 2 * math.pi)
        turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
        mics = centre + np.array(ranges.mic_offsets_m) @ turn.T
        # Directions evenly over the sphere; the flat side of a room refuses many, so several are tried.
        distance = rng.uniform(*ranges.distance_m)
        directions = rng.standard_normal((32, 3))
        sources = centre + distance * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        inside = (sources >= ranges.wall_margin_m).all(1) & (sources <= size - ranges.wall_margin_m).all(1)
        if not inside.any() or (mics < 0).any() or (mics > size).any():
            continue
        source = sources[int(inside.argmax())]
        if np.linalg.norm(mics - source, axis=1).min() < 0.01:
            continue
        return Room.with_rt60(_point(size), rt60_s, _point(source), tuple(_point(mic) for mic in mics))
    raise ValueError(f"ranges: no source and microphones fit in 200 draws from {ranges}; widen the sides or distances")


def _point(values: np.ndarray) -> Point:
    x, y, z = (float(value) for value in values)
    return (x, y, z)
