"""Noisy-speech mixtures as values: what is mixed, how loud, in which room. ``render`` turns them into samples.

A set of mixtures is a JSON-lines file of :class:`MixSpec`: it renders to the same samples wherever the corpus is the
same.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allears.core.config import to_dict
from allears.data.draws import RATE, Draws
from allears.data.segments import Segment, Synthetic, read_lines, write_lines

__all__ = ["MixConfig", "MixSampler", "MixSpec", "Segment", "Synthetic", "read_specs", "write_specs"]


@dataclass(frozen=True)
class MixSpec:
    """One clip.

    Args:
        frames: length in samples.
        speech, noise: what is heard; an empty ``speech`` is a clip without talker, whose target is silence.
        snr_db: active level of the speech over the noise, both as they reach the microphone; ``None`` leaves the
            noise out.
        rir: the room of the talker: ``{"bank": i}``, ``{"item": id}`` or ``{"room": {...}}``; ``None`` is dry.
        noise_rir: likewise for the noise.
        eq_db, noise_eq_db: gains at 125, 250, ..., 8000 Hz, of talker and noise; ``None`` is flat.
        lowpass_hz: band limit of the whole recording.
        level_db: root mean square of the result in dB re full scale.
        clip_db: the result is clipped this far under its peak.
        codec: ``mulaw``, ``opus`` or ``mp3``: the noisy recording went through it.
    """

    id: str
    frames: int
    speech: tuple[Segment, ...]
    noise: tuple[Segment, ...] = ()
    synthetic: Synthetic | None = None
    snr_db: float | None = None
    rir: dict[str, Any] | None = None
    noise_rir: dict[str, Any] | None = None
    eq_db: tuple[float, ...] | None = None
    noise_eq_db: tuple[float, ...] | None = None
    lowpass_hz: float | None = None
    level_db: float = -26.0
    clip_db: float | None = None
    codec: str | None = None


def write_specs(path: str | Path, specs: list[MixSpec]) -> None:
    write_lines(path, (to_dict(spec) for spec in specs))


def read_specs(path: str | Path) -> list[MixSpec]:
    return read_lines(path, MixSpec)


@dataclass(frozen=True)
class MixConfig:
    """Distribution of the mixtures. Probabilities in [0, 1], ranges as (low, high)."""

    seconds: float = 4.0
    snr_db: tuple[float, float] = (-5.0, 20.0)
    reverberant: float = 0.6
    noise_reverberant: float = 0.5
    silent_talker: float = 0.02
    noiseless: float = 0.02
    synthetic: float = 0.25
    babble: float = 0.12
    music: float = 0.12
    speech_speed: tuple[float, float] = (0.86, 1.18)
    noise_speed: tuple[float, float] = (0.75, 1.3)
    change_speed: float = 0.7
    eq: float = 0.5
    eq_db: float = 6.0
    lowpass: float = 0.08
    lowpass_hz: tuple[float, float] = (2800.0, 7000.0)
    level_db: tuple[float, float] = (-38.0, -16.0)
    clip: float = 0.05
    codec: float = 0.04
    codecs: tuple[str, ...] = ("mulaw",)
    pause_s: tuple[float, float] = (0.08, 0.6)
    rirs: int = 0


class MixSampler(Draws[MixConfig]):
    """Draws :class:`MixSpec` values from a corpus. The same ``rng`` state gives the same specs.

    Args:
        speech: clean talkers.
        noise: everything that disturbs: kinds noise, event, music, babble.
        config: the distribution.
        rng: source of all choices.
    """

    def sample(self, name: str) -> MixSpec:
        """Draw one clip."""
        config, rng = self.config, self.rng
        frames = int(config.seconds * RATE)
        speaker = self._speaker_names[int(rng.choice(len(self._speaker_names), p=self._speaker_weight))]
        silent = self.chance(config.silent_talker)
        speech = (
            ()
            if silent
            else self.utterances(frames, self.speech, self._by_speaker[speaker], self.speed(config.speech_speed))
        )
        noise, synthetic = self.disturbance(frames)
        noiseless = not silent and self.chance(config.noiseless)
        room = int(rng.integers(config.rirs)) if config.rirs and self.chance(config.reverberant) else None
        noise_room = config.rirs and self.chance(config.noise_reverberant)
        return MixSpec(
            id=name,
            frames=frames,
            speech=speech,
            noise=noise,
            synthetic=synthetic,
            snr_db=None if noiseless else self.uniform(config.snr_db),
            rir=None if room is None else {"bank": room},
            noise_rir={"bank": room if room is not None else int(rng.integers(config.rirs))} if noise_room else None,
            eq_db=self.octave_gains(),
            noise_eq_db=self.octave_gains(),
            lowpass_hz=self.uniform(config.lowpass_hz) if self.chance(config.lowpass) else None,
            level_db=self.uniform(config.level_db),
            clip_db=self.uniform((2.0, 12.0)) if self.chance(config.clip) else None,
            codec=str(rng.choice(list(config.codecs))) if config.codecs and self.chance(config.codec) else None,
        )
