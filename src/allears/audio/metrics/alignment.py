"""Finding and taking off a constant delay, by cross-correlation."""

from typing import Any

import numpy as np

from .inputs import mono


def delay_samples(estimate: Any, reference: Any, max_lag: int) -> int:
    """How many samples ``estimate`` comes after ``reference`` (negative: before), where they correlate most.

    Args:
        estimate: (T1,) float.
        reference: (T2,) float, same rate; the lengths may differ.
        max_lag: the largest delay looked for, either way, in samples.

    Returns:
        The delay in [-max_lag, max_lag]; 0 where either is silent.

    Raises:
        ValueError: not one channel, NaN, or a negative ``max_lag``.
    """
    if max_lag < 0:
        raise ValueError(f"max_lag: got {max_lag}, wanted a number of samples of at least 0")
    estimate, reference = mono("estimate", estimate), mono("reference", reference)
    if not (np.any(estimate) and np.any(reference)):
        return 0
    size = 1 << int(len(estimate) + len(reference) + max_lag).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(estimate, size) * np.conj(np.fft.rfft(reference, size)), size)
    lags = np.arange(-max_lag, max_lag + 1)
    near_first = lags[np.argsort(np.abs(lags), kind="stable")]  # of equal peaks the smallest delay wins
    return int(near_first[np.argmax(correlation[near_first])])


def align(estimate: Any, reference: Any, max_lag: int) -> np.ndarray:
    """``estimate`` moved by its delay against ``reference`` and cut or filled with zeros to the reference's length.

    Args and errors as :func:`delay_samples`.

    Returns:
        (T2,) of the estimate's dtype.
    """
    delay = delay_samples(estimate, reference, max_lag)
    estimate = np.asarray(estimate)
    aligned = np.zeros(len(reference), dtype=estimate.dtype)
    source = estimate[max(0, delay) :]
    start = max(0, -delay)
    count = max(0, min(len(source), len(aligned) - start))
    aligned[start : start + count] = source[:count]
    return aligned
