"""Speed and memory of separation on files, and of the network alone as PyTorch and as ONNX."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from .clips import RATE_HZ
from .registry import case, systems_for
from .speed import Job, SpeedCase, synthetic_voice

logger = logging.getLogger("benchmarks")

NETWORK_S, REPEATS = 10, 5


@case("separate_speed")
@dataclass
class SeparateSpeedCase(SpeedCase):
    """Real-time factor (reading and writing counted, loading not) and peak resident memory on mono 16 kHz files."""

    seconds: tuple[int, ...] = (60, 3600)
    """Lengths of the files that the pipeline separates."""

    name: str = "separate_speed"
    """Name of the result file."""

    onnx: bool = True
    """Also run the network alone on a 10 s file, in PyTorch and, exported, in onnxruntime; the median of 5 runs."""

    task: ClassVar[str] = "separate"

    def jobs(self, folder: Path, notes: list[str]) -> Iterator[Job]:
        """The pipeline on every length, then the network alone."""
        yield from super().jobs(folder, notes)
        if not self.onnx:
            return
        network, onnx = systems_for(self.task, ("network", "onnx"))
        yield Job(network, NETWORK_S, self.options(), REPEATS)
        path = folder / "network.onnx"
        try:
            differs = self._export(path)
        except Exception as error:  # what was measured before is kept
            logger.warning("onnx: %s", error)
            notes.append(f"onnx: {'MISSING' if isinstance(error, ImportError) else 'FAILED'}: {error}")
            return
        notes.append(f"onnx: its outputs differ from PyTorch's by {differs:.2g} (relative L2, {NETWORK_S} s)")
        yield Job(onnx, NETWORK_S, {"path": str(path)}, REPEATS)

    def make_source(self) -> np.ndarray:
        """Two voices that overlap and pause, in noise."""
        return synthetic_voice() + synthetic_voice(noise_level=0.0, pitch_hz=210.0, pause_hz=0.17)

    def _export(self, path: Path) -> float:
        """Write the network as ONNX; the relative L2 error of its outputs on the benchmark's clip."""
        from allears.models.separate.export import export_onnx

        network, onnx = systems_for(self.task, ("network", "onnx"))
        wanted = network.load(**self.options())
        export_onnx(wanted.separator.net, path)
        audio = np.resize(self.make_source(), NETWORK_S * RATE_HZ)
        reference = wanted(audio)
        return float(np.linalg.norm(onnx.load(path=str(path))(audio) - reference) / np.linalg.norm(reference))
