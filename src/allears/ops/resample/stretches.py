"""What is laid where: stretches of recordings that lie one after another in one flat signal.

Shapes: S stretches, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLUMNS = 8
"""Numbers of a stretch in :attr:`Stretches.table`: first, last, begin, length, row, at, speed, gain."""


@dataclass(frozen=True)
class Stretches:
    """Stretches in the order in which they are added up.

    Args:
        table: (S, 8), float64, which holds all of them exactly, each row as :meth:`of` takes it.
    """

    table: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, int, int, int, int, float, float]]) -> "Stretches":
        """Out of one tuple a stretch.

        Args:
            entries: (first, last, begin, length, row, at, speed, gain): the recording is ``flat[first:last]``, with
                silence around it; sample n of the stretch, n < length, is read at ``begin + n * speed`` of ``flat``,
                and added to sample ``at + n`` of ``row``, times ``gain``. Speed and gain are rounded to float32.
        """
        table = np.array(entries, dtype=np.float64).reshape(-1, COLUMNS)
        table[:, 6:] = table[:, 6:].astype(np.float32)
        return cls(table)

    def check(self, rows: int, frames: int) -> None:
        """Raises:
        ValueError: a stretch reaches beyond its row, or the row is none.
        """
        length, row, at, speed = self.table[:, 3], self.table[:, 4], self.table[:, 5], self.table[:, 6]
        outside = (row < 0) | (row >= rows) | (at < 0) | (length < 1) | (at + length > frames) | ~(speed > 0)
        if outside.any():
            worst = self.table[int(outside.argmax())]
            raise ValueError(
                f"stretches: one of {worst[3]:.0f} samples at {worst[5]:.0f} of row {worst[4]:.0f}, at speed "
                f"{worst[6]:g}, given; wanted 1 sample or more, within {rows} rows of {frames}, and a speed above 0"
            )

    def by_row(self, rows: int) -> np.ndarray:
        """As one array (R + 1 + 8 S,): where each row's stretches begin, then the table with the rows in order."""
        order = np.argsort(self.table[:, 4], kind="stable")
        table = self.table[order]
        bounds = np.searchsorted(table[:, 4], np.arange(rows + 1))
        return np.concatenate([bounds.astype(np.float64), table.ravel()])
