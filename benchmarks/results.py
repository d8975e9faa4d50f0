"""Result files: ``benchmarks/results/NAME.json``, with where, when, at which commit and by which command they came."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def row(
    case: str,
    system: str,
    metric: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    """One result: a value, with its 95 % interval and number of clips where it has them."""
    extras = {"low": low, "high": high, "n": n}
    kept = {key: _rounded(extra) for key, extra in extras.items() if extra is not None}
    return {"case": case, "system": system, "metric": metric, "value": _rounded(value), **kept}


def write(name: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = (), folder: Path = RESULTS) -> Path:
    """Write ``NAME.json`` whole, or not at all; returns its path."""
    document = {
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m benchmarks " + " ".join(sys.argv[1:]),
        "notes": list(notes),
        "rows": [dict(r) for r in rows],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = path.with_suffix(".json.tmp")
    head = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    body = ",\n".join("  " + json.dumps(r) for r in document["rows"])  # a row a line: differences read well
    partial.write_text(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}\n')
    os.replace(partial, path)
    return path


def machine() -> str:
    """Processor, cores, memory and software, in one line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        memory = f", {memory_gb:.0f} GB"
    except (OSError, StopIteration, ValueError, AttributeError):
        memory = ""
    cores = os.cpu_count()
    return f"{model}, {cores} cores{memory}, {platform.system()}, Python {platform.python_version()}"


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


def _rounded(value: float) -> float | int | None:
    """Six significant digits; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if abs(value) < float("inf") else None
