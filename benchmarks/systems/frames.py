"""Running a 48 kHz frame-by-frame denoiser on 16 kHz audio, with its delay taken off."""

from collections.abc import Callable

import numpy as np
import soxr

RATE_HZ = 16_000
FRAME_RATE_HZ = 48_000


def through_48_khz(
    audio: np.ndarray, frame_samples: int, delay_samples: int, process: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Resample, feed ``process`` frame by frame, drop the first ``delay_samples`` of its output, resample back.

    Args:
        audio: (T,) float32, 16 kHz.
        frame_samples: frame length at 48 kHz.
        delay_samples: how late the denoiser is, at 48 kHz.
        process: (frame_samples,) float32 -> (frame_samples,) float32, with a state of its own.

    Returns:
        (T,) float32, in time with ``audio``.
    """
    wide = soxr.resample(audio, RATE_HZ, FRAME_RATE_HZ)
    frames = -(-(len(wide) + delay_samples) // frame_samples)
    wide = np.pad(wide, (0, frames * frame_samples - len(wide))).astype(np.float32, copy=False)
    for start in range(0, len(wide), frame_samples):
        wide[start : start + frame_samples] = process(wide[start : start + frame_samples])
    narrow = soxr.resample(wide[delay_samples : delay_samples + len(audio) * 3], FRAME_RATE_HZ, RATE_HZ)
    return np.pad(narrow, (0, max(0, len(audio) - len(narrow))))[: len(audio)].astype(np.float32, copy=False)
