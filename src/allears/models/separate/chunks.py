"""Separation of a signal of any length in bounded memory: overlapping windows, put in order and joined by cross-fades.

Where the windows lie follows from the absolute position in the signal: the output does not depend on how the signal was
cut on its way in.

Shapes: J talkers, n and m samples, W samples of a window, E size of a fingerprint.
"""

from collections.abc import Callable

import numpy as np

from allears.models.separate.stitch import Stitcher

OVERLAP_S = 5.0
FADE_S = 2.0
SHORTEST_WINDOW_S = 2 * OVERLAP_S

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A window (W,) to its outputs (J, W) and their fingerprints (J, E)."""


class ChunkedSeparator:
    """Push samples in, get the talkers out, some seconds later; ``flush`` gives the rest.

    A signal that fits one window is one pass. The cross-fade lies in the middle of the overlap, so that each window is
    cut off where it has heard some seconds more.

    Args:
        run: separates one window.
        talkers: J.
        sample_rate_hz: of the signal, which is the network's.
        window_s: length of a window; at least 10 s.
    """

    def __init__(self, run: Run, talkers: int, sample_rate_hz: int, window_s: float) -> None:
        if not window_s >= SHORTEST_WINDOW_S:
            raise ValueError(f"one_pass_s: {window_s:g} given; at least {SHORTEST_WINDOW_S:g} s are needed")
        self._run, self._talkers = run, talkers
        overlap, fade = round(OVERLAP_S * sample_rate_hz), round(FADE_S * sample_rate_hz)
        self._window = round(min(window_s, 1e6) * sample_rate_hz)
        self._shift = self._window - overlap
        self._guard = (overlap - fade) // 2
        self._fade_in = np.sin(0.5 * np.pi * (np.arange(fade, dtype=np.float32) + 0.5) / fade) ** 2
        self._stitcher = Stitcher(talkers, sample_rate_hz)
        self._waiting: list[np.ndarray] = []
        self._count = 0  # of the waiting samples
        self._tail: np.ndarray | None = None  # (J, overlap): what the last window gave for the next one's start

    def push(self, x: np.ndarray) -> np.ndarray:
        """x (1, n) to talkers (J, m); m is 0 until a window is full."""
        self._waiting.append(np.array(x[0], np.float32))
        self._count += x.shape[1]
        done = [np.zeros((self._talkers, 0), np.float32)]
        while self._count > self._window:
            done.append(self._advance(last=False))
        return np.concatenate(done, axis=1)

    def flush(self) -> np.ndarray:
        """The rest of the signal; all pushes together give exactly as many samples as went in."""
        if not self._count:
            return np.zeros((self._talkers, 0), np.float32)
        done = self._advance(last=True)
        self._waiting, self._count, self._tail = [], 0, None
        return done

    def _advance(self, last: bool) -> np.ndarray:
        """Separate the window at the front, drop what it finishes from the waiting samples and give it, (J, m)."""
        waiting = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        window = waiting[: self._window]
        out = self._separated(window)
        begin = 0
        if self._tail is not None:
            begin = self._guard
            span = slice(begin, begin + len(self._fade_in))
            out[:, span] = self._tail[:, span] * (1 - self._fade_in) + out[:, span] * self._fade_in
        if last:
            return out[:, begin:]
        self._waiting = [waiting[self._shift :]]
        self._count = len(self._waiting[0])
        self._tail = out[:, self._shift :].copy()
        return out[:, begin : self._shift + self._guard]

    def _separated(self, window: np.ndarray) -> np.ndarray:
        """The talkers of a window, in order, (J, W)."""
        if not np.abs(window).max() > 1e-9:  # digital silence stays silence, and teaches nothing
            return np.zeros((self._talkers, len(window)), np.float32)
        outputs, prints = self._run(window)
        return outputs[self._stitcher.order(self._tail, outputs, prints)]
