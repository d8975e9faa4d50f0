"""Enhancement of a signal of any length in bounded memory: overlapping windows, joined by cross-fades.

Where the windows lie, and the noise that each one starts from, follow from the absolute position in the signal: the
output does not
depend on how the signal was cut on its way in.

Shapes: C channels, n samples, B windows, T frames, F bins.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from allears.models.enhance.config import EnhanceConfig

WINDOW_S = 6.0
SHIFT_S = 5.0
GUARD_S = 0.25
_BLOCK = 125

Run = Callable[[Tensor, Tensor], Tensor]
"""(windows (B, n), noise (B, T, F, 2)) to enhanced windows (B, n)."""


def prior_noise(config: EnhanceConfig, first_frame: int, frames: int, seed: int) -> Tensor:
    """z (T, F, 2) of a stretch of the signal; made in blocks seeded by their place, so that overlapping stretches
    agree. All channels start from the same noise, which keeps what differs between them.
    """
    bins = config.n_fft // 2 + 1
    blocks = []
    for block in range(first_frame // _BLOCK, (first_frame + frames - 1) // _BLOCK + 1):
        rng = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 0, block]).generate_state(1)[0]))
        blocks.append(torch.randn(_BLOCK, bins, 2, generator=rng))
    offset = first_frame % _BLOCK
    return torch.cat(blocks)[offset : offset + frames]


class ChunkedEnhancer:
    """Push samples in, get enhanced samples out, some seconds later; ``flush`` gives the rest.

    Args:
        config: the model's configuration.
        channels: C; each channel is enhanced by itself.
        run: enhances a batch of windows.
        seed: of the prior's noise.
        batch: windows that are enhanced together.
    """

    def __init__(self, config: EnhanceConfig, channels: int, run: Run, seed: int = 0, batch: int = 1) -> None:
        rate = config.sample_rate_hz
        self._config, self._channels, self._run, self._seed, self._batch = config, channels, run, seed, batch
        self._shift = round(SHIFT_S * rate / config.hop) * config.hop
        self._window = self._shift + round((WINDOW_S - SHIFT_S) * rate)
        self._guard = round(GUARD_S * rate)
        overlap = self._window - self._shift - 2 * self._guard
        ramp = (np.arange(overlap, dtype=np.float32) + 0.5) / overlap
        self._fade_in = np.sin(0.5 * np.pi * ramp).astype(np.float32) ** 2
        self._waiting = np.zeros((channels, 0), dtype=np.float32)
        self._start = 0  # of the waiting samples, in the signal
        self._tail: np.ndarray | None = None  # (C, overlap): the last window's part of the next cross-fade

    def push(self, x: np.ndarray) -> np.ndarray:
        """x (C, n) to enhanced samples (C, m); m is 0 until a window is full."""
        self._waiting = np.concatenate([self._waiting, x], axis=1)
        need = self._window + (self._batch - 1) * self._shift
        done = [np.zeros((self._channels, 0), dtype=np.float32)]
        while self._waiting.shape[1] > need:
            done.append(self._advance(self._batch))
        return np.concatenate(done, axis=1)

    def flush(self) -> np.ndarray:
        """The rest of the signal; all pushes together give exactly as many samples as went in."""
        done = [np.zeros((self._channels, 0), dtype=np.float32)]
        while self._waiting.shape[1] > self._window:
            done.append(self._advance(1))
        if self._waiting.shape[1]:
            last = self._enhanced([self._waiting], self._start)[0]
            if self._tail is not None:
                last = self._joined(last)[:, self._guard :]
            done.append(last)
        self._waiting, self._tail = self._waiting[:, :0], None
        return np.concatenate(done, axis=1)

    def _enhanced(self, windows: list[np.ndarray], start: int) -> list[np.ndarray]:
        """Windows (C, n) that follow one another by a shift."""
        frames = -(-windows[0].shape[1] // self._config.hop) + 1
        out = [np.zeros_like(window) for window in windows]
        jobs = [(index, channel) for index in range(len(windows)) for channel in range(self._channels)]
        heard = [(i, c) for i, c in jobs if np.abs(windows[i][c]).max() > 1e-6]  # digital silence stays silence
        for at in range(0, len(heard), self._batch):
            part = heard[at : at + self._batch]
            batch = torch.from_numpy(np.stack([windows[i][c] for i, c in part]))
            first = [(start + i * self._shift) // self._config.hop for i, _ in part]
            noise = torch.stack([prior_noise(self._config, f, frames, self._seed) for f in first])
            for (i, c), y in zip(part, self._run(batch, noise).cpu().numpy(), strict=True):
                out[i][c] = y
        return out

    def _joined(self, window: np.ndarray) -> np.ndarray:
        """The window with its start (after the guard) cross-faded with what the last one left; it is longer than
        guard and fade.
        """
        if self._tail is None:
            return window
        span = slice(self._guard, self._guard + len(self._fade_in))
        window = window.copy()
        window[:, span] = self._tail * (1 - self._fade_in) + window[:, span] * self._fade_in
        return window

    def _advance(self, count: int) -> np.ndarray:
        """Enhance ``count`` windows and drop what is finished from the waiting samples."""
        windows = [self._waiting[:, i * self._shift : i * self._shift + self._window] for i in range(count)]
        done = []
        for window in self._enhanced(windows, self._start):
            joined = self._joined(window)
            begin = self._guard if self._tail is not None else 0
            done.append(joined[:, begin : self._shift + self._guard])
            self._tail = joined[:, self._shift + self._guard : self._window - self._guard]
        self._waiting = self._waiting[:, count * self._shift :]
        self._start += count * self._shift
        return np.concatenate(done, axis=1)
