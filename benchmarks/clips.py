"""Test clips for enhancement: rendered on the fly from a manifest, or read from a folder rendered before."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RATE_HZ = 16_000


class Clip(NamedTuple):
    """``noisy`` and ``reference`` are (T,) float32 at 16 kHz; ``facts["reverberant"]`` says in which half it counts."""

    id: str
    noisy: np.ndarray
    reference: np.ndarray
    facts: dict[str, Any]


def from_manifest(corpus: Path, manifest: Path) -> Iterator[Clip]:
    """The clips of a test-set manifest, rendered from a prepared corpus."""
    from allears.data.render import render_test_set

    for clip in render_test_set(corpus, manifest):
        yield Clip(*clip)


def from_folder(folder: Path) -> Iterator[Clip]:
    """The clips of a folder: ``noisy/ID.wav``, ``reference/ID.wav``, and, where known, ``facts.json`` with ID -> facts.

    Raises:
        ValueError: the folder holds no such clip, or a pair differs in rate or length.
    """
    from allears.audio.files import read

    facts_file = folder / "facts.json"
    facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
    noisy_files = sorted((folder / "noisy").glob("*.*"))
    if not noisy_files:
        raise ValueError(f"folder: {str(folder)!r} holds no noisy/*.wav")
    for file in noisy_files:
        noisy, rate = read(file)
        reference, reference_rate = read(folder / "reference" / file.name)
        if (rate, reference_rate) != (RATE_HZ, RATE_HZ) or noisy.shape != reference.shape or len(noisy) != 1:
            raise ValueError(
                f"folder: {file.name!r} and its reference must both be mono, {RATE_HZ} Hz, of equal length"
            )
        yield Clip(file.stem, noisy[0], reference[0], facts.get(file.stem, {}))


def write_folder(folder: Path, clips: Iterator[Clip]) -> int:
    """Write clips where :func:`from_folder` finds them; returns how many."""
    from allears.audio.writer import write

    facts = {}
    for clip in clips:
        for kind, audio in (("noisy", clip.noisy), ("reference", clip.reference)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            write(folder / kind / f"{clip.id}.wav", audio[None], RATE_HZ)
        facts[clip.id] = clip.facts
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    return len(facts)


def spread(count: int, limit: int | None) -> list[int]:
    """``limit`` of the indices 0 to ``count`` - 1, evenly; all without a limit.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit is None or limit >= count:
        return list(range(count))
    if limit < 1:
        raise ValueError(f"limit: got {limit}, wanted 1 or more")
    return [index * count // limit for index in range(limit)]
