"""Per-clip scores: computed in worker processes, kept as CSV, summed up with intervals and paired gains."""

import csv
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from allears.audio.metrics import Interval, bootstrap_interval, collect_reasons, paired_bootstrap_interval, score_clip

from .results import row

RATE_HZ = 16_000


@dataclass
class ClipScore:
    """What one system got on one clip; ``note`` says why a score is missing."""

    clip: str
    system: str
    facts: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""


def score(reference: np.ndarray, estimate: np.ndarray, metrics: Sequence[str]) -> tuple[dict[str, float], str]:
    """Scores and notes of one clip; an estimate that cannot be scored at all gives NaN everywhere."""
    try:
        with collect_reasons() as reasons:
            scores = score_clip(reference, estimate, RATE_HZ, metrics)
    except ValueError as error:
        return dict.fromkeys(metrics, math.nan), str(error)
    return scores, "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def score_in_background(
    jobs: Iterable[tuple[ClipScore, Any, Any]],
    metrics: Sequence[str],
    workers: int,
    score: Callable[..., tuple[dict[str, float], str]] = score,
) -> Iterator[ClipScore]:
    """Score (entry, reference, estimate) in ``workers`` processes while the caller's iterator makes the next ones.

    An estimate of ``None`` (the system failed) passes through with NaN. Entries come out in order. ``score`` takes
    reference, estimate and metrics, which are arrays and names for the one that is meant by default.
    """
    waiting: deque[tuple[ClipScore, Future | None]] = deque()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for entry, reference, estimate in jobs:
            job = None if estimate is None else pool.submit(score, reference, estimate, tuple(metrics))
            waiting.append((entry, job))
            if len(waiting) > 4 * workers:
                yield _finished(*waiting.popleft(), metrics)
        while waiting:
            yield _finished(*waiting.popleft(), metrics)


def _finished(entry: ClipScore, job: Future | None, metrics: Sequence[str]) -> ClipScore:
    if job is None:
        entry.scores = dict.fromkeys(metrics, math.nan)
    else:
        entry.scores, note = job.result()
        entry.note = "; ".join(filter(None, (entry.note, note)))
    return entry


def write_csv(path: Path, entries: Sequence[ClipScore], metrics: Sequence[str]) -> None:
    """One line a clip and system, facts as columns."""
    facts = list(dict.fromkeys(key for entry in entries for key in entry.facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["clip", "system", *facts, *metrics, "seconds", "note"])
        for e in entries:
            values = [f"{e.scores[m]:.6g}" for m in metrics]
            writer.writerow([e.clip, e.system, *(e.facts.get(k) for k in facts), *values, f"{e.seconds:.4g}", e.note])


Case = tuple[str, Callable[[Mapping[str, Any]], bool]]


def summarise(
    entries: Sequence[ClipScore], systems: Sequence[str], metrics: Sequence[str], cases: Sequence[Case], baseline: str
) -> list[dict[str, Any]]:
    """Result rows: for each case, system and metric the mean with its 95 % interval, and its gain over ``baseline``."""
    rows = []
    by_clip = {(entry.clip, entry.system): entry for entry in entries}
    for case, belongs in cases:
        clips = list(dict.fromkeys(entry.clip for entry in entries if belongs(entry.facts)))
        for name in systems if clips else ():
            for metric in metrics:
                values = [by_clip[clip, name].scores[metric] for clip in clips]
                rows.append(interval_row(case, name, metric, bootstrap_interval(values)))
                if name != baseline and baseline in systems:
                    base = [by_clip[clip, baseline].scores[metric] for clip in clips]
                    rows.append(interval_row(case, name, f"{metric}_gain", paired_bootstrap_interval(values, base)))
    return rows


def interval_row(case: str, system: str, metric: str, interval: Interval) -> dict[str, Any]:
    """A result row of a mean and its interval."""
    return row(case, system, metric, interval.mean, interval.low, interval.high, interval.n)
