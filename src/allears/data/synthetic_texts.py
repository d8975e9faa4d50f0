"""What synthetic voices say: endless sentences in a few languages, drawn from a seed.

The sense does not matter, the sounds do: words of the language, small words between them, and made words.
"""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np

from allears.core.errors import CorpusError

T = TypeVar("T")

SHORTEST, LONGEST = 4, 14
"""Words of a sentence."""

_ENDS = (*7 * ".", "?", "?", "!")
_SYLLABLES = (1, 1, 1, 2, 2, 2, 2, 2, 3, 3)


@dataclass(frozen=True)
class Language:
    """``small``: words that come up all the time. ``made``: share of made words; ``onsets``, ``vowels`` and ``codas``
    are what they are made of."""

    small: tuple[str, ...]
    words: tuple[str, ...]
    made: float
    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]


@cache
def known_languages() -> dict[str, Language]:
    """The languages that ship with allears, by their code."""
    table = tomllib.loads((files("allears.data") / "synthetic_languages.toml").read_text(encoding="utf-8"))

    def language(row: dict[str, Any]) -> Language:
        rest: dict[str, Any] = {key: value if key == "made" else tuple(value.split()) for key, value in row.items()}
        return Language(**rest)

    return {code: language(row) for code, row in table.items()}


def sentences(code: str, seed: str) -> Iterator[str]:
    """Sentences of 4 to 14 words without end; the same from the same ``code`` and ``seed``.

    Raises:
        CorpusError: no such language.
    """
    if code not in known_languages():
        raise CorpusError(f"language {code!r}: wanted one of {', '.join(sorted(known_languages()))}")
    return _sentences(known_languages()[code], np.random.default_rng(list(f"{code}/{seed}".encode())))


def _sentences(language: Language, rng: np.random.Generator) -> Iterator[str]:
    deck: list[str] = []
    while True:
        said: list[str] = []
        after_small, since_comma = False, 0
        count = int(rng.integers(SHORTEST, LONGEST + 1))
        while len(said) < count:
            last = len(said) == count - 1
            if not after_small and not last and rng.random() < 0.4:
                said.append(_one_of(language.small, rng))
                after_small = True
            elif rng.random() < language.made:
                said.append(_made_word(language, rng))
                after_small = False
            else:
                deck = deck or [language.words[i] for i in rng.permutation(len(language.words))]  # each, then any again
                said.append(deck.pop())
                after_small = False
            since_comma += 1
            if since_comma >= 4 and not after_small and len(said) < count - 1 and rng.random() < 0.3:
                said[-1] += ","
                since_comma = 0
        yield " ".join(said) + _one_of(_ENDS, rng)


def _made_word(language: Language, rng: np.random.Generator) -> str:
    pairs = [_one_of(language.onsets, rng) + _one_of(language.vowels, rng) for _ in range(_one_of(_SYLLABLES, rng))]
    return "".join(pairs) + _one_of(language.codas, rng)


def _one_of(choices: Sequence[T], rng: np.random.Generator) -> T:
    return choices[int(rng.integers(len(choices)))]
