"""Result files: ``benchmarks/results/NAME.json``, with where, when, at which commit and by which command they came."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.results import machine, row, write_document

__all__ = ["RESULTS", "ROOT", "commit", "machine", "row", "write"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def write(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    folder: Path = RESULTS,
    measured: str | None = None,
) -> Path:
    """Write ``NAME.json`` whole, or not at all; returns its path. ``measured`` is the commit, by default git's."""
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    return write_document(folder / f"{name}.json", rows, notes, command, measured or commit())


def commit() -> str:
    """The commit measured, with ``+changes`` where files tracked by it differ; ``unknown`` outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head
