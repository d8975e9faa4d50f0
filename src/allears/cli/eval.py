"""``allears eval``: score files against their references, or a shipped model on a test set; echo: ``eval_echo``."""

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from allears.cli.eval_echo import Echo

if TYPE_CHECKING:
    from allears.audio.metrics import Interval

logger = logging.getLogger(__name__)

Estimates = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="ESTIMATE...")]
Metrics = Annotated[tuple[str, ...], tyro.conf.arg(metavar="METRIC...")]


@dataclass
class Files:
    """Score audio files: against clean references where there are some, else by DNSMOS alone.

    For instance "allears eval files clean.wav -r reference.wav", "allears eval files out/ -r references/" (files of
    equal name belong together), or "allears eval files out/ --json".
    """

    estimates: Estimates
    """Files to score, or folders of them."""

    reference: Annotated[Path | None, tyro.conf.arg(aliases=["-r"], metavar="FILE|FOLDER")] = None
    """The clean recording of a single estimate, or a folder with one of the same name for each."""

    metrics: Metrics = ()
    """Which metrics; by default all that need no optional recogniser or voice network."""

    max_lag_ms: float = 0.0
    """Before scoring, take off a delay of up to this many milliseconds, found by cross-correlation."""

    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        pairs = pair_files(self.estimates, self.reference)
        scores: dict[str, dict[str, float]] = {}
        reasons: dict[str, dict[str, str]] = {}
        for estimate, reference in pairs:
            scores[str(estimate)], reasons[str(estimate)] = self._score(estimate, reference)
        if self.json:
            print(json.dumps({"files": finite(scores), "unscored": {k: v for k, v in reasons.items() if v}}, indent=1))
            return 0
        table = {name: {metric: _cell(value) for metric, value in row.items()} for name, row in scores.items()}
        if len(scores) > 1:
            from allears.audio.metrics import bootstrap_interval

            metrics = list(next(iter(scores.values())))
            means = {metric: bootstrap_interval([row[metric] for row in scores.values()]) for metric in metrics}
            table["mean (95 % interval)"] = {metric: interval_text(value) for metric, value in means.items()}
        print_table("file", table)
        for name, notes in reasons.items():
            for metric, reason in notes.items():
                print(f"{name}: {metric}: {reason}", file=sys.stderr)
        return 0

    def _score(self, estimate: Path, reference: Path | None) -> tuple[dict[str, float], dict[str, str]]:
        import numpy as np

        from allears.audio.files import read
        from allears.audio.metrics import align, collect_reasons, score_clip

        audio, rate = read(estimate)
        clean = None
        if reference is not None:
            clean, clean_rate = read(reference)
            if clean_rate != rate or len(clean) != len(audio):
                raise ValueError(
                    f"reference: {str(reference)!r} has {len(clean)} channels at {clean_rate} Hz, "
                    f"but {str(estimate)!r} has {len(audio)} at {rate} Hz; convert one of them"
                )
            if self.max_lag_ms:
                lag = round(self.max_lag_ms * rate / 1000)
                audio = np.stack([align(x, y, lag) for x, y in zip(audio, clean, strict=True)])
            length = min(audio.shape[1], clean.shape[1])
            if audio.shape[1] != clean.shape[1]:
                logger.warning("%s and %s differ in length; the first %d samples count", estimate, reference, length)
            audio, clean = audio[:, :length], clean[:, :length]
        with collect_reasons() as reasons:
            return score_clip(clean, audio, rate, self.metrics or None), dict(reasons)


@dataclass
class Enhance:
    """Score the shipped speech enhancer on a test set: means with 95 % intervals, and gains over the noisy input."""

    manifest: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MANIFEST")]
    """A test-set manifest (JSON lines)."""

    corpus: Path = Path("corpus")
    """The prepared corpus that it renders from (allears data prepare)."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """A shipped model, or a folder with a checkpoint; by default the shipped enhancer."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Sampler steps; by default what the model was tuned for."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    metrics: Metrics = ()
    """Which metrics; by default all that need no optional recogniser or voice network."""

    limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Only the first clips."""

    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        if not self.manifest.is_file():
            raise ValueError(f"manifest: {str(self.manifest)!r} is no file")
        from itertools import islice

        import numpy as np
        from rich.console import Console
        from rich.progress import track

        from allears.audio.metrics import (
            DEFAULT_METRICS,
            bootstrap_interval,
            collect_reasons,
            paired_bootstrap_interval,
            score_clip,
        )
        from allears.data.render import render_test_set
        from allears.models.enhance import Enhancer

        choice = {} if self.model is None else {"name_or_folder": self.model}
        enhancer = Enhancer.from_pretrained(**choice, device=self.device)
        metrics = self.metrics or DEFAULT_METRICS
        before: list[dict[str, float]] = []
        after: list[dict[str, float]] = []
        clips = islice(render_test_set(self.corpus, self.manifest), self.limit)
        for _, noisy, reference, _ in track(clips, "clips", console=Console(stderr=True), transient=True):
            enhanced = np.asarray(enhancer(noisy[None], sample_rate_hz=16_000, steps=self.steps))[0]
            with collect_reasons():  # clips without speech have no score; n says how many count
                before.append(score_clip(reference, noisy, 16_000, metrics))
                after.append(score_clip(reference, enhanced, 16_000, metrics))
        if not before:
            raise ValueError(f"manifest: {str(self.manifest)!r} holds no clip")
        columns = {m: ([row[m] for row in before], [row[m] for row in after]) for m in metrics}
        intervals = {
            "noisy": {m: bootstrap_interval(noisy) for m, (noisy, _) in columns.items()},
            "enhanced": {m: bootstrap_interval(clean) for m, (_, clean) in columns.items()},
            "gain": {m: paired_bootstrap_interval(clean, noisy) for m, (noisy, clean) in columns.items()},
        }
        if self.json:
            found = {s: {m: finite(i._asdict()) for m, i in row.items()} for s, row in intervals.items()}
            print(json.dumps({"clips": len(before), "scores": found}, indent=1))
            return 0
        print(f"{len(before)} clips, mean and 95 % interval")
        print_table("", {s: {m: interval_text(i) for m, i in row.items()} for s, row in intervals.items()})
        return 0


COMMANDS = {"files": Files, "enhance": Enhance, "echo": Echo}


def pair_files(estimates: Sequence[Path], reference: Path | None) -> list[tuple[Path, Path | None]]:
    """Every file to score with its reference, in order.

    Raises:
        ValueError: nothing to score, one reference for several files, or a file without its reference.
    """
    from allears.audio.listing import list_audio_files

    files = list_audio_files(list(estimates)) if estimates else []
    if not files:
        raise ValueError("estimates: no audio file given; name files or folders")
    if reference is None:
        return [(file, None) for file in files]
    if reference.is_file():
        if len(files) > 1:
            raise ValueError(f"reference: one file cannot be the reference of {len(files)} files; give a folder")
        return [(files[0], reference)]
    if not reference.is_dir():
        raise ValueError(f"reference: {str(reference)!r} does not exist")
    by_stem = {file.stem: file for file in list_audio_files([reference])}
    for file in files:
        if file.stem not in by_stem:
            raise ValueError(f"reference: {str(reference)!r} holds no file named {file.stem}.* for {str(file)!r}")
    return [(file, by_stem[file.stem]) for file in files]


def print_table(corner: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Rows by name, one column a metric."""
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    cells = [[corner, *metrics], *([name, *(row.get(m, "-") for m in metrics)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in cells) for i in range(len(metrics) + 1)]
    for line in cells:
        print("  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]))


def interval_text(interval: "Interval") -> str:
    """``2.41 (2.30-2.52)``, or a dash without any clip."""
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})" if interval.n else "-"


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def finite(value: Any) -> Any:
    """NaN and infinity, which JSON lacks, as null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
