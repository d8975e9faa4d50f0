"""Scores of clips with echo, which rows come of them, and the tables."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from allears.audio.metrics import collect_reasons, paired_bootstrap_interval
from allears.audio.metrics import echo_clip as metrics_of_clip
from allears.audio.metrics.echo_clip import ECHO_METRICS

from .echo_clips import Cancelled, EchoClip
from .scores import Case, ClipScore, interval_row, summarise

INPUT = "input"
CASES = ("far", "double", "near", "path_change")
METRICS = ECHO_METRICS
_COMPARED = ("erle_db", "aecmos_echo", "aecmos_deg", "pesq_wb", "si_sdr_db", "sdr512_db")


def score_echo(clip: EchoClip, found: Cancelled, metrics: Sequence[str]) -> tuple[dict[str, float], str]:
    """Scores of one system on one clip, NaN where a metric says nothing of such clips or the output cannot be scored,
    and notes."""
    try:
        with collect_reasons() as reasons:
            scores = metrics_of_clip.score_echo(clip.truth, *found)
    except (ValueError, ImportError) as error:
        return dict.fromkeys(metrics, math.nan), str(error)
    note = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if name != "recovery_s")
    return {name: scores[name] for name in metrics}, note


def names_of(facts: Mapping[str, Any]) -> list[str]:
    """The cases that a clip belongs to: its own, and cells of it by delay, loudspeaker, level ratio, noise, change."""
    name = facts["case"]
    if name == "near":
        cells = ["clean" if facts["snr_db"] is None else "noisy"]
    elif name == "path_change":
        cells = [f"{facts['set']}-{facts['scenario']}"]
    else:
        by = f"{facts['delay_ms']:.0f}ms" if name == "far" else f"ser{facts['ser_db']:+.0f}db"
        cells = [by, "linear" if facts["linear"] else "distorts"]
    return [name, *(f"{name}-{cell}" for cell in cells)]


def cases(entries: Sequence[ClipScore]) -> list[Case]:
    """Every case of the clips, the main ones first."""
    found = dict.fromkeys(name for entry in entries for name in names_of(entry.facts))
    names = [name for name in CASES if name in found] + [name for name in found if name not in CASES]
    return [(name, lambda facts, name=name: name in names_of(facts)) for name in names]


def rows_of(entries: Sequence[ClipScore], systems: Sequence[str]) -> list[dict[str, Any]]:
    """Means with intervals, gains over the input, differences of any two systems in the main cases; no empty row."""
    rows = summarise(entries, systems, METRICS, cases(entries), baseline=INPUT)
    values = {(entry.clip, entry.system): entry.scores for entry in entries}
    for name, belongs in cases(entries):
        clips = list(dict.fromkeys(entry.clip for entry in entries if belongs(entry.facts)))
        for first, second in combinations([system for system in systems if system != INPUT], 2):
            for metric in _COMPARED if name in CASES else ():
                pair = ([values[clip, system][metric] for clip in clips] for system in (second, first))
                rows.append(interval_row(name, f"{second}_minus_{first}", metric, paired_bootstrap_interval(*pair)))
    return [row for row in rows if row["n"]]


def table_rows(rows: Sequence[Mapping[str, Any]], which: str) -> dict[str, dict[str, str]]:
    """System -> metric -> mean with its interval, of one case."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["case"] == which and row["metric"] in METRICS and "_minus_" not in row["system"]:
            text = f"{row['value']:.3g} ({row['low']:.3g}..{row['high']:.3g})"
            found.setdefault(row["system"], {})[row["metric"]] = text
    return found
