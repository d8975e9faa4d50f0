"""Where a voice detector hears speech: of an echo canceller's output while the far end alone talks, what a voice agent
would take for an interruption. The network ships in the package ``silero-vad``; it runs here through onnxruntime on one
thread, without that package's own code.

Shapes: T samples at 16 kHz, N = ceil(T / 512) frames of 32 ms.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.errors import MissingDependencyError, require

from .inputs import SAMPLE_RATE_HZ, mono, want_16_khz

FRAME = 512
_BEFORE = 64
"""Samples of the last frame that the network hears again."""


def voice_probability(audio: Any, sample_rate_hz: int = 16_000) -> np.ndarray:
    """The detector's probability of speech in each frame of 32 ms, in [0, 1].

    Args:
        audio: (T,) float, 16 kHz, in [-1, 1]; the end is filled up with silence.
        sample_rate_hz: must be 16000.

    Returns:
        (N,) float32.

    Raises:
        ValueError: another rate, other shapes, NaN.
        MissingDependencyError: ``silero-vad`` or ``onnxruntime`` is missing.
    """
    want_16_khz("voice_probability", sample_rate_hz)
    x = mono("audio", audio).astype(np.float32)
    x = np.pad(x, (_BEFORE, -len(x) % FRAME))
    session, state, found = _session(), np.zeros((2, 1, 128), np.float32), []
    rate = np.array(SAMPLE_RATE_HZ, np.int64)
    for begin in range(0, len(x) - _BEFORE, FRAME):
        feeds = {"input": x[None, begin : begin + _BEFORE + FRAME], "state": state, "sr": rate}
        probability, state = session.run(None, feeds)
        found.append(float(probability[0, 0]))
    return np.array(found, np.float32)


def voiced_share(audio: Any, frames: Any, threshold: float = 0.5, hop: int = 160) -> float:
    """The share of chosen moments at which the detector hears speech.

    Args:
        audio: (T,) float, 16 kHz.
        frames: (M,) bool: which moments count; moment m is sample ``hop`` m.
        threshold: of the probability.
        hop: samples from one moment to the next.

    Returns:
        0 to 1; NaN where no moment counts.

    Raises:
        ValueError: as :func:`voice_probability`.
    """
    voiced = voice_probability(audio) > threshold
    at = np.flatnonzero(np.asarray(frames, bool)) * hop // FRAME
    at = at[at < len(voiced)]
    return float(voiced[at].mean()) if len(at) else float("nan")


@lru_cache(maxsize=1)
def _session() -> Any:
    runtime = require("onnxruntime", "eval", "the voice detector")
    spec = find_spec("silero_vad")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the voice detector needs the package 'silero-vad': install it with pip install silero-vad"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = Path(spec.origin).parent / "data" / "silero_vad.onnx"
    return runtime.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])
