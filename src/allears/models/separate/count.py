"""How many talkers there are, in which order they speak, and when: read off the outputs of the network.

Shapes: J outputs of the network, n samples.
"""

from dataclasses import dataclass

import numpy as np

from allears.audio.activity import Activity, PowerMeter, Span
from allears.audio.level import FLOOR_DB
from allears.models.separate.chunks import ChunkedSeparator

COUNT_DB = -20.0
"""An output this far below the loudest talker is no talker; weights may bring their own, as ``count_db``."""
_BELOW_MIXTURE_DB = -30.0
_LEAST_ACTIVE_S = 0.3


@dataclass(frozen=True)
class Talkers:
    """What the outputs hold.

    Attributes:
        order: of the outputs: talkers by the time they first speak, then the outputs that count as none.
        count: how many of them are talkers.
        levels_db: of each one while it speaks, in dB of full scale, in this order; -200 for silence.
        spans: when each one speaks, (begin, end) in seconds, in this order.
    """

    order: tuple[int, ...]
    count: int
    levels_db: tuple[float, ...]
    spans: tuple[tuple[Span, ...], ...]


def count_talkers(
    outputs: list[Activity], mixture: Activity, count_db: float = COUNT_DB, wanted: int | None = None
) -> Talkers:
    """Tell talkers from outputs that only hold what leaked into them.

    An output is a talker if it is active for 0.3 s or more, and while active no more than ``count_db`` below the
    loudest output and 30 dB below the mixture.

    Args:
        outputs: J activities, seen beside each other.
        mixture: its activity.
        count_db: below 0.
        wanted: so many talkers there are: the loudest are taken.
    """
    levels = [activity.level_db for activity in outputs]
    least = max(max(levels) + count_db, mixture.level_db + _BELOW_MIXTURE_DB, FLOOR_DB + 1)
    found = {i for i, a in enumerate(outputs) if a.active_s >= _LEAST_ACTIVE_S - 1e-9 and a.level_db >= least}
    if wanted is not None:
        found = set(sorted(range(len(outputs)), key=lambda i: -levels[i])[:wanted])

    def turn(index: int) -> tuple[bool, float]:
        spans = outputs[index].spans
        return index not in found, spans[0][0] if spans else float("inf")

    order = tuple(sorted(range(len(outputs)), key=turn))
    return Talkers(
        order, len(found), tuple(levels[index] for index in order), tuple(outputs[index].spans for index in order)
    )


class MeteredSeparator:
    """A chunked separator that also measures what goes in and what comes out; memory grows by 5 MB an hour.

    Args:
        chunked: does the work.
        talkers: J.
        sample_rate_hz: the network's.
    """

    def __init__(self, chunked: ChunkedSeparator, talkers: int, sample_rate_hz: int) -> None:
        self._chunked = chunked
        self._mixture, self._outputs = PowerMeter(1, sample_rate_hz), PowerMeter(talkers, sample_rate_hz)

    def push(self, x: np.ndarray) -> np.ndarray:
        """x (1, n) to talkers (J, m)."""
        self._mixture.push(x)
        return self._measured(self._chunked.push(x))

    def flush(self) -> np.ndarray:
        return self._measured(self._chunked.flush())

    def talkers(self, count_db: float = COUNT_DB, wanted: int | None = None) -> Talkers:
        """What came out so far."""
        return count_talkers(self._outputs.activities(), self._mixture.activities()[0], count_db, wanted)

    def _measured(self, y: np.ndarray) -> np.ndarray:
        self._outputs.push(y)
        return y
