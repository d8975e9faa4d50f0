"""Are the voices of a corpus different voices? Minutes, pitch, and how near each lies to the next.

Voices are compared by speaker embeddings where ``resemblyzer`` is installed, else by the mean and spread of their
mel cepstra. A voice is measured against itself too: by the two halves of what it says.

Shapes: V voices, N clips, D features, T samples, F frames, M mel bands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from allears.audio.metrics.speaker import speaker_embedding
from allears.core.errors import CorpusError
from allears.data.bank import AudioBank
from allears.data.cast import pitches_hz
from allears.data.decode import SAMPLE_RATE_HZ

CLIPS = 16
"""So many clips of a voice are compared, spread evenly."""
SAME_VOICE = 0.9
"""Two voices whose embeddings have at least this cosine are reported as too alike. With 4 minutes of each, the halves
of one voice have 0.98 to 0.99; those of the table have up to 0.85 to one another, espeak-ng's among themselves up to
just below 0.90."""

_FFT, _HOP, _MELS, _CEPSTRA = 512, 256, 32, 20


@dataclass(frozen=True)
class VoiceReport:
    """One voice. ``nearest`` is the voice most like it, ``similarity`` the cosine to it, ``own`` that between its own
    halves. ``alike``: too near to ``nearest`` to count as another voice."""

    voice: str
    package: str
    licence: str
    minutes: float
    pitch_hz: float
    nearest: str
    similarity: float
    own: float
    alike: bool


def measure() -> str:
    """By what voices are compared here: ``"speaker embedding"`` or ``"mel cepstra"``."""
    return "speaker embedding" if find_spec("resemblyzer") else "mel cepstra"


def check_voices(folder: str | Path) -> list[VoiceReport]:
    """A report for each speaker of a prepared corpus, in its order.

    Raises:
        CorpusError: the corpus has fewer than two speakers, or a file is missing.
    """
    bank = AudioBank.from_corpus(folder, kinds=("speech",))
    speakers = bank.speakers()
    if len(speakers) < 2:
        raise CorpusError(f"{folder}: {len(speakers)} speakers; at least 2 are wanted to compare")
    names, items = list(speakers), [np.array(found) for found in speakers.values()]
    by_embedding = measure() == "speaker embedding"
    describe = speaker_embedding if by_embedding else cepstra
    halves = np.stack([_halves(bank, found, describe) for found in items])  # (V, 2, D)
    if not by_embedding:  # coordinates of different size: each is brought to the spread that it has over the voices
        halves = (halves - halves.mean((0, 1))) / np.maximum(halves.std((0, 1)), 1e-9)
    near, own = similarities(halves)
    pitches = pitches_hz(bank, items)
    reports = []
    for voice, name in enumerate(names):
        first, other = bank.items[items[voice][0]], int(near[voice].argmax())
        like = float(near[voice, other])
        alike = like >= (SAME_VOICE if by_embedding else float(min(own[voice], own[other])))
        minutes = float(bank.lengths[items[voice]].sum()) / SAMPLE_RATE_HZ / 60
        place = (name, first.package, first.licence, minutes, float(pitches[voice]), names[other], like)
        reports.append(VoiceReport(*place, float(own[voice]), alike))
    return reports


def similarities(halves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines between voices (V, V), -1 of a voice with itself, and between the halves of each (V,), out of the halves'
    descriptions (V, 2, D)."""
    whole, parts = _unit(halves.mean(1)), _unit(halves)
    near = whole @ whole.T
    np.fill_diagonal(near, -1.0)
    return near, (parts[:, 0] * parts[:, 1]).sum(-1)


def _halves(bank: AudioBank, found: Sequence[int] | np.ndarray, describe: Callable[..., np.ndarray]) -> np.ndarray:
    """Description (2, D) of a voice by its odd and its even clips."""
    some = found[:: max(1, len(found) // CLIPS)][:CLIPS]
    clips = np.stack([describe(bank.crop(int(index)), SAMPLE_RATE_HZ) for index in some])
    return np.stack([clips[::2].mean(0), clips[1::2].mean(0) if len(clips) > 1 else clips[0]])


def cepstra(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    """Mean and spread (D,) of the mel cepstra of the louder frames of a clip (T,), without their level."""
    padded = np.pad(mono, (0, max(0, _FFT - len(mono))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP] * np.hanning(_FFT)
    power = np.abs(np.fft.rfft(frames)) ** 2  # (F, bins)
    hertz = np.fft.rfftfreq(_FFT, 1 / rate_hz)
    place = np.log1p(hertz / 700) / np.log1p(rate_hz / 1400) * (_MELS + 1)
    bands = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(1, _MELS + 1)))
    energy = power.sum(1)
    mel = np.log(power[energy > 1e-3 * energy.max()] @ bands + 1e-8)  # (F, M)
    order = np.arange(1, _CEPSTRA + 1)
    basis = np.cos(np.pi * (np.arange(_MELS)[:, None] + 0.5) * order / _MELS)
    found = mel @ basis
    return np.concatenate([found.mean(0), found.std(0)])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
