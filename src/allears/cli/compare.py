"""The report and the scores of a verb that turns one file into another: input against output."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allears.audio.files import AudioReader, probe
from allears.audio.report import CLIP_S, ReportEntry, Track, clock, is_report, write_report
from allears.cli.batch import Done
from allears.core.errors import MissingDependencyError

logger = logging.getLogger(__name__)

MAX_ENTRIES = 20
"""A page holds the sound of this many files at most; it says how many it leaves out."""

LABELS = {
    "pesq_wb": "PESQ-WB",
    "si_sdr_db": "SI-SDR, dB",
    "estoi": "ESTOI",
    "dnsmos_sig": "DNSMOS speech",
    "dnsmos_bak": "DNSMOS background",
    "dnsmos_ovrl": "DNSMOS overall",
}

EARLIER = {"finished": "by an earlier run"}


def check_page(page: Path) -> None:
    """Refuse, before any work, to replace a foreign file by a report.

    Raises:
        ValueError: there is one.
    """
    if page.exists() and not is_report(page):
        raise ValueError(f"report: {str(page)!r} exists and is no report of allears; move it away")


def write_page(
    page: Path, title: str, done: Sequence[Done], entry: Callable[[Done], ReportEntry], summary: Mapping[str, str]
) -> list[ReportEntry]:
    """Draw the finished files and write the page; returns what it shows."""
    entries = [entry(item) for item in done[:MAX_ENTRIES]]
    facts = dict(summary)
    if len(done) > MAX_ENTRIES:
        facts["shown here"] = f"the first {MAX_ENTRIES} of {len(done)} files"
    if any((shown.duration_s or 0) > CLIP_S and shown.tracks[0].scores for shown in entries):
        facts["scores"] = f"over the first {CLIP_S:.0f} s of each file"
    write_report(page, title, entries, facts)
    return entries


@dataclass(frozen=True)
class Comparison:
    """What is written about a run: the page's place and names, and a clean reference where the user has one."""

    page: Path
    title: str
    before: str
    after: str
    reference: Path | None = None

    def check(self, sources: Sequence[Path]) -> None:
        """Refuse, before any work, what would fail after it.

        Raises:
            ValueError: the page would replace a foreign file, or the reference does not fit the input.
        """
        check_page(self.page)
        if self.reference is None:
            return
        if len(sources) != 1:
            raise ValueError(f"reference: one reference fits one input file, got {len(sources)} inputs")
        clean, noisy = probe(self.reference), probe(sources[0])
        for what in ("sample_rate_hz", "channels"):
            if getattr(clean, what) != getattr(noisy, what):
                raise ValueError(
                    f"reference: {what} is {getattr(clean, what)}, but the input's is {getattr(noisy, what)}; "
                    "give a reference of the same format"
                )

    def write(self, done: Sequence[Done], summary: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Score and draw the finished files, write the page, and return mean scores: track name to metric to value."""
        entries = write_page(self.page, self.title, done, self._entry, summary)
        means = {name: _means(entries, index) for index, name in enumerate((self.before, self.after))}
        return means if any(means.values()) else {}

    def _entry(self, item: Done) -> ReportEntry:
        source, destination = item.target.source, item.target.destination
        length_s = probe(source).duration_s
        noisy, rate = start(source)
        clean, clean_rate = start(destination)
        reference = start(self.reference)[0] if self.reference else None
        return ReportEntry(
            title=str(destination),
            tracks=[
                Track(self.before, noisy, rate, length_s, scores(noisy, rate, reference)),
                Track(self.after, clean, clean_rate, length_s, scores(clean, clean_rate, reference)),
            ],
            elapsed_s=item.result.elapsed_s if item.result else None,
            duration_s=item.result.duration_s if item.result else length_s,
            facts={} if item.result else EARLIER,
        )


def scores(audio: np.ndarray, sample_rate_hz: int, reference: np.ndarray | None) -> dict[str, float]:
    """The default metrics of (C, T), by label; a metric whose package is missing is left out."""
    from allears.audio.metrics import DEFAULT_METRICS, REFERENCE_FREE_METRICS, collect_reasons, score_clip

    if reference is not None:
        length = min(audio.shape[-1], reference.shape[-1])
        audio, reference = audio[..., :length], reference[..., :length]
    found: dict[str, float] = {}
    groups: list[Sequence[str]] = [REFERENCE_FREE_METRICS]
    if reference is not None:
        groups = [*([metric] for metric in DEFAULT_METRICS if metric not in REFERENCE_FREE_METRICS), *groups]
    for group in groups:
        try:
            with collect_reasons():
                values = score_clip(reference, audio, sample_rate_hz, metrics=group)
        except MissingDependencyError as error:
            logger.info("%s", error)
            continue
        found |= {LABELS[name]: value for name, value in values.items() if not math.isnan(value)}
    return found


def to_text(means: Mapping[str, Mapping[str, float]]) -> str:
    """The mean scores as a small table for the terminal: a row a metric, a column a track, and the change."""
    tracks = list(means)
    metrics = list(dict.fromkeys(metric for track in tracks for metric in means[track]))
    widths = [max(len(metric) for metric in ["score", *metrics]), *(max(8, len(track)) for track in tracks), 8]
    rows: list[list[str]] = [["score", *tracks, "change"]]
    for metric in metrics:
        values = [means[track].get(metric, math.nan) for track in tracks]
        change = values[-1] - values[0]
        cells = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        rows.append([metric, *cells, f"{change:+.2f}" if math.isfinite(change) else ""])
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def total(done: Sequence[Done]) -> dict[str, str]:
    """Length, time and real-time factor of everything that this run processed."""
    fresh = [item.result for item in done if item.result is not None]
    length_s, elapsed_s = sum(r.duration_s for r in fresh), sum(r.elapsed_s for r in fresh)
    facts = {"files": str(len(done))}
    if fresh:
        facts |= {"audio": clock(length_s), "time taken": f"{elapsed_s:.1f} s"}
        facts["real-time factor"] = f"{elapsed_s / max(length_s, 1e-9):.3f}"
    return facts


def start(path: Path) -> tuple[np.ndarray, int]:
    """The first ``CLIP_S`` seconds, (C, T), and the rate in Hz."""
    blocks: list[np.ndarray] = []
    with AudioReader(path, on_nonfinite="zero") as reader:
        wanted = int(CLIP_S * reader.info.sample_rate_hz)
        for block in reader:
            blocks.append(block)
            wanted -= block.shape[1]
            if wanted <= 0:
                break
        audio = np.concatenate(blocks, axis=1)
        return audio[:, : int(CLIP_S * reader.info.sample_rate_hz)], reader.info.sample_rate_hz


def _means(entries: Sequence[ReportEntry], index: int) -> dict[str, float]:
    metrics = dict.fromkeys(metric for entry in entries for metric in entry.tracks[index].scores)
    values = {m: [e.tracks[index].scores[m] for e in entries if m in e.tracks[index].scores] for m in metrics}
    return {metric: float(np.mean(found)) for metric, found in values.items()}
