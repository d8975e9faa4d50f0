"""Ablations of the enhancer: several weights at several numbers of solver steps, on the validation set."""

import logging
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import track

from allears.audio.metrics import DEFAULT_METRICS

from . import results
from .clips import from_manifest, spread
from .enhance import check_alignment, describe, enhanced, tables
from .registry import Enhance, case, systems_for
from .scores import ClipScore, score_in_background, summarise, write_csv

logger = logging.getLogger("benchmarks")


@case("enhance_ablation")
@dataclass
class EnhanceAblationCase:
    """Score each of the weights with each number of steps; the rows of N steps are the case steps_N."""

    weights: Annotated[tuple[str, ...], tyro.conf.Positional]
    """NAME=PATH of exported weights (a path stem or a shipped name); NAME is the system in the rows."""

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifest renders from."""

    clips: Path = results.ROOT / "benchmarks/sets/enhance-val.jsonl"
    """The manifest; choices are made on validation, never on test."""

    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Euler steps."""

    metrics: tuple[str, ...] = DEFAULT_METRICS
    """Which metrics."""

    limit: int | None = None
    """Only so many clips, spread evenly over the set."""

    workers: int = 2
    """Processes that score."""

    name: str = "enhance_ablation"
    """Name of the result files."""

    out: Path = Path("out/benchmarks")
    """Folder of the per-clip CSV."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console = Console()
        arms = dict(parse_weights(text) for text in self.weights)
        if not arms or "noisy" in arms:
            raise ValueError(f"weights: got {self.weights}, wanted one NAME=PATH or more, none of them named noisy")
        noisy, ours = systems_for("enhance", ("noisy", "allears"))
        loaded: dict[str, Enhance] = {"noisy": noisy.load()}
        for arm, path in arms.items():
            for count in self.steps:
                loaded[_label(arm, count)] = ours.load(name_or_folder=path, steps=count, solver="euler")
        notes = [f"noisy: {describe(noisy)}"]
        notes += [f"{arm}: {_facts(loaded[_label(arm, self.steps[0])])}" for arm in arms]
        clips = list(from_manifest(self.corpus, self.clips))
        chosen = spread(len(clips), self.limit)
        clips = [clips[index] for index in chosen]
        for arm in arms:
            check_alignment(arm, loaded[_label(arm, self.steps[0])], clips[0].reference)
        jobs = enhanced(loaded, track(clips, "clips", console=console, transient=True))
        entries = list(score_in_background(jobs, self.metrics, self.workers))
        notes += list(islice(chain(f"{e.system} on {e.clip}: {e.note}" for e in entries if e.note), 20))
        write_csv(self.out / f"{self.name}.csv", entries, self.metrics)
        rows = []
        for count in self.steps:
            which = f"steps_{count}"
            part = of_steps(entries, list(arms), count)
            rows += summarise(part, ["noisy", *arms], self.metrics, ((which, lambda facts: True),), baseline="noisy")
            console.print(*tables(rows, which, self.metrics))
        path = results.write(self.name, rows, notes, self.results_folder)
        console.print(f"written: {path} and {self.out / self.name}.csv")
        return 0


def _label(arm: str, count: int) -> str:
    return f"{arm}, {count} steps"


def parse_weights(text: str) -> tuple[str, str]:
    """``NAME=PATH`` as (name, path).

    Raises:
        ValueError: one of them is missing.
    """
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"weights: got {text!r}, wanted NAME=PATH")
    return name, path


def of_steps(entries: list[ClipScore], arms: list[str], count: int) -> list[ClipScore]:
    """Entries of the input and of the arms at ``count`` steps, named by their arm alone."""
    names = {_label(arm, count): arm for arm in arms} | {"noisy": "noisy"}
    return [replace(entry, system=names[entry.system]) for entry in entries if entry.system in names]


def _facts(enhance: Enhance) -> str:
    """Size and prior of loaded weights."""
    net = enhance.enhancer.net  # type: ignore[attr-defined]
    size = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    return f"{size:.2f} M parameters, {net.config.prior} prior, sigma {net.config.sigma}"
