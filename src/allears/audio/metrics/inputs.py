"""What every metric asks of its input, checked in one place."""

from typing import Any

import numpy as np

SAMPLE_RATE_HZ = 16_000


def mono(name: str, audio: Any) -> np.ndarray:
    """``audio`` as a contiguous float64 array (T,).

    Raises:
        ValueError: it is not one-dimensional, not numeric, or holds NaN or infinity.
    """
    array = np.asarray(audio)
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}, wanted one channel (T,); score each channel by itself")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: got {array.dtype}, wanted real samples (float32 or float64 in [-1, 1])")
    if array.dtype.kind in "iu":
        raise ValueError(f"{name}: got {array.dtype}, wanted float samples in [-1, 1]; divide by the full scale first")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN or infinity, wanted finite samples")
    return np.ascontiguousarray(array, dtype=np.float64)


def mono_pair(estimate: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as (T,) float64 of the same length.

    Raises:
        ValueError: as :func:`mono`, or the lengths differ.
    """
    estimate, reference = mono("estimate", estimate), mono("reference", reference)
    if len(estimate) != len(reference):
        raise ValueError(
            f"estimate: has {len(estimate)} samples but the reference has {len(reference)}; align and trim them first"
        )
    return estimate, reference


def want_16_khz(metric: str, sample_rate_hz: int) -> None:
    """Raise ValueError unless the rate is the one that the metric is defined for."""
    if sample_rate_hz != SAMPLE_RATE_HZ:
        raise ValueError(
            f"sample_rate_hz: got {sample_rate_hz}, but {metric} is defined at {SAMPLE_RATE_HZ} Hz; "
            "resample first, or call score_clip, which does it"
        )
