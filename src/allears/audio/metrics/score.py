"""Several metrics on one clip."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from allears.audio.resample import resample

from .inputs import SAMPLE_RATE_HZ
from .intelligibility import estoi
from .non_intrusive import dnsmos
from .pesq import pesq_wb
from .recognition import phone_error_rate
from .si_sdr import si_sdr_db
from .speaker import speaker_similarity

# metric -> function(estimate, reference, sample_rate_hz) on one channel
_NATIVE_RATE: dict[str, Callable[..., float]] = {
    "si_sdr_db": lambda estimate, reference, _: float(si_sdr_db(estimate, reference)),
    "estoi": estoi,
}
_AT_16_KHZ: dict[str, Callable[..., float]] = {
    "pesq_wb": pesq_wb,
    "speaker_similarity": speaker_similarity,
    "phone_error_rate": phone_error_rate,
}
REFERENCE_FREE_METRICS = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
METRICS = ("pesq_wb", "si_sdr_db", "estoi", *REFERENCE_FREE_METRICS, "speaker_similarity", "phone_error_rate")
DEFAULT_METRICS = ("pesq_wb", "si_sdr_db", "estoi", *REFERENCE_FREE_METRICS)


def _channels(name: str, audio: Any) -> np.ndarray:
    array = np.asarray(audio)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, wanted (T,) or (C, T) with at least one sample")
    return np.atleast_2d(array)


def _at_16_khz(audio: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    if sample_rate_hz == SAMPLE_RATE_HZ:
        return audio
    return resample(np.ascontiguousarray(audio, dtype=np.float32), sample_rate_hz, SAMPLE_RATE_HZ)


def score_clip(
    reference: Any,
    estimate: Any,
    sample_rate_hz: int,
    metrics: Sequence[str] | None = None,
) -> dict[str, float]:
    """Score one clip by several metrics.

    PESQ, DNSMOS, speaker similarity and phone error rate are computed at 16 kHz, the others at the clip's own rate.
    Several channels are scored one by one and averaged. A metric that cannot judge the clip gives NaN
    (:func:`~allears.audio.metrics.collect_reasons` keeps the reason).

    Args:
        reference: (T,) or (C, T) float, clean; ``None`` where there is none (then only DNSMOS can be asked for).
        estimate: the same shape, in [-1, 1].
        sample_rate_hz: of both.
        metrics: names from ``METRICS``; by default ``DEFAULT_METRICS``, or the reference-free ones without a reference.

    Returns:
        Metric name -> score, in the order asked for.

    Raises:
        ValueError: an unknown metric, one that needs a reference, shapes that differ, NaN in the audio.
        MissingDependencyError: a package that a metric needs is missing.
    """
    if metrics is None:
        metrics = REFERENCE_FREE_METRICS if reference is None else DEFAULT_METRICS
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: {name!r} is unknown; known are {', '.join(METRICS)}")
        if reference is None and name not in REFERENCE_FREE_METRICS:
            raise ValueError(
                f"metrics: {name} needs a reference; without one ask for {', '.join(REFERENCE_FREE_METRICS)}"
            )
    estimate = _channels("estimate", estimate)
    if reference is not None:
        reference = _channels("reference", reference)
        if reference.shape != estimate.shape:
            raise ValueError(
                f"estimate: has shape {estimate.shape} but the reference has {reference.shape}; "
                "align and trim them first"
            )
    if not np.isfinite(estimate).all():
        raise ValueError("estimate: holds NaN or infinity, wanted finite samples")
    rows = [
        _score_channel(None if reference is None else reference[c], estimate[c], sample_rate_hz, metrics)
        for c in range(len(estimate))
    ]
    return {name: float(np.mean([row[name] for row in rows])) for name in metrics}


def _score_channel(
    reference: np.ndarray | None, estimate: np.ndarray, sample_rate_hz: int, metrics: Sequence[str]
) -> dict[str, float]:
    wants_16_khz = any(name not in _NATIVE_RATE for name in metrics)
    estimate_16 = _at_16_khz(estimate[None], sample_rate_hz)[0] if wants_16_khz else estimate
    reference_16 = reference
    if reference is not None and any(name in _AT_16_KHZ for name in metrics):
        reference_16 = _at_16_khz(reference[None], sample_rate_hz)[0]
    scores: dict[str, float] = {}
    if any(name in REFERENCE_FREE_METRICS for name in metrics):
        scores.update({f"dnsmos_{key}": value for key, value in dnsmos(estimate_16)._asdict().items()})
    for name in metrics:
        if name in _NATIVE_RATE:
            scores[name] = _NATIVE_RATE[name](estimate, reference, sample_rate_hz)
        elif name in _AT_16_KHZ:
            scores[name] = _AT_16_KHZ[name](estimate_16, reference_16, SAMPLE_RATE_HZ)
    return scores
