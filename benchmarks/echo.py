"""Echo cancellation: every system on every clip of the test sets, in one run, with intervals."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import results
from .echo_clips import Cancelled, EchoClip, alone, from_manifest, in_batches
from .echo_scores import CASES, INPUT, METRICS, rows_of, score_echo, table_rows
from .enhance import check_alignment, describe
from .enhance_ablation import parse_weights
from .registry import NotInstalledError, case, systems_for
from .scores import ClipScore, score_in_background, write_csv
from .speed import synthetic_voice

if TYPE_CHECKING:
    from .systems.echo import Cancel

logger = logging.getLogger("benchmarks")

SETS = {"far": "far", "double": "double", "near": "near", "jump": "path_change", "path": "path_change"}
"""Test sets, and the case of each."""
PEERS = (INPUT, "speex", "webrtc_aec3", "kalman_oracle")


@case("echo")
@dataclass
class EchoCase:
    """Score weights and peers on the test sets with echo; write benchmarks/results/NAME.json and OUT/NAME.csv."""

    weights: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """NAME=PATH of weights (a path stem, a folder or a shipped name); NAME is the system in the rows."""

    systems: tuple[str, ...] = PEERS
    """Which systems beside the weights; there are also speex_linear and speex_oracle."""

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifests render from."""

    sets_folder: Path = results.ROOT / "benchmarks/sets"
    """Folder of the manifests, echo-SET.jsonl."""

    sets: tuple[str, ...] = tuple(SETS)
    """Which test sets."""

    limit: int | None = None
    """Only so many clips of each set, spread evenly."""

    batch: int = 4
    """Clips that a system gets at once."""

    device: str = "auto"
    """Of the weights: cuda, cpu or auto."""

    workers: int = 2
    """Processes that compute the metrics."""

    name: str = "echo"
    """Name of the result files."""

    out: Path = Path("out/benchmarks")
    """Folder of the per-clip CSV."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console = Console()
        if unknown := [name for name in self.sets if name not in SETS]:
            raise ValueError(f"sets: {unknown} given; known are {', '.join(SETS)}")
        systems, notes = self._load()
        notes += delays(systems, synthetic_voice(4.0, noise_level=0.0))
        entries: list[ClipScore] = []
        jobs = self._cancelled(systems, notes, console)
        for entry in score_in_background(jobs, METRICS, self.workers, score_echo):
            entries.append(entry)
        if not entries:
            raise ValueError(f"sets_folder: {str(self.sets_folder)!r} holds none of {', '.join(self.sets)}")
        failed = [f"{e.system} on {e.clip}: {e.note}" for e in entries if e.note]
        notes += failed[:20] + ([f"... and {len(failed) - 20} more notes in the CSV"] if len(failed) > 20 else [])
        if find_spec("silero_vad") is None:
            notes.append("self_trigger: left out: silero-vad is not installed")
        write_csv(self.out / f"{self.name}.csv", entries, METRICS)
        rows = rows_of(entries, list(systems))
        path = results.write(self.name, rows, notes, self.results_folder)
        for which in CASES:
            show(table_rows(rows, which), which, console)
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {path} and {self.out / self.name}.csv")
        return 0

    def _load(self) -> "tuple[dict[str, Cancel], list[str]]":
        """The systems that run here by the name of their rows, and what each is, or why it is missing."""
        loaded: dict[str, Cancel] = {}
        notes = []
        for system in systems_for("echo", self.systems):
            name = system.name.replace("_", "-")
            try:
                loaded[name] = system.load()
                notes.append(f"{name}: {describe(system)}")
            except NotInstalledError as error:
                logger.warning("%s is MISSING from this run: %s", name, error)
                notes.append(f"{name}: MISSING: {error}")
        ours = systems_for("echo", ("allears",)) if self.weights else []
        for name, path in (parse_weights(text) for text in self.weights):
            if name in loaded:
                raise ValueError(f"weights: the name {name!r} is given twice, or that of another system")
            loaded[name] = ours[0].load(name_or_folder=path, device=self.device)
            canceller = loaded[name].canceller  # type: ignore[attr-defined]
            notes.append(
                f"{name}: {canceller.parameters / 1e6:.2f} M parameters, on {canceller.device}, {canceller.config}"
            )
        if not loaded:
            raise ValueError("systems: none of them can run here; see the warnings above")
        return loaded, notes

    def _cancelled(
        self, systems: "Mapping[str, Cancel]", notes: list[str], console: Console
    ) -> Iterator[tuple[ClipScore, EchoClip, Cancelled | None]]:
        """Every clip through every system."""
        for of_set in self.sets:
            manifest = self.sets_folder / f"echo-{of_set}.jsonl"
            if not manifest.exists():
                logger.warning("%s is left out: %s does not exist", of_set, manifest.name)
                notes.append(f"{of_set}: left out: {manifest.name} does not exist")
                continue
            clips = track(
                from_manifest(self.corpus, manifest, self.limit), of_set, console=console, transient=True, total=None
            )
            for batch in in_batches(clips, self.batch):
                yield from cancelled(systems, of_set, batch)


def delays(systems: "Mapping[str, Cancel]", clean: np.ndarray) -> list[str]:
    """How late each system comes on a voice (S,) with nothing played, as notes.

    Raises:
        ValueError: more than half a millisecond.
    """
    found = []
    for name, cancel in systems.items():
        late = check_alignment(name, lambda x, cancel=cancel: cancel([alone("alone", x)])[0].output, clean)
        found.append(f"{name}: {late} samples late on a voice alone, after what the system takes off itself")
    return found


def cancelled(
    systems: "Mapping[str, Cancel]", of_set: str, batch: list[EchoClip]
) -> Iterator[tuple[ClipScore, EchoClip, Cancelled | None]]:
    """What each system gives for each clip; one that raises gives ``None`` and a note."""
    for name, cancel in systems.items():
        found: Iterable[Cancelled | None] = [None] * len(batch)
        note, start = "", time.perf_counter()
        try:
            found = cancel(batch)
        except Exception as error:  # a peer's failure is a result
            logger.exception("%s fails on %s", name, batch[0].id)
            note = f"failed: {error!r}"
        seconds = (time.perf_counter() - start) / len(batch)
        for clip, one in zip(batch, found, strict=True):
            facts = {**clip.facts, "case": SETS[of_set], "set": of_set}
            yield ClipScore(clip.id, name, facts, seconds=seconds, note=note), clip, one


def show(systems: Mapping[str, Mapping[str, str]], which: str, console: Console) -> None:
    """Print a case: a line a metric, a column a system."""
    if not systems:
        return
    table = Table(title=f"{which}: mean and 95 % interval", title_justify="left")
    table.add_column("")
    for name in systems:
        table.add_column(name, justify="right")
    for metric in METRICS:
        cells = [row.get(metric, "-") for row in systems.values()]
        if set(cells) != {"-"}:
            table.add_row(metric, *cells)
    console.print(table)
