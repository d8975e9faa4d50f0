"""A small world for video models: coloured things that roll, fall, bounce and spin before a camera, as values.

A :class:`WorldSpec` says what a caption can say; its ``seed`` draws the rest (places, speeds, phases). ``world_text``
puts it in words and back, ``world_layout`` and ``world_render`` make the video, ``world_check`` judges one.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = ("ball", "box", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (216, 38, 38),
    "orange": (242, 132, 28),
    "yellow": (246, 218, 46),
    "green": (40, 160, 66),
    "blue": (38, 78, 214),
    "purple": (138, 56, 172),
    "white": (248, 248, 248),
}
"""8-bit RGB."""
SIZES = {"small": 0.1, "medium": 0.135, "big": 0.18}
"""Radius over the frame's width."""
MOTIONS = ("rolls left", "rolls right", "falls", "rises", "bounces", "spins", "stays")
RELATIONS = ("and", "beside", "behind", "in front of")
CAMERAS = ("still", "pans left", "pans right", "zooms in", "zooms out")
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "room": ((88, 100, 108), (62, 68, 74)),
    "night": ((28, 30, 54), (18, 20, 34)),
    "beach": ((218, 200, 160), (196, 172, 128)),
    "day": ((160, 196, 226), (126, 152, 120)),
}
"""8-bit RGB of wall or sky, and of the floor."""
MOST_THINGS = 2

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Thing:
    """One thing, and what it does.

    Args:
        shape, colour, size, motion: of :data:`SHAPES`, :data:`COLOURS`, :data:`SIZES` and :data:`MOTIONS`.

    Raises:
        ValueError: one of them is unknown.
    """

    shape: str
    colour: str
    size: str = "medium"
    motion: str = "stays"

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("motion", MOTIONS)):
            _check(name, getattr(self, name), tuple(known))


@dataclass(frozen=True)
class WorldSpec:
    """What is to be seen.

    Args:
        things: one or two, of different colours.
        relation: between two things: ``and`` (each on its side, each with its motion), ``beside`` (the same, the second
            one stays), ``behind`` or ``in front of`` (the first one, seen from the second, which stays); ``None`` of
            one thing.
        camera: of :data:`CAMERAS`.
        background: of :data:`BACKGROUNDS`; ``None`` lets the seed choose.
        seed: of all that the caption does not say.

    Raises:
        ValueError: a value is unknown, or the things and the relation do not go together.
    """

    things: tuple[Thing, ...]
    relation: str | None = None
    camera: str = "still"
    background: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= MOST_THINGS:
            raise ValueError(f"things: {len(self.things)} given; this world holds 1 or {MOST_THINGS}")
        _check("camera", self.camera, CAMERAS)
        if self.background is not None:
            _check("background", self.background, tuple(BACKGROUNDS))
        if len(self.things) == 1:
            if self.relation is not None:
                raise ValueError(f"relation: {self.relation!r} given for one thing; name a second thing, or give None")
            return
        if self.relation is None:
            raise ValueError(f"relation: None given for two things; it must be one of {', '.join(RELATIONS)}")
        _check("relation", self.relation, RELATIONS)
        first, second = self.things
        if first.colour == second.colour:
            raise ValueError(f"things: both are {first.colour}; two things need different colours")
        if self.relation != "and" and second.motion != "stays":
            raise ValueError(
                f"things: the second one {second.motion}, but with {self.relation!r} it stays; join them by 'and'"
            )
        if self.relation == "behind" and first.motion == "spins":
            raise ValueError(
                "things: one that spins behind another hides its turn; let it spin in front of the other, or beside it"
            )

    def with_background(self) -> "WorldSpec":
        """The same with the background that the seed chooses, where none is given."""
        if self.background is not None:
            return self
        chosen = np.random.default_rng([self.seed, 77]).integers(len(BACKGROUNDS))
        return replace(self, background=tuple(BACKGROUNDS)[chosen])


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} is unknown; known are {', '.join(known)}")


def is_held_out(thing: Thing) -> bool:
    """Whether training never shows this colour, shape and motion together; a tenth of all triples."""
    triple = tuple(COLOURS).index(thing.colour), SHAPES.index(thing.shape), MOTIONS.index(thing.motion)
    return (3 * triple[0] + 7 * triple[1] + 4 * triple[2]) % 10 == 0


def draw_spec(rng: np.random.Generator, split: Split = "train") -> WorldSpec:
    """One spec with its background. Of ``train`` no thing is held out (:func:`is_held_out`), of ``test`` one or more.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: {split!r} is unknown; known are train, test")
    while True:
        spec = _draw(rng)
        if any(map(is_held_out, spec.things)) == (split == "test"):
            return spec


def draw_specs(count: int, seed: int, split: Split = "train") -> list[WorldSpec]:
    """``count`` specs; the same seed gives the same ones."""
    rng = np.random.default_rng([seed, 11])
    return [draw_spec(rng, split) for _ in range(count)]


def _draw(rng: np.random.Generator) -> WorldSpec:
    def pick(known) -> str:
        return tuple(known)[rng.integers(len(known))]

    relation = None if rng.random() < 0.4 else pick(RELATIONS)
    colours = rng.permutation(len(COLOURS))
    names = tuple(COLOURS)
    motions = [motion for motion in MOTIONS if not (relation == "behind" and motion == "spins")]
    things = [Thing(pick(SHAPES), names[colours[0]], pick(SIZES), pick(motions))]
    if relation is not None:
        second = pick(MOTIONS) if relation == "and" else "stays"
        things.append(Thing(pick(SHAPES), names[colours[1]], pick(SIZES), second))
    camera = "still" if rng.random() < 0.5 else pick(CAMERAS[1:])
    return WorldSpec(tuple(things), relation, camera, pick(BACKGROUNDS), int(rng.integers(2**31)))
