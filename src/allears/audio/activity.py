"""Who speaks when: the level of signals over time, in short blocks, and the stretches in which each one is active.

Shapes: J signals, n samples, N blocks of 20 ms; powers are mean squares, (J, N).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from allears.audio.level import FLOOR_DB

BLOCK_S = 0.02
GATE_DB = 25.0
"""A block is active down to so far below the signal's own loud second."""
LEAK_DB = 20.0
"""A block in which another signal is so much louder is taken as what leaked from there."""
GAP_S = 0.3
SHORTEST_S = 0.1
_LOUD_S = 1.0
_SILENT = 10 ** (FLOOR_DB / 10)

Span = tuple[float, float]
"""Begin and end in seconds."""


@dataclass(frozen=True)
class Activity:
    """When a signal is active, and how loud it is then.

    Attributes:
        level_db: RMS level over the active blocks; -200 where there is none.
        active_s: seconds of active blocks.
        spans: the active stretches; gaps of up to 0.3 s are closed, and those under 0.1 s left out.
    """

    level_db: float
    active_s: float
    spans: tuple[Span, ...]


class PowerMeter:
    """Mean power of every 20 ms of signals that come in chunks of any size; 1.2 MB an hour and signal.

    Args:
        signals: J.
        sample_rate_hz: of the samples.
    """

    def __init__(self, signals: int, sample_rate_hz: int) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.block = max(1, round(BLOCK_S * sample_rate_hz))
        self.block_s = self.block / sample_rate_hz
        self._rest = np.zeros((signals, 0), np.float32)
        self._powers: list[np.ndarray] = []

    def push(self, x: np.ndarray) -> None:
        """Samples (J, n), n >= 0."""
        x = np.concatenate([self._rest, x], axis=1)
        whole = x.shape[1] // self.block * self.block
        self._powers.append(block_powers(x[:, :whole], self.block))
        self._rest = x[:, whole:].copy()

    def powers(self) -> np.ndarray:
        """(J, N) of all samples so far; a block that has begun counts as one."""
        self._powers = [np.concatenate([self._rest[:, :0].astype(np.float64), *self._powers], axis=1)]
        if not self._rest.shape[1]:
            return self._powers[0]
        return np.concatenate([self._powers[0], block_powers(self._rest, self._rest.shape[1])], axis=1)

    def activities(self) -> list[Activity]:
        """One a signal, each seen beside the others."""
        powers = self.powers()
        length_s = (powers.shape[1] - bool(self._rest.shape[1])) * self.block_s
        return activities(powers, self.block_s, length_s + self._rest.shape[1] / self.sample_rate_hz)


def block_powers(x: np.ndarray, block: int) -> np.ndarray:
    """Samples (J, n) to powers (J, n // block), float64; what is left over at the end is left out."""
    count = x.shape[1] // block
    blocks = x[:, : count * block].reshape(len(x), count, block).astype(np.float64)
    return np.einsum("jnb,jnb->jn", blocks, blocks) / block


def loud_power(powers: np.ndarray, block_s: float = BLOCK_S) -> np.ndarray:
    """(J, N) to the mean power of each signal's loudest second, (J,): it does not depend on how much it pauses."""
    count = max(1, round(_LOUD_S / block_s))
    if powers.shape[1] > count:
        powers = np.partition(powers, -count, axis=1)[:, -count:]
    return powers.mean(axis=1) if powers.shape[1] else np.zeros(len(powers))


def activities(powers: np.ndarray, block_s: float = BLOCK_S, length_s: float = math.inf) -> list[Activity]:
    """Powers (J, N) of signals that sound together, such as separated talkers, to each one's activity.

    No span ends after ``length_s``, where the last block was not a whole one.
    """
    gate = np.maximum(loud_power(powers, block_s) * 10 ** (-GATE_DB / 10), _SILENT)
    leak = powers.max(axis=0, initial=0.0) * 10 ** (-LEAK_DB / 10)
    active = (powers >= gate[:, None]) & (powers >= leak)
    return [_activity(*pair, block_s, length_s) for pair in zip(powers, active, strict=True)]


def _activity(power: np.ndarray, active: np.ndarray, block_s: float, length_s: float) -> Activity:
    spans = [span for span in _runs(active, round(GAP_S / block_s)) if (span[1] - span[0]) * block_s >= SHORTEST_S]
    kept = np.zeros_like(active)
    for begin, end in spans:
        kept[begin:end] = active[begin:end]
    if not kept.any():
        return Activity(FLOOR_DB, 0.0, ())
    level_db = 10 * float(np.log10(power[kept].mean()))
    seconds = tuple((begin * block_s, min(end * block_s, length_s)) for begin, end in spans)
    return Activity(level_db, int(kept.sum()) * block_s, seconds)


def _runs(active: np.ndarray, gap: int) -> Sequence[tuple[int, int]]:
    """Begin and end of the runs of active blocks; pauses of up to ``gap`` blocks do not end a run."""
    at = np.flatnonzero(active)
    if not len(at):
        return []
    cuts = np.flatnonzero(np.diff(at) > gap + 1)
    begins = at[np.concatenate([[0], cuts + 1])]
    ends = at[np.concatenate([cuts, [len(at) - 1]])] + 1
    return [(int(b), int(e)) for b, e in zip(begins, ends, strict=True)]
