"""What echo cancellation costs on one core: a hop of a stream in PyTorch and in onnxruntime, and whole clips of all."""

import contextlib
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from . import results
from .clips import RATE_HZ
from .echo_clips import EchoClip, alone
from .enhance import describe
from .registry import NotInstalledError, case, systems_for

logger = logging.getLogger("benchmarks")

OURS = "allears"


@case("echo_speed")
@dataclass
class EchoSpeedCase:
    """Real-time factor and 99th percentile of a hop of 10 ms, on one thread and one core; echo_server measures many."""

    weights: str | None = None
    """Weights of allears: a shipped name or a folder; by default the shipped model."""

    preset: str | None = None
    """Instead of weights: untrained ones of this size, which cost the same."""

    systems: tuple[str, ...] = ("speex", "webrtc_aec3", "kalman_oracle")
    """Others, whole clips of which are timed (case clip)."""

    hops: int = 3000
    """Hops that are timed."""

    seconds: int = 20
    """Length of the clip of the case clip; the median of three runs counts."""

    server: Path | None = None
    """Result file of echo_server, whose rows are taken in as the case server."""

    name: str = "echo_speed"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console = Console()
        notes = ["one thread on one core; in the process of this benchmark"]
        taken = [] if self.server is None else server_rows(self.server)
        with one_core():
            rows = [*self._hops(notes), *self._clips(notes), *taken]
        if taken:
            notes.append(f"server: rows of {self.server}, measured in another run")
        path = results.write(self.name, rows, notes, self.results_folder)
        for row in rows:
            console.print(f"{row['case']} {row['system']} {row['metric']}: {row['value']:.4g}", highlight=False)
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {path}")
        return 0

    def _hops(self, notes: list[str]) -> Iterator[dict[str, Any]]:
        """A stream of allears, hop by hop, in both runtimes."""
        from allears.models.echo.export import TorchStep, check_onnx, export_onnx, step_cost
        from allears.models.echo.runtime import OnnxStep

        canceller = self._canceller()
        config = canceller.config
        notes.append(f"{OURS}: {canceller.name}, {canceller.parameters / 1e6:.2f} M parameters")

        def rows(runtime: str, run: Any) -> Iterator[dict[str, Any]]:
            cost = step_cost(run, config.hop, config.hop_s, self.hops)
            yield results.row(runtime, OURS, "rtf", cost.rtf)
            yield results.row(runtime, OURS, "p99_ms", cost.p99_ms)

        yield from rows("pytorch", TorchStep(canceller.net))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "step.onnx"
            try:
                export_onnx(canceller.net, path)
                notes.append(f"onnx: differs from PyTorch by {check_onnx(canceller.net, path):.2g} at most")
                yield from rows("onnx", OnnxStep(path))
            except ImportError as error:
                logger.warning("onnx is MISSING from this run: %s", error)
                notes.append(f"onnx: MISSING: {error}")

    def _clips(self, notes: list[str]) -> Iterator[dict[str, Any]]:
        """A whole clip of noise through each system that is installed here."""
        clip = noise_clip(self.seconds)
        for system in systems_for("echo", self.systems):
            name = system.name.replace("_", "-")
            try:
                cancel = system.load()
            except NotInstalledError as error:
                logger.warning("%s is MISSING from this run: %s", name, error)
                notes.append(f"{name}: MISSING: {error}")
                continue
            notes.append(f"{name}: {describe(system)}")
            yield results.row("clip", name, "rtf", median_seconds(cancel, [clip]) / self.seconds)

    def _canceller(self) -> Any:
        from allears.models.echo import EchoCanceller

        if self.preset is None:
            return EchoCanceller.from_pretrained(*(() if self.weights is None else (self.weights,)), device="cpu")
        from allears.models.echo.config import PRESETS
        from allears.models.echo.model import EchoNet

        if self.weights is not None or self.preset not in PRESETS:
            raise ValueError(f"preset: got {self.preset!r}; wanted one of {', '.join(PRESETS)}, and no weights")
        return EchoCanceller(EchoNet(PRESETS[self.preset]), "cpu", f"untrained {self.preset}")


def server_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file, as of the case ``server``, whatever theirs was."""
    document = json.loads(path.read_text())
    return [{**row, "case": "server"} for row in document["rows"]]


@contextmanager
def one_core() -> Iterator[None]:
    """Within, this process runs on one core, and PyTorch on one thread."""
    import torch

    threads, cores = torch.get_num_threads(), None
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(cores)[-1:])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def noise_clip(seconds: int) -> EchoClip:
    """White noise at both ends, with an echo half as loud 20 ms later."""
    near, far = (0.05 * np.random.default_rng(0).standard_normal((2, seconds * RATE_HZ))).astype(np.float32)
    clip = alone("noise", near)
    late = np.concatenate([np.zeros(RATE_HZ // 50, np.float32), far])[: len(far)]
    truth = clip.truth._replace(mic=near + 0.5 * late, reference=far, delay_frames=clip.truth.delay_frames + 2)
    return clip._replace(truth=truth)


def median_seconds(cancel: Any, clips: Sequence[EchoClip], runs: int = 3) -> float:
    """Seconds that a system takes for the clips, after one second to warm up."""
    cancel([noise_clip(1)])
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        cancel(clips)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
