"""Fixed sets of clips that echo cancellation is judged on: drawn once, kept as manifests, rendered anywhere."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.config import to_dict
from allears.data.echo import EchoMixConfig, EchoSampler
from allears.data.echo_rooms import LOUDSPEAKER, MOVED, NEAR, NOISE, PLACES, EchoRoomRanges, room_with_loudspeaker
from allears.data.echo_spec import DelayJump, EchoSpec, PathChange, Scenario
from allears.data.loudspeaker import Loudspeaker, LoudspeakerRanges, draw_loudspeaker
from allears.data.mixsets import rounded_room
from allears.data.talker_sets import Draw, Material, draw_each

JUDGE_ECHO = EchoMixConfig(
    seconds=10.0,
    far_music=0.0,
    partial=0.0,
    jump=0.0,
    drift=0.0,
    path_change=0.0,
    gain_step=0.0,
    noisy=0.0,
    music=0.0,
    synthetic=0.0,
    change_speed=0.0,
    eq=0.0,
    pause_s=(0.1, 0.8),
    highpass_hz=(40.0, 40.0),
    far_level_db=(-30.0, -18.0),
    level_db=(-32.0, -20.0),
)
DELAYS_MS = (0, 50, 150, 300, 600, 900)
RATIOS_DB = (-15.0, -5.0, 5.0)
RT60_S = (0.2, 0.5)
CHANGE_S = 5.0
"""When delay or path change."""

_LINEAR = LoudspeakerRanges(nonlinear=0.0)
_DISTORTS = LoudspeakerRanges(nonlinear=1.0)


@dataclass(frozen=True)
class Cell:
    """What one clip of a set is to be; the rest is drawn.

    Args:
        music: the far end is music.
        snr_db: noise, if any.
    """

    name: str
    scenario: Scenario
    delay_ms: float = 0.0
    ser_db: float | None = None
    linear: bool = True
    rt60_s: float = 0.2
    music: bool = False
    snr_db: float | None = None
    jump_ms: float | None = None
    moves: bool = False


def draw_cells(material: Material, cells: Sequence[Cell], rng: np.random.Generator) -> list[EchoSpec]:
    """A clip of each cell, in a new room each; the ordered pairs of speakers take turns as near and far end.

    Every third loudspeaker that distorts is bent by a polynomial of the fifth order, which is drawn here alone.
    """
    sampler = EchoSampler(material.speech, material.noise, JUDGE_ECHO, rng)
    pairs = list(permutations(sorted(sampler.speech.speakers()), 2))
    specs = []
    for index, cell in enumerate(cells):
        sampler.config = replace(JUDGE_ECHO, far_music=float(cell.music), noisy=float(cell.snr_db is not None))
        spec = sampler.sample(cell.name, cell.scenario, pairs[index % len(pairs)])
        speaker = draw_loudspeaker(rng, _LINEAR if cell.linear else _DISTORTS)
        if not cell.linear and rng.random() < 1 / 3:
            factors = tuple(round(float(x), 3) for x in rng.uniform(-0.25, 0.25, 4))
            speaker = Loudspeaker(polynomial=factors, highpass_hz=speaker.highpass_hz, lowpass_hz=speaker.lowpass_hz)
        places = _places(cell.rt60_s, rng)
        echoes = cell.scenario != "near"
        spec = replace(
            spec,
            near_rir=places[NEAR] if spec.near else None,
            echo_rir=places[LOUDSPEAKER] if echoes else None,
            path_change=PathChange(places[MOVED], CHANGE_S) if cell.moves else None,
            loudspeaker=speaker if echoes else Loudspeaker(),
            delay_ms=float(cell.delay_ms),
            delay_jump=None if cell.jump_ms is None else DelayJump(CHANGE_S, cell.jump_ms),
            ser_db=cell.ser_db,
            snr_db=cell.snr_db,
            noise_rir=places[NOISE] if cell.snr_db is not None else None,
        )
        specs.append(spec)
    return specs


def _places(rt60_s: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """References to the places of a new room, each with the room and that place alone."""
    ranges = EchoRoomRanges(rt60_s=(rt60_s, rt60_s))
    room = rounded_room(room_with_loudspeaker(rng, PLACES, ranges))
    return [{"room": to_dict(replace(room, mics_m=(place,))), "source": 0} for place in room.mics_m]


def far_cells(repeats: int = 3) -> list[Cell]:
    """Far end alone: delays, loudspeakers that distort or not, and two reverberation times; one of six is music."""
    cells = []
    for delay in DELAYS_MS:
        for linear in (True, False):
            for rt60_s in RT60_S:
                for repeat in range(repeats):
                    name = f"far-{delay:03d}-{_label(linear)}-{rt60_s}-{repeat}"
                    music = (len(cells) + delay // 50) % 6 == 5
                    cells.append(Cell(name, "far", delay, None, linear, rt60_s, music))
    return cells


def double_cells() -> list[Cell]:
    """Both ends: level ratios, delays, loudspeakers, reverberation times; every second clip with noise, 10 to 30 dB."""
    cells = []
    for ser_db in RATIOS_DB:
        for delay in DELAYS_MS:
            for linear in (True, False):
                for rt60_s in RT60_S:
                    name = f"double{ser_db:+03.0f}-{delay:03d}-{_label(linear)}-{rt60_s}"
                    noisy = (len(cells) // 2 + len(cells)) % 2
                    snr_db = 10.0 + 5.0 * (len(cells) % 5) if noisy else None
                    cells.append(Cell(name, "double", delay, ser_db, linear, rt60_s, snr_db=snr_db))
    return cells


def near_cells(clips: int = 24) -> list[Cell]:
    """Near end alone; every second clip with noise, 10 to 30 dB."""
    ratios = [10.0 + 5.0 * (row // 2 % 5) if row % 2 else None for row in range(clips)]
    return [
        Cell(f"near-{row:02d}", "near", rt60_s=RT60_S[row // 2 % 2], snr_db=snr_db) for row, snr_db in enumerate(ratios)
    ]


def change_cells(jumps: bool, clips: int = 24) -> list[Cell]:
    """A jump of the delay by 20 to 200 ms either way, or another path, in the middle; the last third is double talk."""
    cells = []
    for row in range(clips):
        double = row >= clips * 2 // 3
        by_ms = (20.0, 60.0, 120.0, 200.0)[row % 4] * (1 if row // 4 % 2 else -1) if jumps else None
        name = f"{'jump' if jumps else 'path'}-{row:02d}-{'double' if double else 'far'}"
        delay = (250, 300, 450, 600)[row % 3] if jumps else (50, 150, 300)[row % 3]
        ser_db = RATIOS_DB[row % 3] if double else None
        linear, rt60_s = row % 2 == 0, RT60_S[row // 2 % 2]
        scenario: Scenario = "double" if double else "far"
        cells.append(Cell(name, scenario, delay, ser_db, linear, rt60_s, jump_ms=by_ms, moves=not jumps))
    return cells


def validation_cells() -> list[Cell]:
    """A little of everything."""
    far = [replace(cell, name=f"val-{cell.name}") for cell in far_cells(1)[::2]]
    double = [replace(cell, name=f"val-{cell.name}") for cell in double_cells()[::3]]
    changes = [replace(cell, name=f"val-{cell.name}") for cell in change_cells(True, 3) + change_cells(False, 3)]
    return [*far, *double, *changes, *(replace(cell, name=f"val-{cell.name}") for cell in near_cells(6))]


def _label(linear: bool) -> str:
    return "linear" if linear else "bent"


def _drawn(cells: Sequence[Cell]) -> Draw[EchoSpec]:
    return lambda material, rng: draw_cells(material, cells, rng)


SETS: dict[str, tuple[str, Draw[EchoSpec]]] = {
    "echo-val": ("val", _drawn(validation_cells())),
    "echo-far": ("test", _drawn(far_cells())),
    "echo-double": ("test", _drawn(double_cells())),
    "echo-near": ("test", _drawn(near_cells())),
    "echo-jump": ("test", _drawn(change_cells(True))),
    "echo-path": ("test", _drawn(change_cells(False))),
}
"""Name of each set to its split and how it is drawn."""


def draw_echo_sets(corpus: str | Path, only: Iterable[str] = (), seed: int = 6) -> dict[str, list[EchoSpec]]:
    """The sets by name; all, or ``only`` those named. Each is the same for the same corpus and seed.

    Raises:
        ValueError: a set is unknown.
    """
    return draw_each(SETS, corpus, only, seed)
