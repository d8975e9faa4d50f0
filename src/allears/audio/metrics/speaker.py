"""Speaker similarity by GE2E voice embeddings: Wan, Wang, Papir, Lopez Moreno, "Generalized End-to-End Loss for Speaker
Verification", ICASSP 2018. The weights are those of the package ``resemblyzer``; its code is not imported, because that
needs a compiled voice detector which plays no part here."""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from allears.core.errors import MissingDependencyError

from .inputs import SAMPLE_RATE_HZ, mono, want_16_khz
from .reasons import unscored

_MELS = 40
_HIDDEN = 256
_FFT_SAMPLES, _HOP_SAMPLES = 400, 160  # 25 ms, 10 ms
_PARTIAL_FRAMES = 160  # the network hears 1.6 s at a time
_PARTIALS_PER_SECOND = 1.3
_MIN_COVERAGE = 0.75  # the last partial is kept if speech fills this much of it
_LEVEL_DBFS = -30.0


@lru_cache(maxsize=1)
def _network() -> Any:
    """Tensor (N, frames, 40) -> (N, 256): the last state of a three-layer LSTM, projected, rectified, unit length."""
    import torch

    spec = find_spec("resemblyzer")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the metric speaker_similarity needs the package 'resemblyzer': install it with "
            "pip install --no-deps resemblyzer (without its dependencies: one of them asks for a C compiler)"
        )
    state = torch.load(Path(spec.origin).parent / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
    lstm = torch.nn.LSTM(_MELS, _HIDDEN, num_layers=3, batch_first=True).eval()
    lstm.load_state_dict({key[5:]: value for key, value in state.items() if key.startswith("lstm.")})
    weight, bias = state["linear.weight"], state["linear.bias"]

    def embed(mels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            _, (hidden, _) = lstm(torch.from_numpy(mels))
            raw = torch.relu(torch.nn.functional.linear(hidden[-1], weight, bias))
            return torch.nn.functional.normalize(raw, dim=1).numpy()

    return embed


def _hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale (Auditory Toolbox, 1998): linear up to 1 kHz, 27 steps to each factor of 6.4 above."""
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


@lru_cache(maxsize=1)
def _mel_filters() -> np.ndarray:
    """(bins, 40): triangles of unit area, evenly spaced in mel from 0 Hz to 8 kHz."""
    bins_hz = np.fft.rfftfreq(_FFT_SAMPLES, 1 / SAMPLE_RATE_HZ)[:, None]
    edges_hz = _mel_to_hz(np.linspace(0, _hz_to_mel(np.array(SAMPLE_RATE_HZ / 2)), _MELS + 2))
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    triangles = np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre))
    return np.maximum(0, triangles) * 2 / (high - low)


def _mel_power(audio: np.ndarray) -> np.ndarray:
    """(T,) -> (frames, 40): mel power, frames centred on multiples of 10 ms, zeros beyond the ends."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT_SAMPLES) / _FFT_SAMPLES)
    padded = np.pad(audio, _FFT_SAMPLES // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT_SAMPLES)[::_HOP_SAMPLES]
    return (np.abs(np.fft.rfft(frames * window)) ** 2 @ _mel_filters()).astype(np.float32)


def _partial_starts(samples: int) -> range:
    """First frames of the partial utterances that cover a clip."""
    frames = -(-(samples + 1) // _HOP_SAMPLES)
    step = round(100 / _PARTIALS_PER_SECOND)
    starts = range(0, max(1, frames - _PARTIAL_FRAMES + step + 1), step)
    covered = (samples - starts[-1] * _HOP_SAMPLES) / (_PARTIAL_FRAMES * _HOP_SAMPLES)
    return starts[:-1] if covered < _MIN_COVERAGE and len(starts) > 1 else starts


def speaker_embedding(audio: Any, sample_rate_hz: int = 16_000) -> np.ndarray:
    """The voice in a clip as a unit vector.

    Quiet clips are raised to -30 dBFS, as the network was trained. Silence is not cut out: two versions of one
    sentence have the same pauses.

    Args:
        audio: (T,) float, 16 kHz, not silent.

    Returns:
        (256,) float32.

    Raises:
        ValueError: another rate, other shapes, NaN, no samples or silence.
        MissingDependencyError: ``resemblyzer`` is missing.
    """
    want_16_khz("speaker_embedding", sample_rate_hz)
    audio = mono("audio", audio)
    level = float(np.sqrt(np.mean(audio**2))) if len(audio) else 0.0
    if level == 0.0:
        raise ValueError("audio: is silent or empty, wanted speech")
    embed = _network()
    audio = (audio * max(1.0, 10 ** (_LEVEL_DBFS / 20) / level)).astype(np.float32)
    starts = _partial_starts(len(audio))
    audio = np.pad(audio, (0, max(0, (starts[-1] + _PARTIAL_FRAMES) * _HOP_SAMPLES - len(audio))))
    mel = _mel_power(audio)
    mean = embed(np.stack([mel[start : start + _PARTIAL_FRAMES] for start in starts])).mean(axis=0)
    return mean / np.linalg.norm(mean)


def speaker_similarity(estimate: Any, reference: Any, sample_rate_hz: int = 16_000) -> float:
    """Cosine between the voices of two clips, 0 to 1 (they may say different things); NaN where one is silent.

    Args and errors as :func:`speaker_embedding`.
    """
    clips = mono("estimate", estimate), mono("reference", reference)
    for name, clip in zip(("estimate", "reference"), clips, strict=True):
        if not np.any(clip):
            return unscored("speaker_similarity", f"the {name} is silent or empty")
    first, second = (speaker_embedding(clip, sample_rate_hz) for clip in clips)
    return float(np.dot(first, second))
