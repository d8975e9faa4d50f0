"""Result files: JSON with the machine, the date and the command beside the rows."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def row(
    case: str,
    system: str,
    metric: str,
    value: float,
    low: float | None = None,
    high: float | None = None,
    n: int | None = None,
) -> dict[str, Any]:
    """One result: a value, with its 95 % interval and number of clips or timings where it has them."""
    extras = {"low": low, "high": high, "n": n}
    kept = {key: _rounded(extra) for key, extra in extras.items() if extra is not None}
    return {"case": case, "system": system, "metric": metric, "value": _rounded(value), **kept}


def write_document(
    path: Path, rows: Sequence[Mapping[str, Any]], notes: Sequence[str], command: str, commit: str
) -> Path:
    """Write ``path`` whole, or not at all; returns it.

    Args:
        command: how to measure it again; absolute paths in it are cut to their last two parts.
        commit: which code was measured.
    """
    document = {
        "machine": machine(),
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": portable(command),
        "notes": list(notes),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f"{path.suffix}.tmp")
    head = json.dumps(document, indent=1)
    body = ",\n".join("  " + json.dumps(dict(r)) for r in rows)  # a row a line: differences read well
    partial.write_text(f'{head[:-2]},\n "rows": [\n{body}\n ]\n}}\n')
    os.replace(partial, path)
    return path


def portable(command: str) -> str:
    """A command line without the folders of one machine: ``--corpus /home/me/corpora/a`` to ``--corpus corpora/a``."""
    return re.sub(r"(?<![^\s=])/[^\s=]+", lambda found: "/".join(Path(found[0]).parts[1:][-2:]), command)


def machine() -> str:
    """Processor, cores, memory, GPUs with their CUDA and Triton, and software, in one line."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        memory = f", {memory_gb:.0f} GB"
    except (OSError, StopIteration, ValueError, AttributeError):
        memory = ""
    cores = os.cpu_count()
    return f"{model}, {cores} cores{memory}, {_gpus()}{platform.system()}, Python {platform.python_version()}"


def _gpus() -> str:
    """The GPUs and the software that drives them; nothing where no GPU answers."""
    import torch

    if not torch.cuda.is_available():
        return ""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(
        f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB, {gpu.multi_processor_count} SMs, sm_{gpu.major}{gpu.minor})"
        for gpu in found
    )
    try:
        triton = f", triton {version('triton')}"
    except PackageNotFoundError:
        triton = ""
    return f"{names}, torch {torch.__version__}, CUDA {torch.version.cuda}{triton}, "


def _rounded(value: float) -> float | int | None:
    """Six significant digits; NaN and infinity, which JSON lacks, become null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
