"""All that is told of one clip with echo: the metrics that mean something where far end, near end, or both talk.

No one number says how good a canceller is: an output of zeros has the highest echo return loss enhancement (ERLE).

Shapes: S samples at 16 kHz, T = ceil(S / 160) + 1 frames of 10 ms, of which frame t is centred at sample 160 t.
"""

import math
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from .aecmos import Scenario, aecmos
from .echo import aligned_share, erle_db, recovery_s, sdr_filtered_db, time_to_erle_s
from .inputs import SAMPLE_RATE_HZ
from .pesq import pesq_wb
from .si_sdr import si_sdr_db
from .voice import voiced_share

HOP = SAMPLE_RATE_HZ // 100
LEARNED_S = 3.0
"""From when on echo return loss enhancement counts."""
HOLD_S = 0.5
"""For how long an echo must be gone to be gone: some cancellers begin shut, and open too soon."""
LOWEST_DB, HIGHEST_DB = -30.0, 100.0
"""What no score in dB is beyond: a mean has no use for infinity."""
ECHO_METRICS = (
    "erle_db",
    "time_to_20db_s",
    "reached_20db",
    "recovery_s",
    "aecmos_echo",
    "aecmos_deg",
    "pesq_wb",
    "si_sdr_db",
    "sdr512_db",
    "pesq_wb_reverberant",
    "si_sdr_reverberant_db",
    "self_trigger",
    "aligned_share",
)


class EchoTruth(NamedTuple):
    """What went into a clip.

    Attributes:
        scenario: who talks: ``far``, ``near`` or ``double``.
        mic, reference: (S,), what the microphone heard and what was played.
        near, near_reverberant: (S,), the near talker's direct sound with early reflections, and with all of them.
        delay_frames: (T,), from the reference to its echo.
        voice, far_active: (T,) bool: the near talker talks; the loudspeaker plays.
        changed_s: when delay or path changed, if they did.
    """

    scenario: Scenario
    mic: np.ndarray
    reference: np.ndarray
    near: np.ndarray
    near_reverberant: np.ndarray
    delay_frames: np.ndarray
    voice: np.ndarray
    far_active: np.ndarray
    changed_s: float | None = None


def score_echo(truth: EchoTruth, output: np.ndarray, delay_frames: np.ndarray | None = None) -> dict[str, float]:
    """Scores of an echo canceller on a clip, of :data:`ECHO_METRICS`; those that say nothing of it are NaN.

    ====================== =========== ==============================================================================
    metric                 scenarios   what it says
    ====================== =========== ==============================================================================
    ``erle_db``            far, double ERLE from 3 s on while the far end alone is heard; with noise it is bounded by it
    ``time_to_20db_s``     far         from the first echo until 20 dB are gone for 0.5 s; never: the clip's length
    ``reached_20db``       far         1 if that came, else 0
    ``recovery_s``         far         after a change until the echo is down as before; never: the rest of the clip
    ``aecmos_echo``        far, double AECMOS, of the echo
    ``aecmos_deg``         all         AECMOS, of all else
    ``pesq_wb``            near, double against the near talker with early reflections; ``_reverberant``: with all
    ``si_sdr_db``          near, double likewise
    ``sdr512_db``          near, double SDR that forgives a filter of 512 taps, against the better fitting of the two
    ``self_trigger``       far         share of frames with far end in which a voice detector hears speech
    ``aligned_share``      far, double share of frames with far end whose delay was found to within a frame
    ====================== =========== ==============================================================================

    ``self_trigger`` is left out where ``silero-vad`` is not installed.

    Args:
        truth: what went into the clip.
        output: (S,), in time with the microphone.
        delay_frames: (T,), as the canceller found it, if it tells.

    Raises:
        ValueError: an output of another length, or that is not finite.
        MissingDependencyError: a package that a metric needs is missing.
    """
    opinion = aecmos(truth.mic, truth.reference, output, truth.scenario)
    scores = dict.fromkeys(ECHO_METRICS, math.nan) | {"aecmos_deg": opinion.degradation}
    if truth.scenario != "near":
        alone = np.repeat(truth.far_active & ~truth.voice, HOP)[HOP // 2 :][: len(output)]
        learned = alone & (np.arange(len(output)) >= LEARNED_S * SAMPLE_RATE_HZ)
        scores["aecmos_echo"] = opinion.echo
        scores["erle_db"] = bounded(erle_db(truth.mic, output, learned)) if learned.any() else math.nan
        if delay_frames is not None:
            scores["aligned_share"] = aligned_share(delay_frames, truth.delay_frames, truth.far_active)
    return scores | (_far(truth, output) if truth.scenario == "far" else _near(truth, output))


def bounded(decibels: float) -> float:
    """Within :data:`LOWEST_DB` and :data:`HIGHEST_DB`; NaN stays."""
    return float(np.clip(decibels, LOWEST_DB, HIGHEST_DB))


def _far(truth: EchoTruth, output: np.ndarray) -> dict[str, float]:
    length_s = len(output) / SAMPLE_RATE_HZ
    took_s = time_to_erle_s(truth.mic, output, SAMPLE_RATE_HZ, hold_s=HOLD_S)
    heard = not math.isnan(took_s)
    scores = {
        "time_to_20db_s": min(took_s, length_s) if heard else math.nan,
        "reached_20db": float(took_s < math.inf) if heard else math.nan,
    }
    if find_spec("silero_vad") is not None:
        scores["self_trigger"] = voiced_share(output, truth.far_active, hop=HOP)
    if truth.changed_s is not None:
        recovery = recovery_s(truth.mic, output, SAMPLE_RATE_HZ, truth.changed_s)
        scores["recovery_s"] = min(recovery, length_s - truth.changed_s) if recovery == recovery else math.nan
    return scores


def _near(truth: EchoTruth, output: np.ndarray) -> dict[str, float]:
    dry, wet = truth.near, truth.near_reverberant
    return {
        "pesq_wb": pesq_wb(output, dry, SAMPLE_RATE_HZ),
        "pesq_wb_reverberant": pesq_wb(output, wet, SAMPLE_RATE_HZ),
        "si_sdr_db": bounded(float(si_sdr_db(output, dry))),
        "si_sdr_reverberant_db": bounded(float(si_sdr_db(output, wet))),
        "sdr512_db": bounded(max(sdr_filtered_db(output, reference) for reference in (dry, wet))),
    }
