"""DNSMOS P.835: Reddy, Gopal, Cutler, "DNSMOS P.835: a non-intrusive perceptual objective speech quality metric to
evaluate noise suppressors", ICASSP 2022. The network ships in the package ``speechmos`` and takes plain samples, so it
runs here through onnxruntime alone, with the windows and the calibration polynomials of that package."""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allears.core.errors import require

from .inputs import SAMPLE_RATE_HZ, mono, want_16_khz
from .reasons import unscored

WINDOW_SAMPLES = 144_160
_WINDOW_S = 9.01
# raw network output -> mean opinion score, highest power first (speechmos 0.0.1.1, not the personalised variant)
_CALIBRATION = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}


class Dnsmos(NamedTuple):
    """Mean opinion scores, about 1 (bad) to 5 (excellent): speech, background, overall."""

    sig: float
    bak: float
    ovrl: float


@lru_cache(maxsize=1)
def _session() -> Any:
    runtime = require("onnxruntime", "eval", "the metric dnsmos")
    package = require("speechmos", "eval", "the metric dnsmos")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    model = Path(package.__path__[0]) / "dnsmos_models" / "sig_bak_ovr.onnx"
    return runtime.InferenceSession(str(model), sess_options=options, providers=["CPUExecutionProvider"])


def _windows(audio: np.ndarray) -> list[np.ndarray]:
    """Windows of 9.01 s, one a second; a clip shorter than that is doubled until it fills one.

    As in speechmos, a window whose end in seconds times 16000 falls a hair under the whole sample in floating point
    (those that start at 7 to 23 s) is left out, so that scores of clips over 16 s compare with published ones too.
    """
    while len(audio) < WINDOW_SAMPLES:
        audio = np.concatenate([audio, audio])
    count = int(len(audio) // SAMPLE_RATE_HZ - _WINDOW_S) + 1
    ends = [int((index + _WINDOW_S) * SAMPLE_RATE_HZ) for index in range(count)]
    windows = [audio[index * SAMPLE_RATE_HZ : end] for index, end in enumerate(ends)]
    return [window for window in windows if len(window) >= WINDOW_SAMPLES]


def dnsmos(estimate: Any, sample_rate_hz: int = 16_000) -> Dnsmos:
    """Speech, background and overall quality of a clip, without a reference; the mean over 9.01 s windows.

    Samples beyond [-1, 1] are clipped, as a file or a sound card would. The score depends on the level, so compare
    systems at the same level.

    Args:
        estimate: (T,) float, 16 kHz.
        sample_rate_hz: must be 16000.

    Raises:
        ValueError: another rate, other shapes, NaN.
        MissingDependencyError: ``speechmos`` or ``onnxruntime`` is missing.
    """
    want_16_khz("dnsmos", sample_rate_hz)
    audio = np.clip(mono("estimate", estimate), -1.0, 1.0).astype(np.float32)
    if not len(audio):
        nan = unscored("dnsmos", "no samples")
        return Dnsmos(nan, nan, nan)
    session = _session()
    # one window a run: the network normalises its features over everything it is given
    raw = np.stack([session.run(None, {"input_1": window[None]})[0][0] for window in _windows(audio)]).astype(
        np.float64
    )
    scores = {name: float(np.polyval(c, raw[:, i]).mean()) for i, (name, c) in enumerate(_CALIBRATION.items())}
    return Dnsmos(**scores)
