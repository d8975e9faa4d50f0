"""What a run over files gives beside the file: figures, what the network found, and what a user should know.

Shapes: T frames, N columns of time, D delays.
"""

from dataclasses import dataclass

import numpy as np

from allears.models.echo.stream import Facts


@dataclass(frozen=True, eq=False)
class DelayMap:
    """Attention over the delays, the mean in columns of time: ``weights`` (N, D), each column ``column_s`` long, and
    the delays multiples of ``delay_ms``."""

    weights: np.ndarray
    column_s: float
    delay_ms: float


@dataclass(frozen=True, eq=False)
class EchoResult:
    """What ``EchoCanceller.process_file`` did.

    Attributes:
        duration_s, elapsed_s: length of the microphone's file, and time taken.
        sample_rate_hz, channels, frames: of what was written.
        facts: of the first microphone, (1, T) each; without ``alignment``.
        hop_s: from frame to frame; frame k lies at k times that.
        alignment: of the first microphone, in at most 4,096 columns; ``None`` where the network does not align.
        notes: what a user should know about the two files, in sentences.
    """

    duration_s: float
    elapsed_s: float
    sample_rate_hz: int
    channels: int
    frames: int
    facts: Facts
    hop_s: float
    alignment: DelayMap | None = None
    notes: tuple[str, ...] = ()

    @property
    def rtf(self) -> float:
        """Real-time factor: processing time over duration."""
        return self.elapsed_s / self.duration_s if self.duration_s else 0.0


_KEPT = ("delay_ms", "confidence", "voice")


class _Row:
    """Numbers that come piece by piece, in one array that doubles: thousands of small ones would scatter the heap."""

    def __init__(self) -> None:
        self._all, self._count, self._any = np.empty(4096, np.float32), 0, False

    def push(self, piece: np.ndarray | None) -> None:
        """The first of (M, T), or nothing."""
        if piece is None:
            return
        end, self._any = self._count + piece.shape[1], True
        while end > len(self._all):
            self._all = np.concatenate([self._all, np.empty_like(self._all)])
        self._all[self._count : end] = piece[0]
        self._count = end

    def values(self) -> np.ndarray | None:
        """(1, T); ``None`` where nothing came."""
        return self._all[None, : self._count].copy() if self._any else None


class Kept:
    """What is kept of the facts of a run: those of the first microphone, and its alignment in columns of time.

    Memory: 1.2 kB a second, and at most ``most`` columns, which grow longer by halves as they fill.
    """

    def __init__(self, hop_s: float, most: int = 4096) -> None:
        self._hop_s, self._most, self._each = hop_s, most, 1
        self._rows = {name: _Row() for name in _KEPT}
        self._columns: np.ndarray | None = None  # (N, D)
        self._rest: np.ndarray | None = None  # frames of a column that is not full, (T, D)

    def push(self, facts: Facts) -> None:
        """The next facts, of any number of frames; for ``on_facts``."""
        for name, row in self._rows.items():
            row.push(getattr(facts, name))
        if facts.alignment is None:
            return
        rows = facts.alignment[0]
        rows = rows.copy() if self._rest is None else np.concatenate([self._rest, rows])
        whole = len(rows) // self._each * self._each
        full, self._rest = _means(rows[:whole], self._each), rows[whole:].copy()
        columns = full if self._columns is None else np.concatenate([self._columns, full])
        while len(columns) > self._most:
            even = len(columns) // 2 * 2
            self._rest = np.concatenate([np.repeat(columns[even:], self._each, axis=0), self._rest])
            columns, self._each = _means(columns[:even], 2), 2 * self._each
        self._columns = columns

    def facts(self) -> Facts:
        """All frames of the first microphone."""
        return Facts(**{name: row.values() for name, row in self._rows.items()})

    def alignment(self) -> DelayMap | None:
        """The columns; a last one that is not full counts as one."""
        if self._columns is None or self._rest is None:
            return None
        last = self._rest.mean(0, keepdims=True) if len(self._rest) else self._rest
        weights = np.concatenate([self._columns, last])
        return DelayMap(weights, self._each * self._hop_s, 1000 * self._hop_s)


def _means(rows: np.ndarray, each: int) -> np.ndarray:
    return rows.reshape(-1, each, rows.shape[1]).mean(1)
