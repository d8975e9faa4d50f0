"""Noisy-speech mixtures as values: what is mixed, how loud, in which room. ``render`` turns them into samples.

A set of mixtures is a JSON-lines file of :class:`MixSpec`: it renders to the same samples wherever the corpus is the
same.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.config import from_dict, to_dict
from allears.core.errors import CorpusError
from allears.data.bank import AudioBank


@dataclass(frozen=True)
class Segment:
    """A stretch of a corpus item placed in a clip; positions in samples at 16 kHz.

    ``speed`` resamples the item (1.1 is faster and higher); ``start`` counts in the item, ``at`` and ``length`` in
    the clip.
    """

    item: str
    start: int
    at: int
    length: int
    gain_db: float = 0.0
    speed: float = 1.0


@dataclass(frozen=True)
class Synthetic:
    """Stationary noise made on the spot: white noise with a slope of ``slope_db`` per octave, plus hum at ``hum_hz``
    and its harmonics.
    """

    seed: int
    slope_db: float = -3.0
    hum_hz: float = 0.0
    gain_db: float = 0.0


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
    Path(path).write_text("".join(json.dumps(to_dict(spec)) + "\n" for spec in specs))


def read_specs(path: str | Path) -> list[MixSpec]:
    lines = Path(path).read_text().splitlines()
    return [from_dict(MixSpec, json.loads(line), f"{path}:{number}") for number, line in enumerate(lines, 1) if line]


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


@dataclass
class MixSampler:
    """Draws :class:`MixSpec` values from a corpus. The same ``rng`` state gives the same specs.

    Args:
        speech: clean talkers.
        noise: everything that disturbs: kinds noise, event, music, babble.
        config: the distribution.
        rng: source of all choices.
    """

    speech: AudioBank
    noise: AudioBank
    config: MixConfig
    rng: np.random.Generator
    _by_speaker: dict[str, np.ndarray] = field(init=False)
    _by_kind: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        if not len(self.speech.items):
            raise CorpusError("speech: the bank holds no item; prepare the corpus with 'allears data prepare'")
        speakers: dict[str, list[int]] = {}
        for index, item in enumerate(self.speech.items):
            speakers.setdefault(item.speaker or item.package, []).append(index)
        self._by_speaker = {name: np.array(found) for name, found in sorted(speakers.items())}
        hours = np.array([self.speech.lengths[found].sum() for found in self._by_speaker.values()], dtype=np.float64)
        self._speaker_weight = np.sqrt(hours) / np.sqrt(hours).sum()
        self._speaker_names = list(self._by_speaker)
        kinds: dict[str, list[int]] = {}
        for index, item in enumerate(self.noise.items):
            kinds.setdefault(item.kind, []).append(index)
        self._by_kind = {kind: np.array(found) for kind, found in kinds.items()}

    def _uniform(self, span: tuple[float, float]) -> float:
        return float(self.rng.uniform(*span))

    def _chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def _speed(self, span: tuple[float, float]) -> float:
        return round(self._uniform(span), 3) if self._chance(self.config.change_speed) else 1.0

    def _talker(
        self, frames: int, bank: AudioBank, choices: np.ndarray, speed: float, gain_db: float = 0.0
    ) -> tuple[Segment, ...]:
        """Utterances one after another with pauses, from a random point on, until the clip is full."""
        segments: list[Segment] = []
        at = int(self.rng.integers(0, 4000)) if self._chance(0.5) else 0
        first = True
        while at < frames - 2000:
            index = int(choices[self.rng.integers(len(choices))])
            have = int(bank.lengths[index])
            start = int(self.rng.integers(0, max(1, have // 2))) if first and have > frames else 0
            length = min(int((have - start) / speed), frames - at)
            if length > 400:
                segments.append(Segment(bank.items[index].id, start, at, length, gain_db, speed))
            at += max(length, 400) + int(self._uniform(self.config.pause_s) * 16_000)
            first = False
        return tuple(segments)

    def _bed(self, frames: int, kind: str) -> tuple[Segment, ...]:
        """A continuous disturbance: a random stretch, looped where the recording is shorter than the clip."""
        choices = self._by_kind[kind]
        index = int(choices[self.rng.integers(len(choices))])
        speed = self._speed(self.config.noise_speed)
        whole = int(self.noise.lengths[index] / speed)
        segments: list[Segment] = []
        offset = (
            int(self.rng.integers(0, max(1, whole - frames)))
            if whole > frames
            else int(self.rng.integers(0, max(1, whole)))
        )
        at = 0
        while at < frames and len(segments) < 64:
            length = min(whole - offset, frames - at)
            segments.append(Segment(self.noise.items[index].id, int(offset * speed), at, length, 0.0, speed))
            at += max(length, 800)
            offset = 0
        return tuple(segments)

    def _events(self, frames: int) -> tuple[Segment, ...]:
        choices = self._by_kind["event"]
        segments = []
        for _ in range(int(self.rng.integers(2, 8))):
            index = int(choices[self.rng.integers(len(choices))])
            speed = self._speed(self.config.noise_speed)
            at = int(self.rng.integers(0, frames - 1600))
            length = min(int(self.noise.lengths[index] / speed), frames - at)
            if length > 100:
                segments.append(Segment(self.noise.items[index].id, 0, at, length, self._uniform((-12.0, 3.0)), speed))
        return tuple(segments)

    def _noise(self, frames: int) -> tuple[tuple[Segment, ...], Synthetic | None]:
        have, config = self._by_kind, self.config
        segments: tuple[Segment, ...] = ()
        draw = self.rng.random()
        if "music" in have and draw < config.music:
            segments = self._bed(frames, "music")
        elif "babble" in have and draw < config.music + config.babble:
            for _ in range(int(self.rng.integers(3, 8))):
                speed, gain = self._speed(config.speech_speed), self._uniform((-6.0, 0.0))
                segments += self._talker(frames, self.noise, have["babble"], speed, gain)
        elif "noise" in have and draw < 0.72:
            segments = self._bed(frames, "noise")
            if self._chance(0.3):
                segments += self._bed(frames, "noise")
        if "event" in have and (not segments or self._chance(0.25)):
            segments += self._events(frames)
        synthetic = None
        if not segments or self._chance(config.synthetic):
            hum = float(self.rng.choice([0.0, 0.0, 50.0, 60.0, self._uniform((80.0, 400.0))]))
            synthetic = Synthetic(
                int(self.rng.integers(2**31)), self._uniform((-9.0, 3.0)), hum, self._uniform((-15.0, 0.0))
            )
        return segments, synthetic

    def _eq(self) -> tuple[float, ...] | None:
        if not self._chance(self.config.eq):
            return None
        return tuple(round(float(gain), 1) for gain in self.rng.uniform(-self.config.eq_db, self.config.eq_db, 7))

    def sample(self, name: str) -> MixSpec:
        """Draw one clip."""
        config, rng = self.config, self.rng
        frames = int(config.seconds * 16_000)
        speaker = self._speaker_names[int(rng.choice(len(self._speaker_names), p=self._speaker_weight))]
        silent = self._chance(config.silent_talker)
        speech = (
            ()
            if silent
            else self._talker(frames, self.speech, self._by_speaker[speaker], self._speed(config.speech_speed))
        )
        noise, synthetic = self._noise(frames)
        noiseless = not silent and self._chance(config.noiseless)
        room = int(rng.integers(config.rirs)) if config.rirs and self._chance(config.reverberant) else None
        noise_room = config.rirs and self._chance(config.noise_reverberant)
        return MixSpec(
            id=name,
            frames=frames,
            speech=speech,
            noise=noise,
            synthetic=synthetic,
            snr_db=None if noiseless else self._uniform(config.snr_db),
            rir=None if room is None else {"bank": room},
            noise_rir={"bank": room if room is not None else int(rng.integers(config.rirs))} if noise_room else None,
            eq_db=self._eq(),
            noise_eq_db=self._eq(),
            lowpass_hz=self._uniform(config.lowpass_hz) if self._chance(config.lowpass) else None,
            level_db=self._uniform(config.level_db),
            clip_db=self._uniform((2.0, 12.0)) if self._chance(config.clip) else None,
            codec=str(rng.choice(list(config.codecs))) if config.codecs and self._chance(config.codec) else None,
        )
