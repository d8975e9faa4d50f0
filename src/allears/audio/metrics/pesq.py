"""PESQ, wide band: ITU-T P.862.2 (2007), through the reference C code in the package ``pesq``."""

from typing import Any

import numpy as np

from allears.core.errors import require

from .inputs import mono_pair, want_16_khz
from .reasons import unscored

MAX_PIECE_S = 20  # the C code overruns a table of 50 utterances, and so ends the process, from some 30 s on


def pesq_wb(estimate: Any, reference: Any, sample_rate_hz: int = 16_000) -> float:
    """Listening quality (MOS-LQO) from 1.02 to 4.64; NaN where there is nothing to judge.

    A clip over 20 s is cut into equal pieces of at most 20 s, as the Recommendation judges sentences of 8-20 s, and the
    mean is returned; pieces without speech are left out.

    Args:
        estimate: (T,) float, 16 kHz.
        reference: (T,) float, the clean speech.
        sample_rate_hz: must be 16000.

    Raises:
        ValueError: another rate, other shapes, NaN.
        MissingDependencyError: the package ``pesq`` is missing.
    """
    want_16_khz("pesq_wb", sample_rate_hz)
    estimate, reference = mono_pair(estimate, reference)
    pieces = max(1, -(-len(reference) // (MAX_PIECE_S * sample_rate_hz)))
    pairs = zip(np.array_split(estimate, pieces), np.array_split(reference, pieces), strict=True)
    results = [_piece(degraded, clean, sample_rate_hz) for degraded, clean in pairs]
    scores = [result for result in results if isinstance(result, float)]
    return float(np.mean(scores)) if scores else unscored("pesq_wb", str(results[0]))


def _piece(estimate: np.ndarray, reference: np.ndarray, sample_rate_hz: int) -> float | str:
    """The score, or why there is none."""
    pesq = require("pesq", "eval", "the metric pesq_wb")
    if len(reference) < sample_rate_hz // 4:
        return f"{len(reference)} samples; PESQ needs a quarter of a second"
    if not np.any(reference):
        return "the reference is silent"
    if not np.any(estimate):
        return "the estimate is silent"
    try:
        return float(pesq.pesq(sample_rate_hz, reference, estimate, "wb"))
    except pesq.NoUtterancesError:
        return "PESQ finds no speech in the reference or the estimate"
    except pesq.PesqError as error:
        return f"PESQ fails: {error}"
