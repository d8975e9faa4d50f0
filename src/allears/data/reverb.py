"""Room responses for mixtures: simulated in bulk, described one by one, or recorded.

Shapes: N rooms, L samples of a response.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor

from allears.audio.resample import resample
from allears.audio.rooms import Room, RoomRanges, direct_delay, image_source_rir, random_room
from allears.audio.shoebox import Point
from allears.core.config import from_dict
from allears.core.errors import CorpusError
from allears.data.corpus import read_manifest
from allears.data.draws import RATE
from allears.data.waves import on_device

log = logging.getLogger(__name__)

LENGTH_S = 0.9
APART_M = 0.5
Source = Literal["talker", "noise"]


def room_with_sources(rng: np.random.Generator, talkers: int = 1) -> Room:
    """A random room whose *source* is the microphone and whose *microphones* are the talkers and, last, the noise.

    By reciprocity the responses are those from talkers and noise to the microphone. Talkers stand half a metre or more
    from each other.
    """
    room = random_room(rng)
    mic, places = room.mics_m[0], [room.source_m]
    while True:
        noise = tuple(float(rng.uniform(0.2, side - 0.2)) for side in room.size_m)
        if np.linalg.norm(np.subtract(mic, noise)) > 0.3:
            break
    while len(places) < talkers:
        places.append(free_place(rng, room.size_m, mic, RoomRanges().distance_m, places, APART_M))
    return Room(room.size_m, room.absorption, mic, (*places, noise))  # type: ignore[arg-type]


def free_place(
    rng: np.random.Generator,
    size_m: Point,
    centre_m: Point,
    distance_m: tuple[float, float],
    taken: list[Point],
    apart_m: float,
) -> Point:
    """A place so far from ``centre_m``, off the walls, and ``apart_m`` or more from every place that is taken."""
    margin_m = RoomRanges().wall_margin_m
    for _ in range(1000):
        direction = rng.standard_normal(3)
        place = np.array(centre_m) + rng.uniform(*distance_m) * direction / np.linalg.norm(direction)
        inside = (place >= margin_m).all() and (place <= np.array(size_m) - margin_m).all()
        if inside and all(np.linalg.norm(place - other) >= apart_m for other in taken):
            x, y, z = (float(value) for value in place)
            return (x, y, z)
    raise ValueError(f"taken: with {len(taken)} places none is left in {size_m} m, {apart_m} m apart; want fewer")


def _prepared(rir: Tensor) -> Tensor:
    """Rid of the delay before the direct sound (1 ms is kept), and scaled so that the direct part has unit energy."""
    delay = int(direct_delay(rir, RATE))
    rir = rir[max(0, delay - RATE // 1000) :]
    near = rir[: 5 * RATE // 1000].square().sum().sqrt().clamp_min(1e-8)
    return rir / near


@contextmanager
def _few_threads() -> Iterator[None]:
    """At most eight threads for each of the CPU's many small parts of a room: on a busy machine of 32 cores as many
    threads waited for one another, and a room took a second.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 8))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class RirBank:
    """Answers a mixture's room references with responses.

    Args:
        full: (N, P, L) responses of the P - 1 talkers and, last, of the noise of the simulated rooms.
        recorded: recorded responses (L,) by item id.
    """

    full: Tensor | None = None
    recorded: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def simulate(
        cls,
        rooms: int,
        seed: int,
        device: torch.device | str = "cpu",
        cache: str | Path | None = None,
        talkers: int = 1,
        draw: Callable[[np.random.Generator, int], Room] = room_with_sources,
    ) -> "RirBank":
        """``rooms`` random rooms, each with places for so many talkers and a noise, the same for the same seed.

        Args:
            cache: a file to keep them in.
            draw: another kind of rooms, with as many places.
        """
        if cache is not None and Path(cache).is_file():
            stored = np.load(cache)
            if stored.shape[:2] == (rooms, talkers + 1):
                return cls(torch.from_numpy(stored).to(device).float())
        rng = np.random.default_rng([seed, 77])
        length = int(LENGTH_S * RATE)
        full = torch.zeros(rooms, talkers + 1, length, device=device)
        with _few_threads():
            for index in range(rooms):
                responses = image_source_rir([draw(rng, talkers)], RATE, LENGTH_S, device=device)[0]
                for source, response in enumerate(responses):
                    ready = _prepared(response)
                    full[index, source, : ready.shape[0]] = ready
        if cache is not None:
            np.save(cache, full.half().cpu().numpy())
        return cls(full)

    @classmethod
    def from_corpus(cls, folder: str | Path) -> "RirBank":
        """The recorded responses of a corpus, each channel as ``ID#channel``; simulated ones are made as specs
        describe them.
        """
        recorded: dict[str, Tensor] = {}
        for item in read_manifest(folder):
            if item.kind == "rir":
                x, rate = soundfile.read(Path(folder) / item.path, dtype="float32", always_2d=True)
                for channel, row in enumerate(resample(np.ascontiguousarray(x.T), rate, RATE)):
                    recorded[f"{item.id}#{channel}"] = _prepared(torch.from_numpy(row))
        return cls(None, recorded)

    def response(self, reference: dict[str, Any], source: Source = "talker") -> Tensor:
        """Response (L,) of ``{"bank": i}``, ``{"item": id}`` or ``{"room": {...}}``.

        ``"source": j`` beside ``bank`` or ``room`` says which place of the room, -1 the last one; without it the talker
        has the first and the noise the second.
        """
        if "bank" in reference:
            return self.of_bank([reference], source)[0]
        if "item" in reference:
            if reference["item"] not in self.recorded:
                raise CorpusError(f"rirs: no recorded response {reference['item']!r} here; run 'allears data prepare'")
            return self.recorded[reference["item"]]
        if "room" in reference:
            room, place = from_dict(Room, reference["room"]), _place_of(reference, source)
            return _prepared(image_source_rir([replace(room, mics_m=(room.mics_m[place],))], RATE, LENGTH_S)[0, 0])
        raise CorpusError(f"rirs: reference {reference!r} is none of bank, item, room")

    def of_bank(self, references: list[dict[str, Any]], source: Source = "talker") -> Tensor:
        """Responses (R, L) of references to simulated rooms, ``{"bank": i}`` each."""
        if self.full is None:
            raise CorpusError("rirs: the spec takes a room from a bank, but no bank was simulated")
        where = [(int(reference["bank"]), _place_of(reference, source)) for reference in references]
        rooms, places = on_device(self.full.device, where, np.int64).unbind(1)
        return self.full[rooms, places]


def _place_of(reference: dict[str, Any], source: Source) -> int:
    return int(reference.get("source", 0 if source == "talker" else 1))


def room_responses(
    rirs: RirBank | None, references: list[dict[str, Any] | None], source: Source, device: torch.device
) -> Tensor | None:
    """Responses (R, L) on ``device``, a unit impulse where the reference is ``None``; ``None`` if all are dry.

    Raises:
        ValueError: there is a reference and no ``rirs``.
    """
    if all(reference is None for reference in references):
        return None
    if rirs is None:
        raise ValueError("rirs: a spec has a room, but the renderer was given no room responses")
    given = [(row, reference) for row, reference in enumerate(references) if reference is not None]
    banked = [(row, reference) for row, reference in given if "bank" in reference]
    parts = [([row], rirs.response(reference, source)[None]) for row, reference in given if "bank" not in reference]
    if banked:
        parts.append(([row for row, _ in banked], rirs.of_bank([reference for _, reference in banked], source)))
    stack = torch.zeros(len(references), max(rir.shape[1] for _, rir in parts), device=device)
    stack[:, 0] = on_device(device, [float(reference is None) for reference in references])
    for rows, rir in parts:
        stack[on_device(device, rows, np.int64), : rir.shape[1]] = rir.to(device)
    return stack
