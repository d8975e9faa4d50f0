"""Clips of several talkers as values: who says what when, how loud, in which room. ``talkers_render`` renders them.

A set of clips is a JSON-lines file of :class:`TalkersSpec`: it renders to the same samples wherever the corpus is the
same.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.errors import CorpusError
from allears.data.cast import Cast, Voice, pitches_hz
from allears.data.draws import RATE, Draws, without_speakers
from allears.data.formants import formant_ratios
from allears.data.segments import Segment, Synthetic, lean_dict, read_lines, write_lines


@dataclass(frozen=True)
class Talker:
    """One voice of a clip.

    Args:
        segments: what the voice says; positions in the clip.
        gain_db: its active level, on the scale of the other talkers' (the first usually has 0).
        rir: its place in a room: ``{"bank": i, "source": j}``, ``{"item": id}`` or ``{"room": {...}, "source": j}``;
            ``None`` is dry.
        eq_db: gains at 125, 250, ..., 8000 Hz; ``None`` is flat.
        formants: its resonances are at so many times their frequency, its pitch is as it was.
    """

    segments: tuple[Segment, ...]
    gain_db: float = 0.0
    rir: dict[str, Any] | None = None
    eq_db: tuple[float, ...] | None = None
    formants: float = 1.0


@dataclass(frozen=True)
class TalkersSpec:
    """One clip.

    Args:
        frames: length in samples.
        talkers: all distinct persons.
        noise, synthetic: what disturbs.
        snr_db: active level of all talkers together over the noise, both as they reach the microphone; ``None`` leaves
            the noise out.
        noise_rir: the noise's place in a room.
        lowpass_hz: band limit of the whole recording.
        level_db: root mean square of the mixture in dB re full scale.
    """

    id: str
    frames: int
    talkers: tuple[Talker, ...]
    noise: tuple[Segment, ...] = ()
    synthetic: Synthetic | None = None
    snr_db: float | None = None
    noise_rir: dict[str, Any] | None = None
    lowpass_hz: float | None = None
    level_db: float = -26.0


def write_talkers(path: str | Path, specs: list[TalkersSpec]) -> None:
    write_lines(path, (lean_dict(spec) for spec in specs))


def read_talkers(path: str | Path) -> list[TalkersSpec]:
    return read_lines(path, TalkersSpec)


@dataclass(frozen=True)
class TalkersConfig:
    """Distribution of the clips. Probabilities in [0, 1], ranges as (low, high).

    Args:
        talkers: numbers of talkers with their weights, as ((1, 0.1), (2, 0.6)).
        spread_db: active level of each further talker over the first.
        noisy, reverberant: shares of the clips. In a room all talkers have places of their own.
        noise_reverberant: share, of the noisy clips in a room, whose noise is in the room too.
        conversation: share of clips in which talkers take turns, with gaps or a little overlap.
        partial: share of clips in which each is heard in one part only; in the others all talk from start to end.
        turn_s: length of a turn.
        turn_overlap: share of turns that begin before the last one has ended, by ``overlap_s``; the others begin
            ``gap_s`` after it.
        whole_turns: no utterance is cut because its turn is over.
        speech_speed: of a talker's voice in one clip; a voice at another speed is nearly another voice.
        babble: of the noises; off, since who babbles is a talker too.
        alike: share of clips whose talkers were recorded alike, so that a network has nothing but the voices to tell
            them apart by: they come from one package, and pass through one equaliser. Where the package has too few,
            a speaker is heard again as another, at a speed of its own (``alike_speed``, cut into parts).
        apart: part of the logarithm of ``alike_speed`` that lies between the speeds of two such voices.
        one_pitch: share of the other clips whose voices are brought to one pitch by their speeds (``alike_speed``), to
            within 6 %: what is left to tell them apart by is harder to hear.
        one_band: a clip's talkers are all full band or all narrow-band, so that the bandwidth does not tell them apart.
        leave_out: speaker names that stand for several voices.
        formant: share of the voices whose formants are moved, by ``formant_ratio``: with speed, pitch and formants
            change together, and two voices of one pitch would always sound alike. Nothing else that is drawn for a
            clip depends on it.
        rirs: rooms of the renderer's bank.
    """

    seconds: float = 4.0
    talkers: tuple[tuple[int, float], ...] = ((1, 0.1), (2, 0.6), (3, 0.3))
    spread_db: tuple[float, float] = (-5.0, 5.0)
    noisy: float = 0.5
    reverberant: float = 0.5
    noise_reverberant: float = 0.5
    snr_db: tuple[float, float] = (0.0, 25.0)
    conversation: float = 0.3
    partial: float = 0.15
    turn_s: tuple[float, float] = (0.6, 2.5)
    turn_overlap: float = 0.4
    overlap_s: tuple[float, float] = (0.1, 0.8)
    gap_s: tuple[float, float] = (0.05, 0.8)
    whole_turns: bool = False
    pause_s: tuple[float, float] = (0.05, 0.35)
    speech_speed: tuple[float, float] = (0.86, 1.18)
    noise_speed: tuple[float, float] = (0.75, 1.3)
    change_speed: float = 0.7
    synthetic: float = 0.25
    babble: float = 0.0
    music: float = 0.12
    eq: float = 0.5
    eq_db: float = 6.0
    lowpass: float = 0.05
    lowpass_hz: tuple[float, float] = (3000.0, 7000.0)
    level_db: tuple[float, float] = (-38.0, -16.0)
    alike: float = 0.0
    alike_speed: tuple[float, float] = (0.8, 1.26)
    apart: float = 0.25
    one_pitch: float = 0.0
    one_band: bool = False
    leave_out: tuple[str, ...] = ("fillets-cs-minor",)
    rirs: int = 0
    formant: float = 0.0
    formant_ratio: tuple[float, float] = (0.84, 1.19)

    def __post_init__(self) -> None:
        if not self.talkers or any(count < 1 or weight < 0 for count, weight in self.talkers):
            raise ValueError(f"talkers: {self.talkers} given; wanted pairs (1 or more talkers, weight of 0 or more)")
        if sum(weight for _, weight in self.talkers) <= 0:
            raise ValueError(f"talkers: the weights of {self.talkers} add up to 0; one must be above 0")
        if self.conversation + self.partial > 1:
            raise ValueError(f"conversation, partial: {self.conversation} and {self.partial} add up to more than 1")
        if not 0 < self.formant_ratio[0] <= self.formant_ratio[1]:
            raise ValueError(f"formant_ratio: {self.formant_ratio} given; wanted (low, high), 0 < low <= high")


@dataclass
class TalkersSampler(Draws[TalkersConfig]):
    """Draws :class:`TalkersSpec` values from a corpus. The same ``rng`` state gives the same specs.

    Talkers of a clip are distinct speakers, each as likely as the square root of its hours.

    Args:
        speech: clean talkers.
        noise: kinds noise, event, music, babble; without it, made noise alone disturbs.
        config: the distribution.
        rng: source of all choices.

    Raises:
        CorpusError: the bank holds fewer speakers than a clip may have talkers.
    """

    _counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.speech = without_speakers(self.speech, self.config.leave_out)
        super().__post_init__()
        self._counts = np.array([count for count, _ in self.config.talkers])
        weights = np.array([weight for _, weight in self.config.talkers], dtype=np.float64)
        self._count_weight = weights / weights.sum()
        items = list(self._by_speaker.values())
        pitches = pitches_hz(self.speech, items) if self.config.one_pitch else None
        self._cast = Cast(self.speech, items, self._speaker_weight, self.rng, pitches)
        if (most := int(self._counts[weights > 0].max())) > len(self._speaker_names):
            raise CorpusError(
                f"speech: the bank holds {len(self._speaker_names)} speakers, and clips of {most} talkers are asked for"
            )

    def sample(self, name: str) -> TalkersSpec:
        """Draw one clip. It has fewer talkers than drawn where the recordings are too short to be heard."""
        spec = self._clip(name)
        return self._reshaped(spec) if self.config.formant else spec

    def _reshaped(self, spec: TalkersSpec) -> TalkersSpec:
        """The clip with formants drawn for its voices: last of all, so that the rest is what it is without them."""
        items = [self.speech.items[self.speech.index_of(talker.segments[0].item)] for talker in spec.talkers]
        speakers = [item.speaker or item.package for item in items]
        ratios = formant_ratios(speakers, self.config.formant, self.config.formant_ratio, self.rng)
        talkers = (replace(talker, formants=x) for talker, x in zip(spec.talkers, ratios, strict=True))
        return replace(spec, talkers=tuple(talkers))

    def _clip(self, name: str) -> TalkersSpec:
        config, rng = self.config, self.rng
        frames = int(config.seconds * RATE)
        count = int(rng.choice(self._counts, p=self._count_weight))
        alike = count > 1 and bool(config.alike) and self.chance(config.alike)
        lines = [line for line in self._lines(frames, self._voices(count, alike)) if line]
        room = int(rng.integers(config.rirs)) if config.rirs and self.chance(config.reverberant) else None
        shared = self.octave_gains() if alike else None
        talkers = tuple(
            Talker(
                line,
                round(self.uniform(config.spread_db), 2) if place else 0.0,
                None if room is None else {"bank": room, "source": place},
                shared if alike else self.octave_gains(),
            )
            for place, line in enumerate(lines)
        )
        spec = TalkersSpec(
            name,
            frames,
            talkers,
            lowpass_hz=float(round(self.uniform(config.lowpass_hz))) if self.chance(config.lowpass) else None,
            level_db=round(self.uniform(config.level_db), 2),
        )
        if not self.chance(config.noisy):
            return spec
        noise, synthetic = self.disturbance(frames)
        inside = room is not None and self.chance(config.noise_reverberant)
        return replace(
            spec,
            noise=noise,
            synthetic=synthetic,
            snr_db=round(self.uniform(config.snr_db), 2),
            noise_rir={"bank": room, "source": -1} if inside else None,
        )

    def _voices(self, count: int, alike: bool) -> list[Voice]:
        config, cast, speed = self.config, self._cast, lambda: self.speed(self.config.speech_speed)
        cast.rng = self.rng
        if alike:
            return cast.alike(count, config.alike_speed, config.apart, speed)
        if count > 1 and config.one_pitch and self.chance(config.one_pitch):
            return cast.level(count, config.one_band, config.alike_speed, speed)
        return cast.distinct(count, config.one_band, speed)

    def _lines(self, frames: int, voices: list[Voice]) -> list[tuple[Segment, ...]]:
        """What each talker says."""
        draw = self.rng.random()
        if draw < self.config.conversation:
            return self._turns(frames, voices)
        if draw < self.config.conversation + self.config.partial:
            return [self._part(frames, voice) for voice in voices]
        return [self.utterances(frames, self.speech, items, speed) for items, speed in voices]

    def _part(self, frames: int, voice: Voice) -> tuple[Segment, ...]:
        """Somewhere in the clip, for a third of it or more."""
        length = int(frames * self.uniform((0.33, 1.0)))
        first = int(self.rng.integers(0, frames - length + 1))
        said = self.utterances(length, self.speech, *voice)
        return tuple(replace(segment, at=segment.at + first) for segment in said)

    def _turns(self, frames: int, voices: list[Voice]) -> list[tuple[Segment, ...]]:
        """Talkers in turn; each comes to speak early on, then who is next is drawn."""
        config, rng = self.config, self.rng
        lines: list[list[Segment]] = [[] for _ in voices]
        free = [0] * len(voices)  # where each has finished
        at, talker, turn = int(rng.integers(0, 4000)), 0, 0
        while at < frames - 2000:
            opening = turn < len(voices)
            talker = turn if opening else (talker + int(rng.integers(1, max(2, len(voices))))) % len(voices)
            wanted = int(self.uniform(config.turn_s) * RATE)
            if opening:
                wanted = min(wanted, (frames - at) * 3 // (4 * (len(voices) - turn)))
            at = max(at, free[talker])
            end = self._turn(lines[talker], voices[talker], at, wanted, frames)
            free[talker] = end + int(config.pause_s[0] * RATE)
            if self.chance(config.turn_overlap):
                at = max(at + 1600, end - int(self.uniform(config.overlap_s) * RATE))
            else:
                gap = int(self.uniform(config.gap_s) * RATE)
                at = end + (min(gap, (frames - end) // 8) if opening else gap)
            turn += 1
        return [tuple(line) for line in lines]

    def _turn(self, line: list[Segment], voice: Voice, at: int, wanted: int, frames: int) -> int:
        """Add utterances of a voice until the turn has the length wanted; returns where it ends."""
        items, speed = voice
        until = at + wanted
        stop = frames if self.config.whole_turns else min(frames, until)
        while True:
            index = int(items[self.rng.integers(len(items))])
            spare = int(self.speech.lengths[index]) - int((stop - at) * speed)
            start = int(self.rng.integers(spare + 1)) if spare > 0 and not self.config.whole_turns else 0
            length = min(int((int(self.speech.lengths[index]) - start) / speed), stop - at)
            if length > 400:
                line.append(Segment(self.speech.items[index].id, start, at, length, 0.0, speed))
            at += max(length, 400)
            pause = int(self.uniform(self.config.pause_s) * RATE)
            if at + pause >= min(until, stop) - 2000:
                return min(at, frames)
            at += pause
