"""From what a program spoke to an utterance of the corpus: ends trimmed, levelled, and broken ones found out.

Shapes: T samples.
"""

import numpy as np

from allears.audio.pitch import pitch_hz
from allears.data import decode as audio

SHORTEST_S, LONGEST_S = 2.0, 6.0
PAUSE_S = 0.2
"""What is left of the silence before and after an utterance."""
LEVEL_DB, PEAK = -26.0, 0.95
"""Level of the parts that are not pauses, dB of full scale, and the highest peak, which goes before."""

_FRAME_S, _SPEECH_RANGE_DB = 0.02, 35.0
_CLIPPED = 1e-3
_LEAST_VOICED, _LEAST_BANDWIDTH_HZ = 0.15, 2_000.0


def polish(mono: np.ndarray, rate_hz: int) -> np.ndarray | str:
    """The utterance (T,) at ``rate_hz``, trimmed and levelled, or a word that says what is wrong with it."""
    if not len(mono) or not np.isfinite(mono).all():
        return "broken"
    if np.abs(mono).max() < 1e-3:
        return "silent"
    if audio.clipped_fraction(mono) > _CLIPPED:
        return "clipped"
    mono = mono - mono.mean()
    loud = _loud_frames(mono, rate_hz)
    size, margin = round(_FRAME_S * rate_hz), round(PAUSE_S * rate_hz)
    where = np.flatnonzero(loud)
    mono = mono[max(0, where[0] * size - margin) : (where[-1] + 1) * size + margin]
    if not SHORTEST_S <= len(mono) / rate_hz <= LONGEST_S:
        return "too short" if len(mono) / rate_hz < SHORTEST_S else "too long"
    if np.isfinite(pitch_hz(mono, rate_hz)).mean() < _LEAST_VOICED:
        return "not voiced"
    if audio.bandwidth_hz(mono, rate_hz) < _LEAST_BANDWIDTH_HZ:
        return "dull"
    return _levelled(mono, rate_hz).astype(np.float32)


def _loud_frames(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    """Which frames of 20 ms lie within 35 dB of the loudest."""
    size = round(_FRAME_S * rate_hz)
    padded = np.pad(mono, (0, -len(mono) % size))
    power = np.square(padded.reshape(-1, size)).mean(1)
    return power >= power.max() * 10 ** (-_SPEECH_RANGE_DB / 10)


def _levelled(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    size = round(_FRAME_S * rate_hz)
    speech = np.repeat(_loud_frames(mono, rate_hz), size)[: len(mono)]
    gain = 10 ** (LEVEL_DB / 20) / np.sqrt(np.square(mono[speech]).mean())
    return mono * min(gain, PEAK / np.abs(mono).max())
