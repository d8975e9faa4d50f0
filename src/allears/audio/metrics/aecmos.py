"""AECMOS: Purin et al., "AECMOS: A speech quality assessment metric for echo impairment", ICASSP 2022. The network is
that of the package ``speechmos``, and takes plain samples; it runs here through onnxruntime on one thread.

It does not align the reference: scores of different delays say nothing about each other. Compare systems on the same
clips only.

Shapes: T samples at 16 kHz, N frames of 16 ms, 160 mel bands.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from allears.core.errors import require

from .inputs import SAMPLE_RATE_HZ, mono, want_16_khz
from .reasons import unscored

LONGEST_S = 20
_FFT, _HOP, _MELS = 513, 256, 160
_MARKER_ROWS = 20
# Scenario -> whether the far end, and whether the near end, is heard: the network is told by rows behind the features
_HEARD = {"far": (True, False), "near": (False, True), "double": (True, True)}
Scenario = Literal["far", "near", "double"]


class Aecmos(NamedTuple):
    """Mean opinion scores, about 1 (bad) to 5 (excellent): how little echo is heard, how little else is wrong."""

    echo: float
    degradation: float


def aecmos(mic: Any, reference: Any, output: Any, scenario: Scenario, sample_rate_hz: int = 16_000) -> Aecmos:
    """What a listener would say of an echo canceller's output; the first 20 s count.

    Args:
        mic: (T,) float, 16 kHz, in [-1, 1]; beyond that samples are clipped, as a sound card would.
        reference: (T,) float: what was sent to the loudspeaker.
        output: (T,) float: of the canceller, in time with ``mic``.
        scenario: who talks: ``far``, ``near`` or ``double``.
        sample_rate_hz: must be 16000.

    Returns:
        Both scores; NaN where there are no samples.

    Raises:
        ValueError: another rate, shapes that differ, NaN, or an unknown scenario.
        MissingDependencyError: ``speechmos``, ``onnxruntime`` or ``librosa`` is missing.
    """
    want_16_khz("aecmos", sample_rate_hz)
    if scenario not in _HEARD:
        raise ValueError(f"scenario: got {scenario!r}, wanted one of {', '.join(_HEARD)}")
    signals = [mono(*pair) for pair in (("reference", reference), ("mic", mic), ("output", output))]
    if len({len(x) for x in signals}) > 1:
        raise ValueError(f"reference, mic, output: got {[len(x) for x in signals]} samples, wanted as many of each")
    if not len(signals[0]):
        nan = unscored("aecmos", "no samples")
        return Aecmos(nan, nan)
    far, near = _HEARD[scenario]
    marks = (float(far), float(near), 1.0)
    features = [_features(x[: LONGEST_S * SAMPLE_RATE_HZ], mark) for x, mark in zip(signals, marks, strict=True)]
    session = _session()
    feeds = {session.get_inputs()[0].name: np.stack(features)[None], "h0": np.zeros((4, 1, 64), np.float32)}
    echo, degradation = np.ravel(session.run(None, feeds)[0])[:2]
    return Aecmos(float(echo), float(degradation))


def _features(x: np.ndarray, mark: float) -> np.ndarray:
    """Mel levels below the loudest, -40 dB as 0 and 0 dB as 1, and the marker: (N + 40, 160) float32."""
    librosa = require("librosa", "eval", "the metric aecmos")
    x = np.clip(x, -1.0, 1.0).astype(np.float32)
    mel = librosa.feature.melspectrogram(y=x, sr=SAMPLE_RATE_HZ, n_fft=_FFT, hop_length=_HOP, n_mels=_MELS)
    levels = (librosa.power_to_db(mel, ref=np.max) + 40.0) / 40.0
    rows = np.repeat([mark, 0.0], _MARKER_ROWS)[:, None] * np.ones((1, _MELS))
    return np.concatenate([levels.T, rows]).astype(np.float32)


@lru_cache(maxsize=1)
def _session() -> Any:
    runtime = require("onnxruntime", "eval", "the metric aecmos")
    package = require("speechmos", "eval", "the metric aecmos")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    model = Path(package.__path__[0]) / "aecmos_models" / "Run_1663915512_Stage_0.onnx"
    return runtime.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])
