"""Speech enhancement: every system on every clip of a test set, in one run, with intervals and gains over the input."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from allears.audio.metrics import DEFAULT_METRICS, delay_samples

from . import results
from .clips import Clip, from_folder, from_manifest
from .registry import Enhance, NotInstalledError, System, case, systems_for
from .scores import ClipScore, score_in_background, summarise, write_csv

logger = logging.getLogger("benchmarks")

MAX_LATE_SAMPLES = 8  # half a millisecond: a system later than this is not aligned, and its scores would be wrong
CASES = (
    ("test", lambda facts: True),
    ("dry", lambda facts: facts.get("reverberant") is False),
    ("reverberant", lambda facts: facts.get("reverberant") is True),
)


@case("enhance")
@dataclass
class EnhanceCase:
    """Score every system on every clip of a test set; write benchmarks/results/NAME.json and OUT/NAME.csv."""

    test_set: Annotated[Path, tyro.conf.Positional]
    """A test-set manifest (needs --corpus), or a folder with noisy/, reference/ and facts.json."""

    corpus: Path | None = None
    """The prepared corpus that the manifest renders from."""

    systems: tuple[str, ...] = ()
    """Which systems; all by default."""

    metrics: tuple[str, ...] = DEFAULT_METRICS
    """Which metrics."""

    weights: str | None = None
    """Weights of the system allears: a shipped name or a folder."""

    steps: int | None = None
    """Sampler steps of the system allears."""

    limit: int | None = None
    """Only the first clips."""

    workers: int = 2
    """Processes that score."""

    name: str = "enhance"
    """Name of the result files."""

    out: Path = Path("out/benchmarks")
    """Folder of the per-clip CSV."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console = Console()
        loaded, notes = self._load()
        clips = self._clips()
        first = next(clips, None)
        if first is None:
            raise ValueError(f"test_set: {str(self.test_set)!r} holds no clip")
        for name, enhance in loaded.items():
            late = check_alignment(name, enhance, first.reference)
            notes.append(f"{name}: {late} samples late on clean speech, after what the system takes off itself")
        entries: list[ClipScore] = []
        jobs = enhanced(loaded, track(chain([first], clips), "clips", console=console, transient=True))
        for entry in score_in_background(jobs, self.metrics, self.workers):
            entries.append(entry)
        failed = [f"{e.system} on {e.clip}: {e.note}" for e in entries if e.note]
        notes += failed[:20] + ([f"... and {len(failed) - 20} more notes in the CSV"] if len(failed) > 20 else [])
        write_csv(self.out / f"{self.name}.csv", entries, self.metrics)
        rows = summarise(entries, list(loaded), self.metrics, CASES, baseline="noisy")
        path = results.write(self.name, rows, notes, self.results_folder)
        for which, _ in CASES:
            console.print(*tables(rows, which, self.metrics))
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {path} and {self.out / self.name}.csv")
        return 0

    def _clips(self) -> Iterator[Clip]:
        if self.test_set.is_dir():
            found = from_folder(self.test_set)
        elif self.corpus is None:
            raise ValueError("corpus: a manifest renders from a prepared corpus; give --corpus FOLDER")
        else:
            found = from_manifest(self.corpus, self.test_set)
        return islice(found, self.limit)

    def _load(self) -> tuple[dict[str, Enhance], list[str]]:
        """The systems that run here, and a note on each that is missing or shows its versions."""
        options = {"name_or_folder": self.weights, "steps": self.steps}
        options = {key: value for key, value in options.items() if value is not None}
        loaded, notes = {}, []
        for system in systems_for("enhance", self.systems):
            try:
                loaded[system.name] = system.load(**(options if system.name == "allears" else {}))
                notes.append(f"{system.name}: {describe(system)}")
            except NotInstalledError as error:
                logger.warning("%s is MISSING from this run: %s", system.name, error)
                notes.append(f"{system.name}: MISSING: {error}")
        if not loaded:
            raise ValueError("systems: none of them can run here; see the warnings above")
        return loaded, notes


def describe(system: System) -> str:
    """What the system is, with package versions."""
    packages = ", ".join(f"{package} {version}" for package, version in system.versions().items())
    return f"{system.about} ({packages})" if packages else system.about


def check_alignment(name: str, enhance: Enhance, clean: np.ndarray) -> int:
    """Delay of a system on clean speech, in samples at 16 kHz.

    Raises:
        ValueError: it is more than half a millisecond, or the length changed.
    """
    output = enhance(clean)
    if output.shape != clean.shape:
        raise ValueError(f"{name}: returned {output.shape} for {clean.shape}; a system must keep the length")
    late = delay_samples(output, clean, max_lag=1600)
    if abs(late) > MAX_LATE_SAMPLES:
        raise ValueError(f"{name}: comes {late} samples late; take its delay off in benchmarks/systems")
    return late


def enhanced(
    systems: dict[str, Enhance], clips: Iterable[Clip]
) -> Iterator[tuple[ClipScore, np.ndarray, np.ndarray | None]]:
    """Each clip through each system; one that raises gives ``None`` and a note."""
    for clip in clips:
        for name, enhance in systems.items():
            entry, output = ClipScore(clip.id, name, clip.facts), None
            start = time.perf_counter()
            try:
                output = enhance(clip.noisy)
            except Exception as error:  # a peer's failure is a result
                logger.exception("%s fails on %s", name, clip.id)
                entry.note = f"failed: {error!r}"
            entry.seconds = time.perf_counter() - start
            yield entry, clip.reference, output


def tables(rows: list[dict[str, Any]], which: str, metrics: tuple[str, ...]) -> list[Table]:
    """A rich table of one case (none if it has no rows): mean, and in brackets the gain over noisy."""
    chosen = {(r["system"], r["metric"]): r for r in rows if r["case"] == which}
    if not chosen:
        return []
    count = max(r.get("n", 0) for r in chosen.values())
    table = Table(title=f"{which}: {count} clips; mean (gain over noisy); 95 % intervals are in the result file")
    table.add_column("system")
    for metric in metrics:
        table.add_column(metric.removeprefix("dnsmos_"), justify="right")
    for name in dict.fromkeys(system for system, _ in chosen):
        table.add_row(name, *(_cell(chosen[name, m], chosen.get((name, f"{m}_gain"))) for m in metrics))
    return [table]


def _cell(mean: dict[str, Any], gain: dict[str, Any] | None) -> str:
    if mean["value"] is None:
        return "-"
    text = f"{mean['value']:.2f}"
    if gain and gain["value"] is not None:
        text += f" ({gain['value']:+.2f})"
    return text
