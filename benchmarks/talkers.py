"""Clips with several talkers, and how well the outputs of a separator hold them.

Shapes: J outputs, K talkers, T samples; audio is float32, scores are computed in float64.
"""

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allears.audio.metrics import si_sdr_db
from allears.audio.resample import resample

from .clips import RATE_HZ, spread

FLOOR_DB = -30.0
"""What an output with nothing of the talker in it counts: silence has no SI-SNR."""
_THERE = 1e-6  # of the mixture's power, 60 dB under it: a source that is there
_TALKS = 1e-2  # of the loudest talker's power, 20 dB under it: a talker who does not pause in this stretch


class TalkerClip(NamedTuple):
    """``mixture`` (T,) and ``sources`` (K, T), those who are there, at ``rate_hz``."""

    id: str
    mixture: np.ndarray
    sources: np.ndarray
    facts: dict[str, Any]
    rate_hz: int = RATE_HZ

    def at_rate(self, rate_hz: int) -> "TalkerClip":
        """The clip at another rate."""
        mixture = resample(self.mixture[None], self.rate_hz, rate_hz)[0]
        return self._replace(mixture=mixture, sources=resample(self.sources, self.rate_hz, rate_hz), rate_hz=rate_hz)

    def cut(self, first: int, count: int) -> "TalkerClip":
        """``count`` samples from ``first`` on; all sources stay."""
        return self._replace(
            mixture=self.mixture[first : first + count], sources=self.sources[:, first : first + count]
        )


def from_manifest(
    corpus: Path, manifest: Path, limit: int | None = None, shortest_s: float = 0.0
) -> Iterator[TalkerClip]:
    """The clips of a manifest, rendered from a prepared corpus at 16 kHz, without sources that are silent.

    Args:
        limit: only so many, spread evenly.
        shortest_s: only those of this length or more.
    """
    from allears.data.talkers import read_talkers
    from allears.data.talkers_render import render_talker_set

    specs = [spec for spec in read_talkers(manifest) if spec.frames >= shortest_s * RATE_HZ]
    chosen = {specs[index].id for index in spread(len(specs), limit)}
    for name, mixture, sources, facts in render_talker_set(corpus, manifest, lambda spec: spec.id in chosen):
        mixture, sources = np.asarray(mixture, np.float32), np.asarray(sources, np.float32)
        yield TalkerClip(name, mixture, sources[power(sources) > _THERE * power(mixture)], facts)


def power(x: np.ndarray) -> np.ndarray:
    """Mean square over the last axis, in float64."""
    return np.square(x.astype(np.float64)).mean(-1)


def si_snr_db(estimates: np.ndarray, references: np.ndarray) -> np.ndarray:
    """SI-SNR in dB over the last axis: SI-SDR with the means taken off, no less than :data:`FLOOR_DB`. NaN stays."""
    pair = np.broadcast_arrays(estimates.astype(np.float64), references.astype(np.float64))
    first, second = (x - x.mean(-1, keepdims=True) for x in pair)
    return np.maximum(np.asarray(si_sdr_db(first, second)), FLOOR_DB)


def assign(outputs: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output that holds each talker, for the whole stretch, by the best mean SI-SNR.

    Returns:
        The index of each talker's output (K,), all different, and their SI-SNR (K,).

    Raises:
        ValueError: there are fewer outputs than talkers.
    """
    if len(outputs) < len(sources):
        raise ValueError(f"outputs: {len(outputs)} for {len(sources)} talkers; each talker needs an output of its own")
    scores = si_snr_db(outputs[None], sources[:, None])  # (K, J)
    orders = np.array(list(permutations(range(len(outputs)), len(sources))))
    chosen = scores[np.arange(len(sources)), orders]  # (orders, K)
    best = int(chosen.sum(1).argmax())
    return orders[best], chosen[best]


def sdr_db(estimate: np.ndarray, reference: np.ndarray, taps: int = 512) -> float:
    """SDR of BSS Eval in dB: what of the estimate (T,) is the reference under any filter of ``taps`` coefficients.

    Vincent, Gribonval, Fevotte, "Performance measurement in blind audio source separation", 2006.
    """
    size = 1 << int(len(estimate) + taps - 1).bit_length()
    spectra = [np.fft.rfft(x.astype(np.float64), size) for x in (reference, estimate)]
    own = np.fft.irfft(np.abs(spectra[0]) ** 2, size)[:taps]
    cross = np.fft.irfft(spectra[0].conj() * spectra[1], size)[:taps]
    lags = np.abs(np.subtract.outer(np.arange(taps), np.arange(taps)))
    total = float(np.square(estimate.astype(np.float64)).sum())
    if not own[0] > 0 or not total > 0:
        return FLOOR_DB
    held = float(cross @ np.linalg.solve(own[lags] + 1e-9 * own[0] * np.eye(taps), cross))
    return max(FLOOR_DB, 10 * float(np.log10(max(held, 1e-300) / max(total - held, 1e-12 * total))))


def separation_scores(outputs: np.ndarray, clip: TalkerClip) -> tuple[dict[str, float], np.ndarray]:
    """Means over the talkers: ``si_snr_db``, and of two or more the gains over the mixture ``si_snri_db``, ``sdri_db``.

    Returns:
        The scores, and the output of each talker (K,).
    """
    order, scores = assign(outputs, clip.sources)
    found = {"si_snr_db": float(scores.mean())}
    if len(clip.sources) > 1:
        found["si_snri_db"] = float((scores - si_snr_db(clip.mixture, clip.sources)).mean())
        pairs = zip(outputs[order], clip.sources, strict=True)
        found["sdri_db"] = float(np.mean([sdr_db(o, s) - sdr_db(clip.mixture, s) for o, s in pairs]))
    return found, order


def long_scores(outputs: np.ndarray, clip: TalkerClip, window: int) -> dict[str, float]:
    """Scores of a stretch of a long clip, over the talkers who do not pause in it; NaN where that is fewer than two.

    ``si_snri_db`` is over the whole stretch. ``window_si_snri_db`` is the mean over its windows of ``window`` samples,
    with one output for each talker over the whole stretch: so stretches of different lengths can be compared.
    """
    talking = np.flatnonzero(talks(clip.sources))
    if len(talking) < 2:
        return {"si_snri_db": np.nan, "window_si_snri_db": np.nan}
    sources = clip.sources[talking]
    order, scores = assign(outputs, sources)
    held, gains = outputs[order], []
    for first in range(0, len(clip.mixture) - window + 1, window):
        span = slice(first, first + window)
        at = np.flatnonzero(talks(sources[:, span]))
        if len(at) > 1:
            after, before = (si_snr_db(x, sources[at, span]) for x in (held[at, span], clip.mixture[span]))
            gains.append(float((after - before).mean()))
    whole = float((scores - si_snr_db(clip.mixture, sources)).mean())
    return {"si_snri_db": whole, "window_si_snri_db": float(np.mean(gains)) if gains else np.nan}


def talks(sources: np.ndarray) -> np.ndarray:
    """Which of (K, T) talk in this stretch, (K,)."""
    powers = power(sources)
    return (powers > 0) & (powers >= _TALKS * powers.max(initial=0.0))
