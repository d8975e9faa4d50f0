"""Speed and memory on files: each system and length in a process of its own, on two cores. A case names its task."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import soundfile as sf
from rich.console import Console
from rich.table import Table

from . import results
from .clips import RATE_HZ
from .enhance import describe
from .registry import System, systems_for

logger = logging.getLogger("benchmarks")

OURS = "allears"


class Job(NamedTuple):
    """One measurement: ``options`` go to the system; of ``repeats`` runs over the file the median time counts."""

    system: System
    seconds: int
    options: dict[str, Any]
    repeats: int = 1


@dataclass
class SpeedCase:
    """Real-time factor (reading and writing counted, loading not) and peak resident memory on mono 16 kHz files."""

    seconds: tuple[int, ...] = (60, 600, 3600)
    """Lengths of the files."""

    systems: tuple[str, ...] = (OURS,)
    """Which systems."""

    source: Path | None = None
    """A mono 16 kHz recording to repeat; by default a synthetic one."""

    weights: str | None = None
    """Weights of the system allears: a shipped name or a folder."""

    threads: int = 2
    """Threads, and cores that the process may run on."""

    limit_s: float = 600.0
    """A peer that takes longer than this is stopped and reported; allears is not."""

    name: str = "speed"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    task: ClassVar[str]

    def run(self) -> int:
        console, rows, described = Console(), [], set()
        notes = [f"{self.threads} threads on {self.threads} cores; a process each; warmed up on one second"]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for job in self.jobs(folder, notes):
                system, which = job.system, f"{job.seconds}s"
                outcome = self._measure(job, self._source(folder, job.seconds), folder / "out")
                if "error" in outcome:
                    logger.warning("%s, %s: %s", system.name, which, outcome["error"])
                    notes.append(f"{system.name}, {job.seconds} s: FAILED: {outcome['error']}")
                    continue
                if system.name not in described:
                    described.add(system.name)
                    notes.append(f"{system.name}: {describe(system)}; {outcome['how']}")
                rows.append(results.row(which, system.name, "rtf", outcome["seconds"] / job.seconds))
                rows.append(results.row(which, system.name, "peak_rss_gb", outcome["peak_rss_gb"]))
                console.print(f"{which} {system.name}: {outcome}", highlight=False)
        path = results.write(self.name, rows, notes, self.results_folder)
        console.print(_table(rows))
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {path}")
        return 0

    def jobs(self, folder: Path, notes: list[str]) -> Iterator[Job]:
        """Every system on every length; may write to ``folder``, and add to ``notes``."""
        for seconds in self.seconds:
            for system in systems_for(self.task, self.systems):
                yield Job(system, seconds, self.options() if system.name == OURS else {})

    def options(self) -> dict[str, Any]:
        """Of the system allears."""
        return {} if self.weights is None else {"name_or_folder": self.weights}

    def make_source(self) -> np.ndarray:
        """What is recorded over and over where no ``source`` is given, (T,) at 16 kHz."""
        return synthetic_voice()

    def _source(self, folder: Path, seconds: int) -> Path:
        """The file of that length; those of other lengths are removed."""
        path = folder / f"{seconds}s.wav"
        if not path.exists():
            for other in folder.glob("*s.wav"):
                other.unlink()
            write_recording(path, seconds, self.make_source() if self.source is None else self.source)
        return path

    def _measure(self, job: Job, source: Path, folder: Path) -> dict[str, Any]:
        if missing := job.system.missing():
            return {"error": f"not installed: {', '.join(missing)}"}
        task = {
            "task": self.task,
            "system": job.system.name,
            "options": job.options,
            "source": str(source),
            "folder": str(folder),
            "threads": self.threads,
            "repeats": job.repeats,
        }
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        command = [sys.executable, "-m", "benchmarks.speed_worker", json.dumps(task)]
        try:
            done = subprocess.run(
                command,
                env=os.environ | dict.fromkeys(variables, str(self.threads)),
                cwd=results.ROOT,
                capture_output=True,
                text=True,
                timeout=None if job.system.name == OURS else self.limit_s,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {self.limit_s:.0f} s"}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": f"exit status {done.returncode}: {last}"}
        return json.loads(done.stdout.splitlines()[-1])


def write_recording(path: Path, seconds: int, source: Path | np.ndarray) -> None:
    """A mono 16 kHz PCM file of the given length: ``source``, a file or samples (T,), over and over."""
    if isinstance(source, np.ndarray):
        unit = source
    else:
        unit, rate = sf.read(source, dtype="float32")
        if rate != RATE_HZ or unit.ndim != 1 or not len(unit):
            raise ValueError(f"source: {str(source)!r} must be mono and {RATE_HZ} Hz")
    left = seconds * RATE_HZ
    with sf.SoundFile(path, "w", RATE_HZ, 1, "PCM_16") as file:
        while left > 0:
            file.write(unit[:left])
            left -= len(unit)


def synthetic_voice(
    seconds: float = 12.0, noise_level: float = 0.02, seed: int = 0, pitch_hz: float = 120.0, pause_hz: float = 0.25
) -> np.ndarray:
    """(T,) float32: a buzz of gliding pitch in syllables with pauses, plus white noise (at about 10 dB)."""
    generator = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(pitch_hz + 30 * np.sin(2 * np.pi * 0.4 * time_s)) / RATE_HZ
    buzz = sum(np.sin(k * phase) / k for k in range(1, 25))
    syllables = np.clip(np.sin(2 * np.pi * 3 * time_s), 0, 1) * (np.sin(2 * np.pi * pause_hz * time_s) > -0.5)
    return (0.1 * buzz * syllables + noise_level * generator.standard_normal(len(time_s))).astype(np.float32)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Real-time factor and peak resident memory")
    for column in ("file", "system", "rtf", "peak GB"):
        table.add_column(column, justify="left" if column in ("file", "system") else "right")
    found = {(r["case"], r["system"], r["metric"]): r["value"] for r in rows}
    for which, name in dict.fromkeys((r["case"], r["system"]) for r in rows):
        rtf, peak_gb = found[which, name, "rtf"], found[which, name, "peak_rss_gb"]
        table.add_row(which, name, f"{rtf:.4f}", f"{peak_gb:.2f}")
    return table
