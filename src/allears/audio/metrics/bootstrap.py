"""Confidence intervals over clips by the percentile bootstrap (Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_BLOCK_VALUES = 1 << 20  # indices drawn at once


class Interval(NamedTuple):
    """The mean of ``n`` clips and the interval that holds it at the asked confidence."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of per-clip ``values`` and its bootstrap interval; values that are not finite (unscored clips) are left out.

    Args:
        values: (N,) one score a clip.
        confidence: between 0 and 1.
        resamples: how many times the clips are drawn with replacement.
        seed: the same seed gives the same interval.

    Returns:
        ``Interval(mean, low, high, n)``; all NaN with ``n`` 0 where no value is finite.

    Raises:
        ValueError: a bad confidence or number of resamples, or values that are not (N,).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, wanted a fraction between 0 and 1, such as 0.95")
    if resamples < 1:
        raise ValueError(f"resamples: got {resamples}, wanted at least 1")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values: got shape {array.shape}, wanted one score a clip (N,)")
    array = array[np.isfinite(array)]
    n = len(array)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_VALUES // n)
    means = np.concatenate(
        [
            array[generator.integers(0, n, (min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(array.mean()), float(low), float(high), n)


def paired_bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of ``values - baseline`` over the clips where both are finite, with its interval.

    Clips are drawn as pairs, so the difficulty that two systems share on a clip does not widen the interval.

    Raises:
        ValueError: as :func:`bootstrap_interval`, or the two differ in length.
    """
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"baseline: got shape {second.shape} against {first.shape} values; score the same clips")
    with np.errstate(invalid="ignore"):
        difference = first - second
    return bootstrap_interval(difference, confidence, resamples, seed)
