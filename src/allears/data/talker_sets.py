"""Fixed sets of mixtures that separation is judged on: drawn once, kept as manifests, rendered anywhere."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from allears.core.config import to_dict
from allears.data.bank import AudioBank
from allears.data.corpus import read_manifest
from allears.data.mixsets import rounded_room
from allears.data.reverb import room_with_sources
from allears.data.talkers import TalkersConfig, TalkersSampler, TalkersSpec

JUDGE_TALKERS = TalkersConfig(
    noisy=0.0,
    reverberant=0.0,
    conversation=0.0,
    partial=0.0,
    change_speed=0.0,
    synthetic=0.0,
    eq=0.0,
    lowpass=0.0,
    level_db=(-32.0, -18.0),
    snr_db=(5.0, 20.0),
)
CONVERSATION = replace(
    JUDGE_TALKERS,
    conversation=1.0,
    turn_s=(1.5, 6.0),
    turn_overlap=0.7,
    overlap_s=(0.5, 2.0),
    gap_s=(0.1, 0.8),
    whole_turns=True,
    music=0.0,
)
Spec = TypeVar("Spec")
SHORTEST_UTTERANCE_S = 1.0
OVERLAP = 0.15
"""Share of a conversation in which both talk."""

_VOICES = frozenset(("baby", "laugh", "scream", "singing"))


@dataclass(frozen=True)
class Material:
    """What a set is drawn from: the talkers and disturbances of one split, and recorded rooms (``ID#channel``)."""

    speech: AudioBank
    noise: AudioBank
    recorded_rooms: tuple[str, ...] = ()

    @classmethod
    def from_corpus(cls, folder: str | Path, split: str) -> "Material":
        """Utterances of a second or more, and noises that are no voices."""
        bank = AudioBank.from_corpus(folder, splits=(split,))
        speech = bank.select(lambda item: item.kind == "speech" and item.seconds >= SHORTEST_UTTERANCE_S)
        noise = bank.select(lambda item: item.kind in ("noise", "event", "music") and item.label not in _VOICES)
        rooms = [item.id for item in read_manifest(folder) if item.kind == "rir" and item.split == split]
        return cls(speech, noise, tuple(f"{name}#0" for name in rooms))


def draw_clips(
    material: Material,
    talkers: int,
    seconds: Sequence[float],
    rng: np.random.Generator,
    *,
    noisy: bool = False,
    config: TalkersConfig = JUDGE_TALKERS,
) -> list[TalkersSpec]:
    """A clip of each of ``seconds``: all groups of ``talkers`` speakers in turn; levels of the second talker, and
    signal-to-noise ratios, evenly over their ranges.

    ``noisy`` clips are in simulated rooms, half of them with the noise in the room too; every tenth is in recorded
    rooms, where the material has one for each talker.
    """
    config = replace(config, talkers=((talkers, 1.0),), noisy=float(noisy))
    names = sorted(material.speech.speakers())
    groups = [material.speech.select(lambda item, g=g: item.speaker in g) for g in combinations(names, talkers)]
    samplers = [TalkersSampler(bank, material.noise if noisy else None, config, rng) for bank in groups]
    levels, ratios = (_evenly(span, len(seconds), rng) for span in (config.spread_db, config.snr_db))
    specs = []
    for index, length in enumerate(seconds):
        sampler = samplers[index % len(samplers)]
        sampler.config = replace(config, seconds=length)
        spec = sampler.sample(f"clip-{index:03d}")
        if talkers > 1:
            second = replace(spec.talkers[1], gain_db=levels[index])
            spec = replace(spec, talkers=(spec.talkers[0], second, *spec.talkers[2:]))
        if noisy:
            spec = _in_room(replace(spec, snr_db=ratios[index]), rng)
            if index % 10 == 9 and len(material.recorded_rooms) >= talkers:
                recorded = zip(spec.talkers, material.recorded_rooms, strict=False)
                there = tuple(replace(talker, rir={"item": room}) for talker, room in recorded)
                spec = replace(spec, talkers=there, noise_rir=None)
        specs.append(spec)
    return specs


def draw_conversations(material: Material, seconds: float, rng: np.random.Generator) -> list[TalkersSpec]:
    """Two talkers in turn, once clean, once noisy and in a room; the one of twenty draws whose overlap is nearest to
    :data:`OVERLAP`."""
    beds = replace(material, noise=material.noise.select(lambda item: item.kind == "noise"))
    specs = []
    for name, noisy in (("clean", False), ("noisy", True)):
        drawn: list[TalkersSpec] = []
        while len(drawn) < 20:
            (spec,) = draw_clips(beds, 2, [seconds], rng, noisy=noisy, config=CONVERSATION)
            drawn += [spec] if spec.noise or not noisy else []
        best = min(drawn, key=lambda spec: abs(overlap_of(spec) - OVERLAP))
        specs.append(replace(best, id=f"conversation-{name}"))
    return specs


def overlap_of(spec: TalkersSpec) -> float:
    """Share of the talked time in which two or more talk at once."""
    talking = np.zeros((len(spec.talkers), spec.frames), bool)
    for row, talker in enumerate(spec.talkers):
        for segment in talker.segments:
            talking[row, segment.at : segment.at + segment.length] = True
    count = talking.sum(0)
    return float((count > 1).sum() / max(1, (count > 0).sum()))


def _evenly(span: tuple[float, float], count: int, rng: np.random.Generator) -> list[float]:
    """``count`` values evenly over ``span``, in random order."""
    low, high = span
    return [round(low + (high - low) * (float(place) + 0.5) / count, 2) for place in rng.permutation(count)]


def _in_room(spec: TalkersSpec, rng: np.random.Generator) -> TalkersSpec:
    """All talkers in one new room; each reference holds the room with that talker's place alone."""
    room = rounded_room(room_with_sources(rng, len(spec.talkers)))
    places = [to_dict(replace(room, mics_m=(place,))) for place in room.mics_m]
    talkers = tuple(replace(t, rir={"room": place}) for t, place in zip(spec.talkers, places, strict=False))
    inside = {"room": places[-1], "source": 0} if rng.random() < 0.5 else None
    return replace(spec, talkers=talkers, noise_rir=inside)


def _lengths(count: int, rng: np.random.Generator) -> list[float]:
    """Clips of 4 to 5 s, by hundredths."""
    return [round(float(rng.uniform(4.0, 5.0)), 2) for _ in range(count)]


def _short(material: Material, rng: np.random.Generator, clips: int, talkers: int, noisy: bool) -> list[TalkersSpec]:
    return draw_clips(material, talkers, _lengths(clips, rng), rng, noisy=noisy)


def _long(material: Material, rng: np.random.Generator) -> list[TalkersSpec]:
    specs = []
    for seconds in (4, 16, 60):
        clips = draw_clips(material, 2, [float(seconds)] * 12, rng)
        specs += [replace(spec, id=f"long-{seconds:02d}s-{row:02d}") for row, spec in enumerate(clips)]
    return specs


def _validation(material: Material, rng: np.random.Generator) -> list[TalkersSpec]:
    halves = (("clean", False), ("noisy", True))
    clips = [(name, spec) for name, noisy in halves for spec in _short(material, rng, 20, 2, noisy)]
    return [replace(spec, id=f"{name}-{spec.id}") for name, spec in clips]


Draw = Callable[[Material, np.random.Generator], list[Spec]]
SETS: dict[str, tuple[str, Draw[TalkersSpec]]] = {
    "separate-val": ("val", _validation),
    "separate-clean1": ("test", partial(_short, clips=60, talkers=1, noisy=False)),
    "separate-clean2": ("test", partial(_short, clips=150, talkers=2, noisy=False)),
    "separate-clean3": ("test", partial(_short, clips=100, talkers=3, noisy=False)),
    "separate-noisy2": ("test", partial(_short, clips=150, talkers=2, noisy=True)),
    "separate-long2": ("test", _long),
    "separate-conversation": ("test", lambda material, rng: draw_conversations(material, 180.0, rng)),
}
"""Name of each set to its split and how it is drawn."""


def draw_sets(corpus: str | Path, only: Iterable[str] = (), seed: int = 5) -> dict[str, list[TalkersSpec]]:
    """The sets by name; all, or ``only`` those named. Each is the same for the same corpus and seed.

    Raises:
        ValueError: a set is unknown.
    """
    return draw_each(SETS, corpus, only, seed)


def draw_each(
    sets: Mapping[str, tuple[str, Draw[Spec]]],
    corpus: str | Path,
    only: Iterable[str],
    seed: int,
) -> dict[str, list[Spec]]:
    """Those of ``sets`` that ``only`` names, or all, each with a generator of its own."""
    chosen = list(only) or list(sets)
    if unknown := sorted(set(chosen) - set(sets)):
        raise ValueError(f"only: {unknown[0]!r} is no set; known are {', '.join(sets)}")
    material = {split: Material.from_corpus(corpus, split) for split in {sets[name][0] for name in chosen}}
    drawn = {}
    for name in chosen:
        split, draw = sets[name]
        drawn[name] = draw(material[split], np.random.default_rng([seed, list(sets).index(name)]))
    return drawn
