"""Speed and memory of enhancement on files: each system and length in a process of its own, on two cores."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from rich.console import Console
from rich.table import Table

from . import results
from .enhance import describe
from .registry import System, case, systems_for

logger = logging.getLogger("benchmarks")

RATE_HZ = 16_000


@case("enhance_speed")
@dataclass
class EnhanceSpeedCase:
    """Real-time factor (reading and writing counted, loading not) and peak resident memory on mono 16 kHz files."""

    seconds: tuple[int, ...] = (60, 600, 3600)
    """Lengths of the files."""

    systems: tuple[str, ...] = ("allears", "rnnoise", "nsnet2", "deepfilternet3")
    """Which systems."""

    source: Path | None = None
    """A mono 16 kHz recording to repeat; by default a synthetic voice in noise."""

    weights: str | None = None
    """Weights of the system allears: a shipped name or a folder."""

    steps: int | None = None
    """Sampler steps of the system allears."""

    threads: int = 2
    """Threads, and cores that the process may run on."""

    limit_s: float = 600.0
    """A peer that takes longer than this is stopped and reported; allears is not."""

    name: str = "enhance_speed"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console, rows, notes = Console(), [], []
        notes.append(f"{self.threads} threads on {self.threads} cores; a process each; warmed up on one second")
        with tempfile.TemporaryDirectory() as folder:
            for seconds in self.seconds:
                source = Path(folder) / f"{seconds}s.wav"
                write_recording(source, seconds, self.source)
                for system in systems_for("enhance", self.systems):
                    outcome = self._measure(system, source, Path(folder) / "out.wav")
                    if "error" in outcome:
                        logger.warning("%s, %d s: %s", system.name, seconds, outcome["error"])
                        notes.append(f"{system.name}, {seconds} s: FAILED: {outcome['error']}")
                        continue
                    if seconds == self.seconds[0]:
                        notes.append(f"{system.name}: {describe(system)}; {outcome['how']}")
                    case_name = f"{seconds}s"
                    rows.append(results.row(case_name, system.name, "rtf", outcome["seconds"] / seconds))
                    rows.append(results.row(case_name, system.name, "peak_rss_gb", outcome["peak_rss_gb"]))
                    console.print(f"{case_name} {system.name}: {outcome}", highlight=False)
                source.unlink()
        path = results.write(self.name, rows, notes, self.results_folder)
        console.print(_table(rows))
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {path}")
        return 0

    def _measure(self, system: System, source: Path, destination: Path) -> dict[str, Any]:
        if missing := system.missing():
            return {"error": f"not installed: {', '.join(missing)}"}
        ours = system.name == "allears"
        options = {"name_or_folder": self.weights, "steps": self.steps} if ours else {}
        job = {
            "system": system.name,
            "options": {key: value for key, value in options.items() if value is not None},
            "source": str(source),
            "destination": str(destination),
            "threads": self.threads,
        }
        variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        command = [sys.executable, "-m", "benchmarks.speed_worker", json.dumps(job)]
        environment = os.environ | dict.fromkeys(variables, str(self.threads))
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd=results.ROOT,
                capture_output=True,
                text=True,
                timeout=None if ours else self.limit_s,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {self.limit_s:.0f} s"}
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {"error": f"exit status {done.returncode}: {last}"}
        return json.loads(done.stdout.splitlines()[-1])


def write_recording(path: Path, seconds: int, source: Path | None = None) -> None:
    """A mono 16 kHz PCM file of the given length: ``source`` over and over, or a synthetic voice in noise."""
    if source is None:
        unit = synthetic_voice()
    else:
        unit, rate = sf.read(source, dtype="float32")
        if rate != RATE_HZ or unit.ndim != 1 or not len(unit):
            raise ValueError(f"source: {str(source)!r} must be mono and {RATE_HZ} Hz")
    left = seconds * RATE_HZ
    with sf.SoundFile(path, "w", RATE_HZ, 1, "PCM_16") as file:
        while left > 0:
            file.write(unit[:left])
            left -= len(unit)


def synthetic_voice(seconds: float = 12.0, noise_level: float = 0.02, seed: int = 0) -> np.ndarray:
    """(T,) float32: a buzz of gliding pitch in syllables with pauses, plus white noise (at about 10 dB)."""
    generator = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.4 * time_s)) / RATE_HZ
    buzz = sum(np.sin(k * phase) / k for k in range(1, 25))
    syllables = np.clip(np.sin(2 * np.pi * 3 * time_s), 0, 1) * (np.sin(2 * np.pi * 0.25 * time_s) > -0.5)
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
