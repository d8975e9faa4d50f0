"""The pitch of a voice, roughly: enough to tell whether two voices lie near each other.

By the autocorrelation of a frame over that of its window (Boersma, "Accurate short-term analysis of the fundamental
frequency", IFA Proceedings 17, 1993), the highest peak alone; no path over time is sought.

Shapes: S samples, T frames.
"""

import numpy as np

FRAME_S, HOP_S = 0.064, 0.016
LOWEST_HZ, HIGHEST_HZ = 65.0, 450.0
_VOICED = 0.6  # of the autocorrelation at lag 0
_LOUD = 0.05  # of the loudest frame's energy
_SHORTER = 0.04  # a lag twice as long must be better by this, else the octave above is meant


def pitch_hz(signal: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """Pitch of each frame (T,) in Hz, NaN where the frame is quiet or not voiced.

    Args:
        signal: (S,); shorter than a frame gives no frames.
        sample_rate_hz: 2 kHz or more.

    Raises:
        ValueError: not (S,), or the rate is too low.
    """
    x = np.asarray(signal, np.float64)
    if x.ndim != 1:
        raise ValueError(f"signal: shape {x.shape} given; (S,) is wanted, one channel")
    if sample_rate_hz < 2_000:
        raise ValueError(f"sample_rate_hz: {sample_rate_hz} given; at least 2000 is wanted")
    size, hop = round(FRAME_S * sample_rate_hz), round(HOP_S * sample_rate_hz)
    if len(x) < size:
        return np.zeros(0)
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[::hop]
    window = np.hanning(size)
    frames = (frames - frames.mean(1, keepdims=True)) * window
    least, most = int(sample_rate_hz / HIGHEST_HZ), int(np.ceil(sample_rate_hz / LOWEST_HZ))
    energy = np.square(frames).sum(1)
    own = _autocorrelation(window[None])[0, : most + 1]
    share = _autocorrelation(frames)[:, : most + 1] / np.maximum(energy, 1e-12)[:, None] / (own / own[0])
    lags = np.arange(most + 1)
    score = share - _SHORTER * np.log2(np.maximum(lags, 1) / least)
    score[:, :least] = -np.inf
    best = score.argmax(1)
    rows = np.arange(len(frames))
    voiced = (share[rows, best] > _VOICED) & (energy > _LOUD * energy.max()) & (best > least) & (best < most)
    inner = np.clip(best, 1, most - 1)
    left, mid, right = (share[rows, inner + step] for step in (-1, 0, 1))
    bend = left - 2 * mid + right
    shift = np.where(bend < 0, 0.5 * (left - right) / np.where(bend < 0, bend, -1.0), 0.0).clip(-0.5, 0.5)
    return np.where(voiced, sample_rate_hz / (inner + shift), np.nan)


def _autocorrelation(frames: np.ndarray) -> np.ndarray:
    size = 1 << (2 * frames.shape[1] - 1).bit_length()
    return np.fft.irfft(np.abs(np.fft.rfft(frames, size)) ** 2, size)
