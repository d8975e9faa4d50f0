"""Rows of separation scores: means over clips, differences between systems on the same clips, and what length costs."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from rich.table import Table

from allears.audio.metrics import bootstrap_interval, paired_bootstrap_interval

from .scores import ClipScore, interval_row, summarise

INPUT = "mixture"
METRICS = ("si_snri_db", "si_snr_db", "sdri_db", "window_si_snri_db", "count_accuracy")
LENGTHS_S = (4, 16, 60)
"""Of the pieces that the long clips are cut into; the network hears each at once."""
_COMPARED = ("si_snri_db", "window_si_snri_db")


def mean(values: Iterable[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def add_voices(entries: Sequence[ClipScore], voices: Iterable[ClipScore], metrics: Sequence[str]) -> None:
    """Give each clip the mean over its voices, and NaN where it has no score."""
    found: dict[tuple[str, str], list[ClipScore]] = defaultdict(list)
    for voice in voices:
        found[voice.clip, voice.system].append(voice)
    for entry in entries:
        own = found[entry.clip, entry.system]
        entry.scores |= {metric: mean(voice.scores[metric] for voice in own) for metric in metrics}
        entry.scores = {metric: entry.scores.get(metric, math.nan) for metric in (*METRICS, *metrics)}
        entry.note = "; ".join(filter(None, (voice.note for voice in own)))


def rows_of(entries: Sequence[ClipScore], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Means, gains of voice metrics over the mixture, differences of systems and of lengths; without empty rows."""
    rows = []
    for name in dict.fromkeys(entry.facts["case"] for entry in entries):
        part = [entry for entry in entries if entry.facts["case"] == name]
        rates = {entry.system: entry.facts["rate_hz"] for entry in part}
        rows += summarise(part, list(rates), metrics, ((name, lambda facts: True),), baseline=INPUT)
        for first, second in combinations([system for system in rates if system != INPUT], 2):
            for metric in _COMPARED if rates[first] == rates[second] else ():
                values = (of_clips(part, system, metric) for system in (second, first))
                rows.append(paired_row(name, f"{second}_minus_{first}", metric, *values))
    for system in dict.fromkeys(entry.system for entry in entries):
        right = [e.scores["count_accuracy"] for e in entries if e.system == system]
        rows.append(interval_row("count-16k", system, "count_accuracy", bootstrap_interval(right)))
        lengths = [[e for e in entries if e.facts["case"] == f"clean2-{seconds}s"] for seconds in LENGTHS_S]
        for metric in _COMPARED:
            short, *others = (of_clips(part, system, metric) for part in lengths)
            for seconds, long in zip(LENGTHS_S[1:], others, strict=True):
                rows.append(paired_row(f"clean2-{seconds}s", system, f"{metric}_minus_{LENGTHS_S[0]}s", long, short))
    known_gains = tuple(f"{metric}_gain" for metric in METRICS)
    return [row for row in rows if row["n"] and row["metric"] not in known_gains]


def of_clips(entries: Sequence[ClipScore], system: str, metric: str) -> dict[str, float]:
    """Clip -> value, by the clip's own name: the same in all cases of its set."""
    return {entry.clip.partition("/")[2]: entry.scores[metric] for entry in entries if entry.system == system}


def paired_row(
    name: str, system: str, metric: str, values: Mapping[str, float], others: Mapping[str, float]
) -> dict[str, Any]:
    """The mean of ``values`` less ``others`` over the clips that both have."""
    both = [clip for clip in values if clip in others]
    interval = paired_bootstrap_interval([values[clip] for clip in both], [others[clip] for clip in both])
    return interval_row(name, system, metric, interval)


def tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table a case, a line a system; 95 % intervals are in the result file."""
    found = []
    for which in dict.fromkeys(r["case"] for r in rows):
        values = {(r["system"], r["metric"]): r for r in rows if r["case"] == which}
        metrics = [metric for metric in dict.fromkeys(metric for _, metric in values) if not metric.endswith("_gain")]
        table = Table(title=f"{which}: {max(r['n'] for r in values.values())} clips", title_justify="left")
        table.add_column("system")
        for metric in metrics:
            table.add_column(metric.replace("_", " "), justify="right")
        for system in dict.fromkeys(system for system, _ in values):
            own = [values.get((system, metric)) for metric in metrics]
            table.add_row(system, *("-" if r is None else f"{r['value']:.4g}" for r in own))
        found.append(table)
    return found
