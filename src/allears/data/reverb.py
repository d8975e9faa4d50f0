"""Room responses for mixtures: simulated in bulk, described one by one, or recorded.

Shapes: N rooms, L samples of a response.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
from torch import Tensor

from allears.audio.resample import resample
from allears.audio.rooms import Room, direct_delay, early_part, image_source_rir, random_room
from allears.core.config import from_dict
from allears.core.errors import CorpusError
from allears.data.corpus import read_manifest

log = logging.getLogger(__name__)

RATE = 16_000
LENGTH_S = 0.9
Source = Literal["talker", "noise"]


def two_source_room(rng: np.random.Generator) -> Room:
    """A random room whose *source* is the microphone and whose *microphones* are talker and noise.

    By reciprocity the responses are those from talker and noise to the microphone.
    """
    room = random_room(rng)
    while True:
        noise = tuple(float(rng.uniform(0.2, side - 0.2)) for side in room.size_m)
        swapped = (room.mics_m[0], room.source_m, noise)
        if np.linalg.norm(np.subtract(swapped[0], noise)) > 0.3:
            return Room(room.size_m, room.absorption, swapped[0], (swapped[1], swapped[2]))  # type: ignore[arg-type]


def _prepared(rir: Tensor) -> Tensor:
    """Rid of the delay before the direct sound (1 ms is kept), and scaled so that the direct part has unit energy."""
    delay = int(direct_delay(rir, RATE))
    rir = rir[max(0, delay - RATE // 1000) :]
    near = rir[: 5 * RATE // 1000].square().sum().sqrt().clamp_min(1e-8)
    return rir / near


@dataclass
class RirBank:
    """Answers a mixture's room references with responses.

    Args:
        full: (N, 2, L) responses of talker and noise of the simulated rooms.
        recorded: recorded responses (L,) by item id.
    """

    full: Tensor | None = None
    recorded: dict[str, Tensor] = field(default_factory=dict)
    _early: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def simulate(
        cls, rooms: int, seed: int, device: torch.device | str = "cpu", cache: str | Path | None = None
    ) -> "RirBank":
        """``rooms`` random rooms, the same for the same seed. ``cache`` names a file to keep them in."""
        if cache is not None and Path(cache).is_file():
            stored = np.load(cache)
            if stored.shape[0] == rooms:
                return cls(torch.from_numpy(stored).to(device).float())
        rng = np.random.default_rng([seed, 77])
        length = int(LENGTH_S * RATE)
        full = torch.zeros(rooms, 2, length, device=device)
        for index in range(rooms):
            pair = image_source_rir([two_source_room(rng)], RATE, LENGTH_S, device=device)[0]
            for source in (0, 1):
                ready = _prepared(pair[source])
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

    def response(self, reference: dict[str, Any], source: Source) -> tuple[Tensor, Tensor]:
        """(full, early) responses (L,) of ``{"bank": i}``, ``{"item": id}`` or ``{"room": {...}}``."""
        row = 0 if source == "talker" else 1
        if "bank" in reference:
            if self.full is None:
                raise CorpusError("rirs: the spec takes a room from a bank, but no bank was simulated")
            index = int(reference["bank"])
            rir = self.full[index, row]
            if source == "noise":
                return rir, rir
            if index not in self._early:
                self._early[index] = early_part(rir, RATE)
            return rir, self._early[index]
        if "item" in reference:
            if reference["item"] not in self.recorded:
                raise CorpusError(f"rirs: no recorded response {reference['item']!r} here; run 'allears data prepare'")
            rir = self.recorded[reference["item"]]
        elif "room" in reference:
            room = from_dict(Room, reference["room"])
            rir = _prepared(image_source_rir([room], RATE, LENGTH_S)[0, row])
        else:
            raise CorpusError(f"rirs: reference {reference!r} is none of bank, item, room")
        return rir, early_part(rir, RATE)
