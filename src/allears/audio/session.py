"""What every pipeline does around its core: waveforms are checked, and the caller's rate becomes the core's and back.

Shapes: B clips, C channels, T or n samples; waveforms are float32.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from allears.audio.resample import StreamResampler, fit_length

LOWEST_HZ, HIGHEST_HZ = 4_000, 384_000
_LOUDEST = 1e15  # full scale is 1; squares of larger samples leave float32
_SHAPES = ("(T,)", "(C, T)", "(B, C, T)")


class Core(Protocol):
    """Works at its own rate: samples in, later as many out, perhaps of another number of channels."""

    def push(self, x: np.ndarray) -> np.ndarray: ...

    def flush(self) -> np.ndarray: ...


class Session:
    """The caller's rate to the core's and back around a core; as many samples come out as went in.

    Args:
        core: takes (``channels_in``, n) and gives (``channels_out``, m).
        rate_hz: the caller's rate.
        core_rate_hz: the core's.

    Raises:
        ValueError: the rate is none of a sound recording.
    """

    def __init__(self, core: Core, channels_in: int, channels_out: int, rate_hz: int, core_rate_hz: int) -> None:
        if not LOWEST_HZ <= rate_hz <= HIGHEST_HZ:
            raise ValueError(f"sample_rate_hz: {rate_hz} given; rates from {LOWEST_HZ} to {HIGHEST_HZ} are taken")
        self._core = core
        self._down = StreamResampler(channels_in, rate_hz, core_rate_hz) if rate_hz != core_rate_hz else None
        self._up = StreamResampler(channels_out, core_rate_hz, rate_hz) if rate_hz != core_rate_hz else None
        self._in = 0
        self._out = 0

    def push(self, x: np.ndarray) -> np.ndarray:
        if (peak := float(np.abs(x).max(initial=0.0))) > _LOUDEST:
            raise ValueError(f"audio: a sample of size {peak:.1e}; full scale is 1, and {_LOUDEST:.0e} the most taken")
        self._in += x.shape[1]
        y = self._core.push(self._down.push(x) if self._down else x)
        return self._trim(self._up.push(y) if self._up else y)

    def flush(self) -> np.ndarray:
        rest = self._core.push(self._down.flush()) if self._down else None
        y = self._core.flush() if rest is None else np.concatenate([rest, self._core.flush()], axis=1)
        if self._up:
            y = np.concatenate([self._up.push(y), self._up.flush()], axis=1)
        return fit_length(y, self._in - self._out)

    def _trim(self, y: np.ndarray) -> np.ndarray:
        y = y[:, : self._in - self._out]
        self._out += y.shape[1]
        return y


def as_batch(audio: np.ndarray | Tensor, most_dimensions: int = 3) -> np.ndarray:
    """A caller's waveform, an array or a tensor of up to so many dimensions, as (B, C, T) float32.

    Raises:
        ValueError: not floating, not finite, empty, or of another shape.
    """
    floating = audio.is_floating_point() if isinstance(audio, Tensor) else np.issubdtype(audio.dtype, np.floating)
    if not floating:
        raise ValueError(
            f"audio: dtype {audio.dtype} given; floating samples in [-1, 1] are wanted (int16: divide by 32768)"
        )
    if not 1 <= audio.ndim <= most_dimensions or 0 in audio.shape:
        shapes = ", ".join(_SHAPES[: most_dimensions - 1]) + f" or {_SHAPES[most_dimensions - 1]}"
        raise ValueError(f"audio: shape {tuple(audio.shape)} given; {shapes} with at least one sample is wanted")
    x = audio.detach().cpu().float().numpy() if isinstance(audio, Tensor) else audio.astype(np.float32, copy=False)
    if not np.isfinite(x).all():
        raise ValueError(
            f"audio: {np.count_nonzero(~np.isfinite(x))} samples are NaN or infinite; see numpy.nan_to_num"
        )
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


def as_given(y: np.ndarray, audio: np.ndarray | Tensor) -> Any:
    """``y`` as the caller's waveform ``audio`` is: an array of its dtype, or a tensor of its dtype and device."""
    if isinstance(audio, Tensor):
        return torch.from_numpy(y).to(audio)
    return y.astype(audio.dtype, copy=False)
