"""Who talks in a clip of several talkers, and how fast."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from allears.data.bank import AudioBank

Voice = tuple[np.ndarray, float]
"""Positions of a speaker's items in the bank, and the speed at which they are played."""


@dataclass
class Cast:
    """Chooses the voices of clips. The same ``rng`` state gives the same choices.

    Args:
        speech: clean talkers.
        items: of each speaker, positions in ``speech``.
        weight: of each speaker, adding up to 1.
        rng: source of all choices.
    """

    speech: AudioBank
    items: list[np.ndarray]
    weight: np.ndarray
    rng: np.random.Generator

    def __post_init__(self) -> None:
        first = [self.speech.items[found[0]] for found in self.items]
        self._packages = np.unique([item.package for item in first], return_inverse=True)[1]
        self._narrow = np.array([item.narrow_band for item in first])

    def distinct(self, count: int, one_band: bool, speed: Callable[[], float]) -> list[Voice]:
        """Distinct speakers.

        Args:
            count: how many; fewer with ``one_band``, where there are no more.
            one_band: all full band, or all narrow-band.
            speed: draws the speed of a voice.
        """
        chosen = self.rng.choice(len(self.weight), size=count, replace=False, p=self.weight)
        if one_band:
            chosen = self._with_others(chosen[:1], self._narrow == self._narrow[chosen[0]], count)
        return [(self.items[who], speed()) for who in chosen]

    def alike(self, count: int, span: tuple[float, float], apart: float, speed: Callable[[], float]) -> list[Voice]:
        """Voices that were recorded alike: speakers of one package, or, where it has too few, speakers who are heard
        again at another speed, which shifts pitch and formants as a shorter or longer throat would.

        Args:
            count: how many.
            span: speeds where a speaker is heard again; each voice gets a part of it, in logarithms.
            apart: share of the span that is left free between two parts, in logarithms; with ``count`` - 1 of them
                below 1.
            speed: draws the speed of a voice where all are distinct speakers.
        """
        first = self.rng.choice(len(self.weight), size=1, p=self.weight)
        chosen = self._with_others(first, self._packages == self._packages[first[0]], count)
        if len(chosen) == count:
            return [(self.items[who], speed()) for who in chosen]
        low, high = np.log(span)
        gap = apart * (high - low)
        width = (high - low - gap * (count - 1)) / count
        starts = low + (width + gap) * self.rng.permutation(count)
        return [
            (self.items[chosen[place % len(chosen)]], round(float(np.exp(start + width * self.rng.random())), 3))
            for place, start in enumerate(starts)
        ]

    def _with_others(self, first: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
        """``first`` (1,) and other speakers of those marked in ``among``, up to ``count`` in all, or as many as there
        are."""
        others = np.flatnonzero(among)
        others = others[others != first[0]]
        more = min(count - 1, len(others))
        if not more:
            return first
        share = self.weight[others] / self.weight[others].sum()
        return np.concatenate([first, self.rng.choice(others, size=more, replace=False, p=share)])
