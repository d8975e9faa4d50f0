"""The small world in words: captions of a spec, words to numbers, and the spec that a text asks for.

The grammar is a table of phrases. A caption picks among the phrases of a meaning; the parser takes the longest phrase
at each place, so that all captions, and whatever a user builds of the same phrases, are read back.
"""

import difflib
import re
from dataclasses import dataclass, field

import numpy as np

from allears.data.world import BACKGROUNDS, COLOURS, MOST_THINGS, Thing, WorldSpec

PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "article": {"": ("a", "an", "the")},
    "size": {"small": ("small", "little", "tiny"), "medium": ("medium",), "big": ("big", "large", "huge")},
    "colour": {colour: (colour,) for colour in COLOURS},
    "shape": {
        "ball": ("ball", "circle"),
        "box": ("box", "square"),
        "triangle": ("triangle",),
        "star": ("star",),
    },
    "motion": {
        "rolls left": ("rolls left", "rolls to the left", "moves left"),
        "rolls right": ("rolls right", "rolls to the right", "moves right"),
        "falls": ("falls", "falls down", "drops"),
        "rises": ("rises", "floats up", "goes up"),
        "bounces": ("bounces", "hops", "bounces up and down"),
        "spins": ("spins", "rotates", "spins around"),
        "stays": ("stays", "rests", "stands still"),
    },
    "relation": {
        "and": ("and",),
        "beside": ("beside", "next to"),
        "behind": ("behind",),
        "in front of": ("in front of", "before"),
    },
    "camera": {
        "still": ("the camera is still", "the camera stays still"),
        "pans left": ("the camera pans left", "the camera pans to the left", "the camera moves left"),
        "pans right": ("the camera pans right", "the camera pans to the right", "the camera moves right"),
        "zooms in": ("the camera zooms in", "the camera comes closer"),
        "zooms out": ("the camera zooms out", "the camera goes away"),
    },
    "background": {
        "room": ("in a room", "in a gray room", "indoors"),
        "night": ("at night", "in the dark"),
        "beach": ("on a beach", "on the sand", "at the beach"),
        "day": ("by day", "outside by day", "under the sky"),
    },
    "joint": {"": ("while", "as", ",", ".")},
}
"""kind -> meaning -> its phrases; the first one is the plainest."""

_TABLE = {
    tuple(re.findall(r"\w+|[,.]", phrase)): (kind, meaning)
    for kind, meanings in PHRASES.items()
    for meaning, phrases in meanings.items()
    for phrase in phrases
}
_LONGEST = max(map(len, _TABLE))
PAD = "<pad>"
WORDS: tuple[str, ...] = (PAD, *sorted({word for phrase in _TABLE for word in phrase}))
"""The vocabulary; a word's number is its place. Number 0 fills short captions up."""
CAPTION_WORDS = 32
"""Longest caption in words."""


def caption(spec: WorldSpec, rng: np.random.Generator | None = None) -> str:
    """A spec in words; with ``rng`` one of many ways to say it, else the plainest.

    With ``rng`` the background is left out of three captions in ten, and of a still camera there is mostly no word.
    """

    def say(kind: str, meaning: str) -> str:
        phrases = PHRASES[kind][meaning]
        return phrases[0] if rng is None else phrases[rng.integers(len(phrases))]

    def chance(probability: float, plain: bool) -> bool:
        return plain if rng is None else rng.random() < probability

    def name(thing: Thing) -> str:
        size = "" if thing.size == "medium" and not chance(0.2, False) else say("size", thing.size) + " "
        words = f"{size}{thing.colour} {say('shape', thing.shape)}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    first = spec.things[0]
    quiet = first.motion == "stays" and chance(0.3, False)
    text = name(first) if quiet else f"{name(first)} {say('motion', first.motion)}"
    if spec.relation is not None:
        second = spec.things[1]
        text += f" {say('relation', spec.relation)} {name(second)}"
        if spec.relation == "and" and not (second.motion == "stays" and chance(0.3, False)):
            text += f" {say('motion', second.motion)}"
    if spec.background is not None and chance(0.7, True):
        place = say("background", spec.background)
        text = f"{place} {text}" if chance(0.25, False) else f"{text} {place}"
    if spec.camera != "still" or chance(0.15, False):
        joint = " while " if rng is None else (" while ", " as ", ", ")[rng.integers(3)]
        text += joint + say("camera", spec.camera)
    return text


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, commas and full stops among them.

    Raises:
        ValueError: a word is unknown, there is none, or more than 32.
    """
    words = re.findall(r"[\w'-]+|[^\w\s]", text.lower())
    if not words:
        raise ValueError("text: empty; say what is to be seen, such as 'a red ball rolls left behind a blue box'")
    for word in words:
        if word not in WORDS:
            near = difflib.get_close_matches(word, WORDS[1:], n=1, cutoff=0.7)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join(w for w in WORDS[1:] if w.isalpha())
            raise ValueError(f"text: the word {word!r} is unknown; {hint}known are {known}")
    if len(words) > CAPTION_WORDS:
        raise ValueError(f"text: {len(words)} words given; {CAPTION_WORDS} are the most")
    return words


def encode(text: str, words: tuple[str, ...] = WORDS, length: int = CAPTION_WORDS) -> list[int]:
    """Numbers of the words in ``words``, filled up with 0 to ``length``; an empty text gives zeros alone.

    Raises:
        ValueError: a word is not among ``words``, or there are more than ``length``.
    """
    found = split_words(text) if text else []
    if missing := [word for word in found if word not in words]:
        raise ValueError(f"text: this model does not know the word {missing[0]!r}; say it otherwise")
    if len(found) > length:
        raise ValueError(f"text: {len(found)} words given; this model takes {length}")
    numbers = {word: index for index, word in enumerate(words)}
    return [numbers[word] for word in found] + [0] * (length - len(found))


@dataclass
class _Draft:
    """A thing while it is read."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    motion: str | None = None

    def finish(self) -> Thing:
        if self.colour is None:
            raise ValueError(f"text: the {self.shape} has no colour; say one of {', '.join(COLOURS)}")
        return Thing(str(self.shape), self.colour, self.size or "medium", self.motion or "stays")


@dataclass
class _Reader:
    things: list[_Draft] = field(default_factory=list)
    open: _Draft | None = None
    relation: str | None = None
    camera: str | None = None
    background: str | None = None

    def take(self, kind: str, meaning: str) -> None:
        if kind in ("size", "colour", "shape"):
            self._describe(kind, meaning)
        elif self.open is not None and kind != "article":
            said = self.open.colour or self.open.size
            raise ValueError(f"text: {said!r} is followed by no thing; name a {', a '.join(PHRASES['shape'])}")
        elif kind == "motion":
            self._move(meaning)
        elif kind == "relation":
            if not self.things:
                raise ValueError(f"text: {meaning!r} stands before any thing; name the first thing, then {meaning!r}")
            if meaning != "and" or self.relation is None:
                self.relation = self._once("relation", self.relation if self.relation != "and" else None, meaning)
        elif kind in ("camera", "background"):
            setattr(self, kind, self._once(kind, getattr(self, kind), meaning))

    def _describe(self, kind: str, meaning: str) -> None:
        draft = self.open = self.open or _Draft()
        if kind == "size" and draft.colour is not None:
            raise ValueError(f"text: {meaning!r} stands after the colour; say it before, as in 'a small red ball'")
        setattr(draft, kind, self._once(kind, getattr(draft, kind), meaning))
        if kind == "shape":
            if len(self.things) == MOST_THINGS:
                raise ValueError(f"text: a third thing, the {meaning}; this world holds {MOST_THINGS} at most")
            if self.things and self.relation is None:
                joins = ", ".join(repr(phrases[0]) for phrases in PHRASES["relation"].values())
                raise ValueError(
                    f"text: nothing joins the {self.things[0].shape} and the {meaning}; say one of {joins}"
                )
            self.things.append(draft)
            self.open = None

    def _move(self, meaning: str) -> None:
        if not self.things:
            raise ValueError(f"text: {meaning!r} stands before any thing; name the thing first")
        self.things[-1].motion = self._once("motion", self.things[-1].motion, meaning)

    @staticmethod
    def _once(kind: str, before: str | None, meaning: str) -> str:
        if before is not None:
            raise ValueError(f"text: two of a kind, {before!r} and {meaning!r} ({kind}); leave one out")
        return meaning


def parse(text: str, seed: int = 0) -> WorldSpec:
    """The spec that a text asks for; what it does not say is medium, stays, and is seen by a still camera.

    Raises:
        ValueError: a word is unknown, words do not make a phrase, a thing lacks its colour, or this world has no such
            scene; the message says what to write instead.
    """
    words, reader, at = split_words(text), _Reader(), 0
    while at < len(words):
        for size in range(min(_LONGEST, len(words) - at), 0, -1):
            if (found := _TABLE.get(tuple(words[at : at + size]))) is not None:
                reader.take(*found)
                at += size
                break
        else:
            known = [" ".join(phrase) for phrase in _TABLE if words[at] in phrase and len(phrase) > 1]
            said = " ".join(words[at : at + 3])
            raise ValueError(f"text: {said!r} makes no phrase here; {words[at]!r} is known from {known[0]!r}")
    if reader.open is not None or not reader.things:
        raise ValueError(f"text: no thing is named at the end; name a {', a '.join(PHRASES['shape'])}")
    if reader.relation is not None and len(reader.things) == 1:
        if reader.relation != "and":
            raise ValueError(f"text: nothing follows {reader.relation!r}; name the second thing")
        reader.relation = None
    things = tuple(draft.finish() for draft in reader.things)
    assert reader.background is None or reader.background in BACKGROUNDS
    return WorldSpec(things, reader.relation, reader.camera or "still", reader.background, seed)
