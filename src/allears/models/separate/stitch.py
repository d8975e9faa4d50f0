"""Keeps the talkers in order from window to window: which output of a window continues which talker.

Two windows hear the same overlap. Where a talker is audible in it, the outputs are matched as signals; where it is not,
by fingerprints against those of the windows before.

Shapes: J talkers (outputs of the network), n samples of the overlap, E size of a fingerprint.
"""

from itertools import permutations

import numpy as np

from allears.audio.activity import BLOCK_S, block_powers, loud_power

_AUDIBLE_DB = 20.0  # below the loudest talker: at this mean level in the overlap a talker counts half as audible
_HEARD_DB = 30.0  # below the loudest talker: blocks that count as heard
_LEAK_DB = 15.0  # below the loudest output at that moment: what counts as leaked from it, and not as heard
_HEARD_BLOCKS = 15  # so many of them, or the fingerprint says nothing
_PRINT_WEIGHT = 0.5
_LEAST_CONTRAST = 0.05
_FORGET = 0.8  # of the loudest power, a window: 1 dB


class _Mean:
    """A running mean; before anything came, a guess."""

    def __init__(self, guess: float) -> None:
        self._sum, self._count, self._guess = 0.0, 0, guess

    def add(self, values: np.ndarray) -> None:
        self._sum, self._count = self._sum + float(values.sum()), self._count + values.size

    @property
    def value(self) -> float:
        return self._sum / self._count if self._count else self._guess


class Stitcher:
    """Finds the order of each window's outputs. One for each signal.

    Of all J! assignments of outputs to talkers the best sum of scores is taken. The score of talker i and output j is

        <a_i, b_j> / E  +  (1 - u_i) (1 - v_j) f_ij / 2

    a and b are the overlap in the window before (in order) and in this one; E is the mean of their energies, but no
    less than that of an overlap in which everybody is hardly audible. So the first term is the correlation weighted by
    energy: the assignment that maximises it leaves the least squared difference. u and v, from 0 to 1, tell how audible
    talker and output are in the overlap: the fingerprints decide among those that are silent there. f is the cosine of
    the output's fingerprint with the talker's running mean, less the middle of what the same and different talkers have
    had so far, over their distance; it is 0, for neither, where talker or output has not been heard long enough. So a
    talker who speaks for the first time goes to an output that nobody had.

    Args:
        talkers: J.
        sample_rate_hz: of the outputs.
    """

    def __init__(self, talkers: int, sample_rate_hz: int) -> None:
        self._block = max(1, round(BLOCK_S * sample_rate_hz))
        self._orders = np.array(list(permutations(range(talkers))))
        self._prints: np.ndarray | None = None  # (J, E): unit fingerprints, weighted by the blocks heard, summed
        self._heard = np.zeros(talkers)  # blocks
        self._same, self._different = _Mean(1.0), _Mean(0.0)
        self._loud = 0.0  # power

    def order(self, before: np.ndarray | None, outputs: np.ndarray, prints: np.ndarray) -> np.ndarray:
        """The order (J,) that brings a window's outputs into that of the talkers: ``outputs[order]``.

        Args:
            before: what the window before gave for the overlap, in order, (J, n); ``None`` for the first window.
            outputs: of this window; its first n samples are the overlap.
            prints: (J, E) of this window.
        """
        powers = block_powers(outputs, min(self._block, outputs.shape[1]))
        self._loud = max(_FORGET * self._loud, float(loud_power(powers).max()))
        leak = powers.max(axis=0) * 10 ** (-_LEAK_DB / 10)
        heard = ((powers > self._loud * 10 ** (-_HEARD_DB / 10)) & (powers > leak)).sum(axis=1)
        heard[heard < _HEARD_BLOCKS] = 0
        prints = prints / np.maximum(np.linalg.norm(prints, axis=1, keepdims=True), 1e-12)
        if self._prints is None:
            self._prints = np.zeros_like(prints)
        audible = np.zeros(len(outputs)), np.zeros(len(outputs))
        order = self._orders[0]
        if before is not None:
            score, audible = self._by_ear(before, outputs[:, : before.shape[1]])
            score = score + _PRINT_WEIGHT * np.outer(1 - audible[0], 1 - audible[1]) * self._by_print(prints, heard)
            sums = score[np.arange(len(score)), self._orders].sum(axis=1)
            order = self._orders[int(np.argmax(sums > sums.max() - 1e-9))]  # of equals the first: things stay
        self._learn(prints[order], heard[order], np.minimum(audible[0], audible[1][order]) > 0.5)
        return order

    def _by_ear(self, before: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """The first term of the score (J, J), and how audible the talkers (J,) and the outputs (J,) are."""
        before, now = before.astype(np.float64), now.astype(np.float64)
        energies = [np.square(x).sum(axis=1) for x in (before, now)]
        faint = max(before.shape[1] * self._loud * 10 ** (-_AUDIBLE_DB / 10), 1e-30)
        score = before @ now.T / max(0.5 * (energies[0].sum() + energies[1].sum()), faint)
        return score, (energies[0] / (energies[0] + faint), energies[1] / (energies[1] + faint))

    def _by_print(self, prints: np.ndarray, heard: np.ndarray) -> np.ndarray:
        """f (J, J), in [-1, 1]."""
        assert self._prints is not None
        mean = self._prints / np.maximum(np.linalg.norm(self._prints, axis=1, keepdims=True), 1e-12)
        same, different = self._same.value, self._different.value
        likeness = (mean @ prints.T - 0.5 * (same + different)) / max(same - different, _LEAST_CONTRAST)
        return np.where(np.outer(self._heard > 0, heard > 0), np.clip(likeness, -1, 1), 0)

    def _learn(self, prints: np.ndarray, heard: np.ndarray, matched: np.ndarray) -> None:
        """Take a window's fingerprints, in order, into the means; ``matched`` talkers (J,) were so by ear."""
        assert self._prints is not None
        known = matched & (heard > 0) & (self._heard > 0)
        mean = self._prints / np.maximum(np.linalg.norm(self._prints, axis=1, keepdims=True), 1e-12)
        self._same.add((mean * prints).sum(axis=1)[known])
        first, second = np.triu_indices(int((heard > 0).sum()), 1)
        self._different.add((prints @ prints.T)[np.ix_(heard > 0, heard > 0)][first, second])
        self._prints = self._prints + prints * heard[:, None]
        self._heard += heard
