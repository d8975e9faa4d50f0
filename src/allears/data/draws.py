"""Random choices that all samplers of clips make: utterances one after another, beds of noise, events, filters.

The order of the draws is part of what a seed means: change it, and every set that was drawn is another one.
"""

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from allears.core.errors import CorpusError
from allears.data.bank import AudioBank
from allears.data.segments import Segment, Synthetic

RATE = 16_000


class Shares(Protocol):
    """What a configuration says about the draws here: probabilities in [0, 1], ranges as (low, high)."""

    @property
    def synthetic(self) -> float: ...
    @property
    def babble(self) -> float: ...
    @property
    def music(self) -> float: ...
    @property
    def speech_speed(self) -> tuple[float, float]: ...
    @property
    def noise_speed(self) -> tuple[float, float]: ...
    @property
    def change_speed(self) -> float: ...
    @property
    def eq(self) -> float: ...
    @property
    def eq_db(self) -> float: ...
    @property
    def pause_s(self) -> tuple[float, float]: ...


def without_speakers(bank: AudioBank, names: tuple[str, ...]) -> AudioBank:
    """The bank without those speakers; itself where it has none of them."""
    if not any(item.speaker in names for item in bank.items):
        return bank
    return bank.select(lambda item: item.speaker not in names)


Config = TypeVar("Config", bound=Shares)


@dataclass
class Draws(Generic[Config]):
    """Draws from a corpus. The same ``rng`` state gives the same choices.

    Args:
        speech: clean talkers.
        noise: everything that disturbs: kinds noise, event, music, babble.
        config: the distribution.
        rng: source of all choices.
    """

    speech: AudioBank
    noise: AudioBank | None
    config: Config
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
        for index, item in enumerate(self.noise.items if self.noise is not None else []):
            kinds.setdefault(item.kind, []).append(index)
        self._by_kind = {kind: np.array(found) for kind, found in kinds.items()}

    def uniform(self, span: tuple[float, float]) -> float:
        return float(self.rng.uniform(*span))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def speed(self, span: tuple[float, float]) -> float:
        return round(self.uniform(span), 3) if self.chance(self.config.change_speed) else 1.0

    def utterances(
        self, frames: int, bank: AudioBank, choices: np.ndarray, speed: float, gain_db: float = 0.0
    ) -> tuple[Segment, ...]:
        """Utterances one after another with pauses, from a random point on, until the clip is full."""
        segments: list[Segment] = []
        at = int(self.rng.integers(0, 4000)) if self.chance(0.5) else 0
        first = True
        while at < frames - 2000:
            index = int(choices[self.rng.integers(len(choices))])
            have = int(bank.lengths[index])
            start = int(self.rng.integers(0, max(1, have // 2))) if first and have > frames else 0
            length = min(int((have - start) / speed), frames - at)
            if length > 400:
                segments.append(Segment(bank.items[index].id, start, at, length, gain_db, speed))
            at += max(length, 400) + int(self.uniform(self.config.pause_s) * RATE)
            first = False
        return tuple(segments)

    def _bed(self, bank: AudioBank, frames: int, kind: str) -> tuple[Segment, ...]:
        """A continuous disturbance: a random stretch, looped where the recording is shorter than the clip."""
        choices = self._by_kind[kind]
        index = int(choices[self.rng.integers(len(choices))])
        speed = self.speed(self.config.noise_speed)
        whole = int(bank.lengths[index] / speed)
        segments: list[Segment] = []
        offset = (
            int(self.rng.integers(0, max(1, whole - frames)))
            if whole > frames
            else int(self.rng.integers(0, max(1, whole)))
        )
        at = 0
        while at < frames and len(segments) < 64:
            length = min(whole - offset, frames - at)
            segments.append(Segment(bank.items[index].id, int(offset * speed), at, length, 0.0, speed))
            at += max(length, 800)
            offset = 0
        return tuple(segments)

    def _events(self, bank: AudioBank, frames: int) -> tuple[Segment, ...]:
        choices = self._by_kind["event"]
        segments = []
        for _ in range(int(self.rng.integers(2, 8))):
            index = int(choices[self.rng.integers(len(choices))])
            speed = self.speed(self.config.noise_speed)
            at = int(self.rng.integers(0, frames - 1600))
            length = min(int(bank.lengths[index] / speed), frames - at)
            if length > 100:
                segments.append(Segment(bank.items[index].id, 0, at, length, self.uniform((-12.0, 3.0)), speed))
        return tuple(segments)

    def disturbance(self, frames: int) -> tuple[tuple[Segment, ...], Synthetic | None]:
        """Noise of one clip: recordings, made noise, or both."""
        have, config, bank = self._by_kind, self.config, self.noise
        segments: tuple[Segment, ...] = ()
        draw = self.rng.random()
        if bank is not None:
            if "music" in have and draw < config.music:
                segments = self._bed(bank, frames, "music")
            elif "babble" in have and draw < config.music + config.babble:
                for _ in range(int(self.rng.integers(3, 8))):
                    speed, gain = self.speed(config.speech_speed), self.uniform((-6.0, 0.0))
                    segments += self.utterances(frames, bank, have["babble"], speed, gain)
            elif "noise" in have and draw < 0.72:
                segments = self._bed(bank, frames, "noise")
                if self.chance(0.3):
                    segments += self._bed(bank, frames, "noise")
            if "event" in have and (not segments or self.chance(0.25)):
                segments += self._events(bank, frames)
        synthetic = None
        if not segments or self.chance(config.synthetic):
            hum = float(self.rng.choice([0.0, 0.0, 50.0, 60.0, self.uniform((80.0, 400.0))]))
            synthetic = Synthetic(
                int(self.rng.integers(2**31)), self.uniform((-9.0, 3.0)), hum, self.uniform((-15.0, 0.0))
            )
        return segments, synthetic

    def octave_gains(self) -> tuple[float, ...] | None:
        """Gains in dB at the seven octaves of a filter, or none."""
        if not self.chance(self.config.eq):
            return None
        return tuple(round(float(gain), 1) for gain in self.rng.uniform(-self.config.eq_db, self.config.eq_db, 7))
