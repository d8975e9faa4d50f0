"""Clips with echo for the benchmarks, and what a system gives for one.

Shapes: S samples at 16 kHz, T = ceil(S / 160) + 1 frames of 10 ms, of which frame t is centred at sample 160 t.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allears.audio.metrics.echo_clip import EchoTruth

from .clips import RATE_HZ, spread

HOP = RATE_HZ // 100


class EchoClip(NamedTuple):
    """A clip: what went into it, and ``facts``: its ``scenario`` (``far``, ``near`` or ``double``), ``delay_ms``,
    ``ser_db``, ``snr_db``, whether the loudspeaker is ``linear``, and when delay or path change (``changed_s``)."""

    id: str
    truth: EchoTruth
    facts: dict[str, Any]


class Cancelled(NamedTuple):
    """The near end (S,) float32, in time with the microphone; of a network also the delay found, in frames (T,)."""

    output: np.ndarray
    delay_frames: np.ndarray | None = None


def from_manifest(corpus: Path, manifest: Path, limit: int | None = None) -> Iterator[EchoClip]:
    """The clips of a manifest, rendered from a prepared corpus; ``limit`` of them, spread evenly."""
    from allears.data.echo_render import render_echo_set
    from allears.data.echo_spec import read_echoes

    specs = read_echoes(manifest)
    chosen = {specs[index].id for index in spread(len(specs), limit)}
    for name, batch, facts in render_echo_set(corpus, manifest, lambda spec: spec.id in chosen):
        arrays = {key: getattr(batch, key)[0].cpu().numpy() for key in EchoTruth._fields[1:-1]}
        truth = EchoTruth(scenario=facts["scenario"], changed_s=facts["changed_s"], **arrays)
        yield EchoClip(name, truth, facts)


def alone(name: str, near: np.ndarray) -> EchoClip:
    """A clip in which the far end is silent and the near end is in no room."""
    frames = -(-len(near) // HOP) + 1
    none, zero = np.zeros(frames, bool), np.zeros(frames, np.int64)
    return EchoClip(name, EchoTruth("near", near, np.zeros_like(near), near, near, zero, ~none, none), {})


def in_batches(clips: Iterable[EchoClip], size: int) -> Iterator[list[EchoClip]]:
    """At most ``size`` clips at a time, in order, all of one length."""
    batch: list[EchoClip] = []
    for clip in clips:
        if batch and (len(batch) == size or len(batch[0].truth.mic) != len(clip.truth.mic)):
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch
