"""Extended short-time objective intelligibility. Jensen and Taal, "An Algorithm for Predicting the Intelligibility of
Speech Masked by Modulated Noise Maskers", IEEE/ACM TASLP 24(11), 2016; through the package ``pystoi``."""

import warnings
from typing import Any

import numpy as np

from allears.core.errors import require

from .inputs import mono_pair
from .reasons import unscored


def estoi(estimate: Any, reference: Any, sample_rate_hz: int = 16_000) -> float:
    """Intelligibility up to 1 (0: none); NaN where the speech lasts under 0.4 s or there is none.

    Args:
        estimate: (T,) float.
        reference: (T,) float, the clean speech.
        sample_rate_hz: any; the metric works at 10 kHz inside.

    Raises:
        ValueError: shapes differ, NaN.
        MissingDependencyError: the package ``pystoi`` is missing.
    """
    estimate, reference = mono_pair(estimate, reference)
    pystoi = require("pystoi", "eval", "the metric estoi")
    if len(reference) < 0.4 * sample_rate_hz:
        return unscored("estoi", f"{len(reference)} samples; ESTOI needs 0.4 s of speech")
    if not np.any(reference):
        return unscored("estoi", "the reference is silent")
    if not np.any(estimate):
        return 0.0  # nothing of the speech is left (pystoi would correlate its own dither)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Not enough STFT frames", category=RuntimeWarning)
        try:
            return float(pystoi.stoi(reference, estimate, sample_rate_hz, extended=True))
        except RuntimeWarning:
            return unscored("estoi", "under 0.4 s of speech once silent frames are left out")
