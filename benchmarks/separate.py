"""Separation: weights on test sets of talkers that they never heard, all in one run on the same clips.

Shapes: J outputs, K talkers, T samples.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

from . import results
from .enhance_ablation import parse_weights
from .registry import case
from .scores import ClipScore, score_in_background, write_csv
from .separate_scores import INPUT, LENGTHS_S, METRICS, add_voices, mean, rows_of, tables
from .talkers import RATE_HZ, TalkerClip, from_manifest, long_scores, separation_scores, si_snr_db

if TYPE_CHECKING:
    from allears.models.separate.pipeline import Separator

logger = logging.getLogger("benchmarks")

LENGTH_SET = "long2"
SETS: dict[str, tuple[int, ...]] = {
    "clean2": (8_000, 16_000),
    "noisy2": (16_000,),
    "clean3": (16_000,),
    "clean1": (16_000,),
    LENGTH_SET: (8_000, 16_000),
}
"""Test sets, and the rates at which each is a case: for the weights of that rate."""
_COUNTED = ("clean1", "clean2", "clean3")

Pairs = list[tuple[np.ndarray, np.ndarray]]
"""(reference, estimate) of each talker, for metrics that take one voice."""


@case("separate")
@dataclass
class SeparateCase:
    """Score weights on the test sets of several talkers; write benchmarks/results/NAME.json and OUT/NAME.csv.

    The first clips of a set are the same for all; weights of 8 kHz run the 8 kHz cases, those of 16 kHz the others.
    """

    weights: Annotated[tuple[str, ...], tyro.conf.Positional]
    """NAME=PATH of weights (a path stem or a shipped name); NAME is the system in the rows."""

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifests render from."""

    sets_folder: Path = results.ROOT / "benchmarks/sets"
    """Folder of the manifests, separate-SET.jsonl."""

    sets: tuple[str, ...] = tuple(SETS)
    """Which test sets."""

    metrics: tuple[str, ...] = ()
    """More metrics of each voice, and their gains over the mixture, such as pesq_wb and estoi; 16 kHz, not on long2."""

    limit: int | None = None
    """Only so many clips of each set, spread evenly."""

    device: str = "auto"
    """cuda, cpu or auto."""

    workers: int = 2
    """Processes that compute the metrics."""

    name: str = "separate"
    """Name of the result files."""

    out: Path = Path("out/benchmarks")
    """Folder of the per-clip CSV."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console = Console()
        named = dict(parse_weights(text) for text in self.weights)
        unknown = [name for name in self.sets if name not in SETS]
        if unknown:
            raise ValueError(f"sets: {unknown} given; known are {', '.join(SETS)}")
        if not named or INPUT in named:
            raise ValueError(f"weights: got {self.weights}, wanted one NAME=PATH or more, none of them named {INPUT}")
        systems = {name: load(path, self.device) for name, path in named.items()}
        notes = [f"{name}: {about(separator)}" for name, separator in systems.items()]
        entries: list[ClipScore] = []
        jobs = self._voices(systems, entries, notes, console)
        voices = list(score_in_background(jobs, self.metrics, self.workers))
        add_voices(entries, voices, self.metrics)
        metrics = (*METRICS, *self.metrics)
        write_csv(self.out / f"{self.name}.csv", entries, metrics)
        rows = rows_of(entries, metrics)
        notes.append(
            f"A_minus_B: A's value less B's on the same clips; {INPUT}: the input itself; "
            f"METRIC_minus_{LENGTHS_S[0]}s: the value less that of pieces of {LENGTHS_S[0]} s of the same clips"
        )
        path = results.write(self.name, rows, notes, self.results_folder)
        console.print(*tables(rows))
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {path} and {self.out / self.name}.csv")
        return 0

    def _voices(
        self, systems: Mapping[str, "Separator"], entries: list[ClipScore], notes: list[str], console: Console
    ) -> Iterator[tuple[ClipScore, np.ndarray, np.ndarray]]:
        """Separate everything; fills ``entries`` and ``notes``, gives what the other metrics are computed from."""
        for name in self.sets:
            rates = [rate for rate in SETS[name] if any(s.config.sample_rate_hz == rate for s in systems.values())]
            manifest = self.sets_folder / f"separate-{name}.jsonl"
            if not manifest.exists() or not rates:
                reason = "no weights of its rate" if manifest.exists() else f"{manifest.name} does not exist"
                logger.warning("%s is left out: %s", name, reason)
                notes.append(f"{name}: left out: {reason}")
                continue
            shortest_s = LENGTHS_S[-1] if name == LENGTH_SET else 0
            clips = from_manifest(self.corpus, manifest, self.limit, shortest_s)
            for clip in track(clips, name, console=console, transient=True):
                for rate in rates:
                    fitting = {n: s for n, s in systems.items() if s.config.sample_rate_hz == rate}
                    for entry, pairs in scored(name, clip.at_rate(rate), fitting):
                        entries.append(entry)
                        if self.metrics and rate == RATE_HZ and name != LENGTH_SET:
                            yield from ((ClipScore(entry.clip, entry.system, {}), *pair) for pair in pairs)


def load(name_or_path: str, device: str) -> "Separator":
    """Weights, shipped or trained here, with the pipeline around them."""
    from allears.models.separate.pipeline import Separator

    return Separator.from_pretrained(name_or_path, device)


def about(separator: "Separator") -> str:
    """What the weights are."""
    config = separator.config
    kind = "sepreformer" if config.sepreformer is not None else "locoformer"
    return (
        f"{separator.parameters / 1e6:.2f} M parameters, {kind}, attention {config.attention}, "
        f"{config.sample_rate_hz} Hz, {config.talkers} outputs"
    )


def separate(separator: "Separator", clip: TalkerClip) -> tuple[np.ndarray, int]:
    """The outputs (J, T), heard in one pass, and the estimated number of talkers.

    Raises:
        ValueError: an output is not finite.
    """
    length_s = len(clip.mixture) / clip.rate_hz
    found = separator(clip.mixture, clip.rate_hz, one_pass_s=max(10.0, length_s + 1))
    outputs = np.asarray(found.talkers)
    if not np.isfinite(outputs).all():
        raise ValueError(f"{clip.id}: the outputs hold NaN or infinity; these weights cannot be scored")
    return outputs, found.count


def scored(of_set: str, clip: TalkerClip, systems: Mapping[str, "Separator"]) -> Iterator[tuple[ClipScore, Pairs]]:
    """Entries of a clip: of the input, and of each system that has outputs enough."""
    if of_set == LENGTH_SET:
        for name, separator in systems.items():
            if separator.config.talkers >= len(clip.sources):
                yield from ((entry, []) for entry in scored_lengths(name, clip, separator))
        return
    case_name = f"{of_set}-{clip.rate_hz // 1000}k"
    facts = {**clip.facts, "case": case_name, "set": of_set, "rate_hz": clip.rate_hz}
    before = {"si_snr_db": float(np.mean(si_snr_db(clip.mixture, clip.sources)))} if len(clip.sources) > 1 else {}
    yield ClipScore(f"{case_name}/{clip.id}", INPUT, facts, before), [(s, clip.mixture) for s in clip.sources]
    for name, separator in systems.items():
        if separator.config.talkers < len(clip.sources):
            continue
        outputs, count = separate(separator, clip)
        scores, order = separation_scores(outputs, clip)
        if separator.config.silent_outputs and of_set in _COUNTED:
            scores["count_accuracy"] = float(count == len(clip.sources))
        pairs = list(zip(clip.sources, outputs[order], strict=True))
        yield ClipScore(f"{case_name}/{clip.id}", name, facts, scores), pairs


def scored_lengths(system: str, clip: TalkerClip, separator: "Separator") -> Iterator[ClipScore]:
    """A clip of the longest length or more, in pieces of each length: the mean over its pieces.

    Shorter clips are left out, so that all lengths are measured on the same clips.
    """
    shortest, longest = (seconds * clip.rate_hz for seconds in (LENGTHS_S[0], LENGTHS_S[-1]))
    if len(clip.mixture) < longest:
        return
    clip = clip.cut(0, len(clip.mixture) // longest * longest)
    for seconds in LENGTHS_S:
        count = seconds * clip.rate_hz
        firsts = range(0, len(clip.mixture) - count + 1, count)
        pieces = [clip.cut(first, count) for first in firsts]
        found = [long_scores(separate(separator, piece)[0], piece, shortest) for piece in pieces]
        scores = {metric: mean(part[metric] for part in found) for metric in found[0]}
        facts = {**clip.facts, "case": f"clean2-{seconds}s", "set": LENGTH_SET, "rate_hz": clip.rate_hz}
        yield ClipScore(f"{facts['case']}/{clip.id}", system, facts, scores)
