"""Clips with echo as values: who talks at either end, how the far end comes back. ``echo_render`` renders them.

A set of clips is a JSON-lines file of :class:`EchoSpec`: it renders to the same samples wherever the corpus is the
same.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from allears.data.loudspeaker import Loudspeaker
from allears.data.segments import Segment, Synthetic, lean_dict, read_lines, write_lines

Scenario = Literal["far", "near", "double"]


@dataclass(frozen=True)
class PathChange:
    """From ``at_s`` on the echo comes by another path, after a cross-fade of ``fade_ms``."""

    rir: dict[str, Any]
    at_s: float
    fade_ms: float = 100.0


@dataclass(frozen=True)
class DelayJump:
    """At ``at_s`` the delay grows by ``by_ms``, which may be negative: a buffer ran empty, or was cut."""

    at_s: float
    by_ms: float


@dataclass(frozen=True)
class GainStep:
    """At ``at_s`` the loudspeaker is turned up by ``gain_db``."""

    at_s: float
    gain_db: float


@dataclass(frozen=True)
class EchoSpec:
    """One clip.

    Args:
        frames: length in samples.
        near, far: what the talkers of either end say; an empty one is silent.
        far_music: what the loudspeaker plays besides, or instead of a talker.
        near_rir, echo_rir, noise_rir: the places of talker, loudspeaker and noise in the room: ``{"bank": i, "source":
            j}``, ``{"item": id}`` or ``{"room": {...}}``; ``None`` is dry.
        path_change: the echo comes by another path from some time on.
        loudspeaker: what distorts the far end.
        gain_steps: of the loudspeaker's volume.
        ser_db: active level of the near talker over the echo, both as they reach the microphone. Wanted where both are.
        delay_ms: from the reference to the loudspeaker.
        delay_jump: a change of it.
        drift_ppm: how much faster than the microphone's clock that of the loudspeaker is.
        noise, synthetic: what disturbs the microphone.
        snr_db: active level of the near talker, or if he is silent of the echo, over the noise; ``None`` leaves it out.
        near_eq_db: gains at 125, 250, ..., 8000 Hz of the talker.
        highpass_hz: all sources are rid of what lies below: direct current, and rumble that no microphone picks up.
        far_level_db: active level of the reference in dB re full scale.
        level_db: root mean square of the microphone.

    Raises:
        ValueError: there are both ends and no ``ser_db``, or a delay is negative.
    """

    id: str
    frames: int
    near: tuple[Segment, ...] = ()
    far: tuple[Segment, ...] = ()
    far_music: tuple[Segment, ...] = ()
    near_rir: dict[str, Any] | None = None
    echo_rir: dict[str, Any] | None = None
    path_change: PathChange | None = None
    loudspeaker: Loudspeaker = field(default_factory=Loudspeaker)
    gain_steps: tuple[GainStep, ...] = ()
    ser_db: float | None = None
    delay_ms: float = 0.0
    delay_jump: DelayJump | None = None
    drift_ppm: float = 0.0
    noise: tuple[Segment, ...] = ()
    synthetic: Synthetic | None = None
    snr_db: float | None = None
    noise_rir: dict[str, Any] | None = None
    near_eq_db: tuple[float, ...] | None = None
    highpass_hz: float = 40.0
    far_level_db: float = -26.0
    level_db: float = -26.0

    def __post_init__(self) -> None:
        if self.scenario == "double" and self.ser_db is None:
            raise ValueError(f"ser_db: {self.id} has a near and a far end; wanted their level ratio in dB, got None")
        if self.delay_ms < 0 or (self.delay_jump is not None and self.delay_ms + self.delay_jump.by_ms < 0):
            raise ValueError(
                f"delay_ms, delay_jump: got {self.delay_ms} and {self.delay_jump}; an echo can't come before its source"
            )

    @property
    def scenario(self) -> Scenario:
        far = bool(self.far or self.far_music)
        return "double" if far and self.near else "far" if far else "near"


def write_echoes(path: str | Path, specs: list[EchoSpec]) -> None:
    write_lines(path, (lean_dict(spec) for spec in specs))


def read_echoes(path: str | Path) -> list[EchoSpec]:
    return read_lines(path, EchoSpec)
