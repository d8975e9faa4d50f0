"""Who talks in a clip of several talkers, and how fast."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from allears.audio.pitch import pitch_hz
from allears.data.bank import SAMPLE_RATE_HZ, AudioBank

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
        pitch_hz: of each speaker (:func:`pitches_hz`), NaN where unknown; for :meth:`level`.
    """

    speech: AudioBank
    items: list[np.ndarray]
    weight: np.ndarray
    rng: np.random.Generator
    pitch_hz: np.ndarray | None = None

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

    def level(
        self, count: int, one_band: bool, span: tuple[float, float], speed: Callable[[], float], within: float = 0.06
    ) -> list[Voice]:
        """Distinct speakers of about one pitch: the first as drawn, each other one at a speed that brings her pitch to
        within so much of his. Speakers who cannot be brought there are not chosen; where that leaves too few, as
        :meth:`distinct`.

        Args:
            count: how many.
            one_band: all full band, or all narrow-band.
            span: speeds.
            speed: draws the speed of the first voice, and of all where there are too few.
            within: largest difference in pitch, as a share.
        """
        if self.pitch_hz is None:
            raise ValueError("pitch_hz: None given; level() wants the pitch of each speaker, see pitches_hz")
        first = self.rng.choice(len(self.weight), size=1, p=self.weight)
        rate = speed()
        needed = self.pitch_hz[first[0]] * rate / self.pitch_hz
        near = (needed > span[0] * (1 - within)) & (needed < span[1] * (1 + within))  # NaN is not
        if one_band:
            near &= self._narrow == self._narrow[first[0]]
        chosen = self._with_others(first, near, count)
        if len(chosen) < count:
            return self.distinct(count, one_band, speed)
        rates = np.clip(needed[chosen] * self.rng.uniform(1 - within, 1 + within, count), *span)
        rates[0] = rate
        return [(self.items[who], round(float(one), 3)) for who, one in zip(chosen, rates, strict=True)]

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


def pitches_hz(speech: AudioBank, items: list[np.ndarray], heard: int = 12, longest_s: float = 6.0) -> np.ndarray:
    """Median pitch of each speaker, NaN where nothing is voiced.

    Args:
        speech: clean talkers.
        items: of each speaker, positions in ``speech``.
        heard: at most about so many items of a speaker, spread evenly.
        longest_s: of an item.
    """
    medians = []
    for found in items:
        some = found[:: max(1, len(found) // heard)]
        frames = [
            pitch_hz(speech.crop(int(index))[: int(longest_s * SAMPLE_RATE_HZ)], SAMPLE_RATE_HZ) for index in some
        ]
        voiced = np.concatenate(frames)
        voiced = voiced[np.isfinite(voiced)]
        medians.append(float(np.median(voiced)) if len(voiced) else np.nan)
    return np.array(medians)
