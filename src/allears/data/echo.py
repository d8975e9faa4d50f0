"""Random clips with echo: their distribution, and drawing them from a corpus. The clips themselves: ``echo_spec``."""

from dataclasses import dataclass, field, replace
from typing import Any

from allears.core.errors import CorpusError
from allears.data.draws import RATE, Draws, without_speakers
from allears.data.echo_rooms import LOUDSPEAKER, MOVED, NEAR, NOISE
from allears.data.echo_spec import (
    DelayJump,
    EchoSpec,
    GainStep,
    PathChange,
    Scenario,
    read_echoes,
    write_echoes,
)
from allears.data.loudspeaker import LoudspeakerRanges, draw_loudspeaker
from allears.data.segments import Segment

__all__ = [
    "DelayJump",
    "EchoMixConfig",
    "EchoSampler",
    "EchoSpec",
    "GainStep",
    "PathChange",
    "Scenario",
    "read_echoes",
    "write_echoes",
]


@dataclass(frozen=True)
class EchoMixConfig:
    """Distribution of the clips. Probabilities in [0, 1], ranges as (low, high).

    Args:
        far_only, near_only: shares of the clips with one end alone; in the others both talk.
        far_music: share of the far ends that are music.
        partial: share of talkers who are heard in one part only, for a third of the clip or more.
        delay_ms, long_delay, long_delay_ms: the delay; a share ``long_delay`` of clips takes the other range.
        longest_delay_ms: no delay, after a jump neither, is longer.
        jump, path_change, drift, gain_step: shares of the clips with an echo.
        reverberant: share of clips in a room; all have places of their own there.
        noise_reverberant: share, of the noisy ones in a room, whose noise is in the room too.
        leave_out: speaker names that stand for several voices.
        rirs: rooms of the renderer's bank, as :func:`allears.data.echo_rooms.room_with_loudspeaker` draws them.
    """

    seconds: float = 6.0
    far_only: float = 0.3
    near_only: float = 0.15
    far_music: float = 0.12
    partial: float = 0.3
    ser_db: tuple[float, float] = (-25.0, 15.0)
    delay_ms: tuple[float, float] = (0.0, 500.0)
    long_delay: float = 0.1
    long_delay_ms: tuple[float, float] = (500.0, 980.0)
    longest_delay_ms: float = 980.0
    jump: float = 0.1
    jump_ms: tuple[float, float] = (20.0, 200.0)
    drift: float = 0.1
    drift_ppm: tuple[float, float] = (-100.0, 100.0)
    path_change: float = 0.15
    fade_ms: tuple[float, float] = (50.0, 300.0)
    gain_step: float = 0.15
    gain_db: tuple[float, float] = (-10.0, 10.0)
    loudspeaker: LoudspeakerRanges = field(default_factory=LoudspeakerRanges)
    reverberant: float = 0.95
    noisy: float = 0.7
    noise_reverberant: float = 0.5
    snr_db: tuple[float, float] = (0.0, 40.0)
    synthetic: float = 0.25
    babble: float = 0.0
    music: float = 0.03
    speech_speed: tuple[float, float] = (0.86, 1.18)
    noise_speed: tuple[float, float] = (0.75, 1.3)
    change_speed: float = 0.7
    eq: float = 0.5
    eq_db: float = 6.0
    pause_s: tuple[float, float] = (0.1, 1.5)
    highpass_hz: tuple[float, float] = (20.0, 60.0)
    far_level_db: tuple[float, float] = (-38.0, -14.0)
    level_db: tuple[float, float] = (-40.0, -16.0)
    leave_out: tuple[str, ...] = ("fillets-cs-minor",)
    rirs: int = 0

    def __post_init__(self) -> None:
        if self.far_only + self.near_only > 1:
            raise ValueError(f"far_only, near_only: {self.far_only} and {self.near_only} add up to more than 1")
        if not 0 <= self.delay_ms[0] <= self.longest_delay_ms:
            raise ValueError(f"delay_ms: {self.delay_ms} given, wanted 0 to longest_delay_ms = {self.longest_delay_ms}")

    def within(self, longest_ms: float) -> "EchoMixConfig":
        """The same clips with shorter delays: what a run begins with that widens them in steps."""
        low, high = self.delay_ms
        return replace(
            self,
            delay_ms=(min(low, longest_ms), min(high, longest_ms)),
            long_delay=self.long_delay if longest_ms > self.long_delay_ms[0] else 0.0,
            longest_delay_ms=min(self.longest_delay_ms, longest_ms),
        )


@dataclass
class EchoSampler(Draws[EchoMixConfig]):
    """Draws :class:`EchoSpec` values from a corpus. The same ``rng`` state gives the same specs.

    Near and far talker are distinct speakers, each as likely as the square root of his hours.

    Args:
        speech: clean talkers.
        noise: kinds noise, event, music; without it, made noise alone disturbs and no music is played.
        config: the distribution.
        rng: source of all choices.

    Raises:
        CorpusError: the bank holds fewer than two speakers.
    """

    def __post_init__(self) -> None:
        self.speech = without_speakers(self.speech, self.config.leave_out)
        super().__post_init__()
        if len(self._speaker_names) < 2:
            raise CorpusError(f"speech: the bank holds {len(self._speaker_names)} speaker; wanted two or more")

    def sample(self, name: str, scenario: Scenario | None = None, people: tuple[str, str] | None = None) -> EchoSpec:
        """Draw one clip; its scenario and its (near, far) speakers too, where none are given."""
        config, rng = self.config, self.rng
        frames = int(config.seconds * RATE)
        if scenario is None:
            draw = rng.random()
            one_end: Scenario = "far" if draw < config.far_only else "near"
            scenario = one_end if draw < config.far_only + config.near_only else "double"
        if people is None:
            chosen = rng.choice(len(self._speaker_names), size=2, replace=False, p=self._speaker_weight)
            people = self._speaker_names[chosen[0]], self._speaker_names[chosen[1]]
        near = self._said(frames, people[0]) if scenario != "far" else ()
        far, music = self._played(frames, people[1]) if scenario != "near" else ((), ())
        room = int(rng.integers(config.rirs)) if config.rirs and self.chance(config.reverberant) else None

        def place(source: int) -> dict[str, Any] | None:
            return None if room is None else {"bank": room, "source": source}

        spec = EchoSpec(
            name,
            frames,
            near,
            far,
            music,
            near_rir=place(NEAR) if near else None,
            near_eq_db=self.octave_gains() if near else None,
            ser_db=round(self.uniform(config.ser_db), 2) if near and (far or music) else None,
            highpass_hz=round(self.uniform(config.highpass_hz), 1),
            far_level_db=round(self.uniform(config.far_level_db), 2),
            level_db=round(self.uniform(config.level_db), 2),
        )
        if far or music:
            spec = self._echoed(replace(spec, echo_rir=place(LOUDSPEAKER)), place(MOVED))
        if not self.chance(config.noisy):
            return spec
        noise, synthetic = self.disturbance(frames)
        return replace(
            spec,
            noise=noise,
            synthetic=synthetic,
            snr_db=round(self.uniform(config.snr_db), 2),
            noise_rir=place(NOISE) if self.chance(config.noise_reverberant) else None,
        )

    def _said(self, frames: int, speaker: str) -> tuple[Segment, ...]:
        """What a talker says, throughout or in one part; nothing where the recordings are too short to be heard."""
        items, speed = self._by_speaker[speaker], self.speed(self.config.speech_speed)
        for _ in range(10):
            length = int(frames * self.uniform((0.33, 1.0))) if self.chance(self.config.partial) else frames
            first = int(self.rng.integers(0, frames - length + 1))
            said = self.utterances(length, self.speech, items, speed)
            if said:
                return tuple(replace(segment, at=segment.at + first) for segment in said)
        return ()

    def _played(self, frames: int, speaker: str) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
        """What the far end is: a talker, or music."""
        if self.noise is not None and "music" in self._by_kind and self.chance(self.config.far_music):
            return (), self._bed(self.noise, frames, "music")
        return self._said(frames, speaker), ()

    def _echoed(self, spec: EchoSpec, moved: dict[str, Any] | None) -> EchoSpec:
        """How the far end reaches the microphone."""
        config = self.config
        span = config.long_delay_ms if self.chance(config.long_delay) else config.delay_ms
        delay_ms = round(min(self.uniform(span), config.longest_delay_ms), 2)
        jump = None
        if self.chance(config.jump):
            by_ms = self.uniform(config.jump_ms) * (1 if self.chance(0.5) else -1)
            by_ms = by_ms if 0 <= delay_ms + by_ms <= config.longest_delay_ms else -by_ms
            if 0 <= delay_ms + by_ms <= config.longest_delay_ms:
                jump = DelayJump(self._moment(), round(by_ms, 2))
        changes = moved is not None and self.chance(config.path_change)
        steps = int(self.rng.integers(1, 3)) if self.chance(config.gain_step) else 0
        return replace(
            spec,
            loudspeaker=draw_loudspeaker(self.rng, config.loudspeaker),
            delay_ms=delay_ms,
            delay_jump=jump,
            drift_ppm=round(self.uniform(config.drift_ppm), 1) if self.chance(config.drift) else 0.0,
            path_change=PathChange(moved, self._moment(), round(self.uniform(config.fade_ms))) if changes else None,
            gain_steps=tuple(GainStep(self._moment(), round(self.uniform(config.gain_db), 1)) for _ in range(steps)),
        )

    def _moment(self) -> float:
        """Some time in the clip, not at its ends."""
        return round(self.uniform((0.2, 0.8)) * self.config.seconds, 3)
