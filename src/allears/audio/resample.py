"""Sample-rate conversion through libsoxr, whole or in a stream, with one exact answer for both.

Shapes: C channels, T samples; signals are float32 (C, T).
"""

import numpy as np
import soxr

QUALITIES = ("HQ", "VHQ")


def resampled_length(length: int, from_hz: int, to_hz: int) -> int:
    """T' = floor(length * to_hz / from_hz + 1/2), in whole-number arithmetic: the nearest length, halves upwards."""
    return (2 * length * to_hz + from_hz) // (2 * from_hz)


def fit_length(x: np.ndarray, length: int) -> np.ndarray:
    """``x`` (..., T) cut, or filled with zeros at its end, to (..., length).

    Two conversions in a row (44100 to 16000 and back) may end a few samples off, since each rounds its length; this
    restores the first length. The samples themselves are in place: the conversion has no delay.
    """
    if x.shape[-1] >= length:
        return x[..., :length]
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


def _check(from_hz: int, to_hz: int, quality: str) -> None:
    for name, rate in (("from_hz", from_hz), ("to_hz", to_hz)):
        if int(rate) != rate or rate < 1:
            raise ValueError(f"{name}: got {rate!r}, wanted a whole number of Hz from 1 up")
    if quality not in QUALITIES:
        raise ValueError(f"quality: got {quality!r}, wanted one of {', '.join(QUALITIES)}")


def _as_signal(x: np.ndarray, channels: int | None = None) -> np.ndarray:
    if x.ndim != 2 or (channels is not None and x.shape[0] != channels):
        raise ValueError(f"x: got shape {x.shape}, wanted (C, T)" + (f" with C = {channels}" if channels else ""))
    return np.asarray(x, dtype=np.float32)


def resample(x: np.ndarray, from_hz: int, to_hz: int, quality: str = "HQ") -> np.ndarray:
    """Convert ``x`` (C, T) float32 from ``from_hz`` to ``to_hz``: (C, T'), T' = :func:`resampled_length`.

    Sample 0 stays at time 0 (linear phase, delay removed); outside the signal there are zeros. ``HQ`` keeps 20 bits,
    ``VHQ`` 28. Equal rates return a copy.

    Raises:
        ValueError: ``x`` is not (C, T), or a rate or the quality is not valid.
    """
    _check(from_hz, to_hz, quality)
    x = _as_signal(x)
    length = resampled_length(x.shape[1], from_hz, to_hz)
    if from_hz == to_hz or not x.size:
        return fit_length(x, length).copy()
    y = soxr.resample(x.T, from_hz, to_hz, quality=quality).T
    return np.ascontiguousarray(fit_length(y, length))


class StreamResampler:
    """:func:`resample` for a signal that comes in chunks of any size.

    All chunks returned, those of :meth:`flush` last, put one after another equal ``resample`` of the whole signal.

    Raises:
        ValueError: ``channels``, a rate or the quality is not valid.
    """

    def __init__(self, channels: int, from_hz: int, to_hz: int, quality: str = "HQ") -> None:
        _check(from_hz, to_hz, quality)
        if channels < 1:
            raise ValueError(f"channels: got {channels}, wanted 1 or more")
        self.channels, self.from_hz, self.to_hz = channels, int(from_hz), int(to_hz)
        self.received = 0
        self.emitted = 0
        self._flushed = False
        same = self.from_hz == self.to_hz
        self._stream = None if same else soxr.ResampleStream(from_hz, to_hz, channels, quality=quality)

    @property
    def owed(self) -> int:
        """Output samples of the input so far that are still to come: the present delay."""
        return resampled_length(self.received, self.from_hz, self.to_hz) - self.emitted

    def push(self, x: np.ndarray) -> np.ndarray:
        """Chunk (C, n) float32, n >= 0, to the samples (C, m) that it completes, m >= 0.

        Raises:
            ValueError: ``x`` has another channel count, or the stream has been flushed.
        """
        x = self._open(_as_signal(x, self.channels))
        self.received += x.shape[1]
        y = x.copy() if self._stream is None else self._convert(x, last=False)
        return self._emit(y)

    def flush(self) -> np.ndarray:
        """The last samples (C, m). The stream is over then."""
        x = self._open(np.zeros((self.channels, 0), np.float32))
        self._flushed = True
        y = x if self._stream is None or self.received == 0 else self._convert(x, last=True)
        return self._emit(fit_length(y, self.owed))

    def _open(self, x: np.ndarray) -> np.ndarray:
        if self._flushed:
            raise ValueError("x: this stream has been flushed; make a new StreamResampler for another signal")
        return x

    def _convert(self, x: np.ndarray, last: bool) -> np.ndarray:
        assert self._stream is not None
        return np.ascontiguousarray(self._stream.resample_chunk(np.ascontiguousarray(x.T), last=last).T)

    def _emit(self, y: np.ndarray) -> np.ndarray:
        self.emitted += y.shape[1]
        return y
