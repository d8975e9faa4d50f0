"""How many live sessions the echo server keeps up with on two cores, what one more is told, and what 10,000 leave."""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.console import Console

from . import results
from .echo_load import HOP_S, Heard, come_and_go, live, one_more
from .registry import case

logger = logging.getLogger("benchmarks")

_FULL = 1013


class Server(NamedTuple):
    host: str
    port: int
    pid: int

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/healthz", timeout=20) as answer:
            return json.load(answer)

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1000


@case("echo_server")
@dataclass
class EchoServerCase:
    """Live sessions on two cores: how many, how late, what one more is told, and whether 10,000 leave anything.

    A session sends a frame of 10 ms every 10 ms; its time runs from sending a frame to its reply, over a socket of this
    machine. The clients run on the same cores.
    """

    weights: str | None = None
    """Weights: a shipped name or a folder; by default the full-size network with random weights, which is as fast."""

    engine: Literal["onnx", "torch"] = "onnx"
    """What computes."""

    cores: int = 2
    """Cores for server and clients together."""

    seconds: float = 20.0
    """Length of each try."""

    limit_ms: float = 10.0
    """A number of sessions counts as kept up with when the 99th percentile is below this: before the next hop comes."""

    most: int = 64
    """More sessions are not tried."""

    sessions: int = 10_000
    """Short sessions for the leak run; 0 leaves it out."""

    name: str = "echo_server"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console, rows = Console(), []
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[: self.cores])  # the server's process inherits it
        notes = [
            f"server and clients together on {self.cores} cores; load of the machine before: {os.getloadavg()[0]:.1f}",
            f"frames of {1000 * HOP_S:g} ms at 16 kHz, {self.seconds:g} s; times from sending to reply over loopback",
        ]
        try:
            with tempfile.TemporaryDirectory() as folder:
                model = self.weights or str(_random_weights(Path(folder)))
                if self.weights is None:
                    notes.append("the full-size network with random weights")
                kept = self._search(model, rows, notes, console)
                if kept:
                    self._refusal(model, kept, rows, notes, console)
                if self.sessions:
                    self._leak(model, rows, notes, console)
        finally:
            os.sched_setaffinity(0, available)
        for note in notes:
            console.print(f"[dim]{note}[/dim]", highlight=False)
        console.print(f"written: {results.write(self.name, rows, notes, self.results_folder)}")
        return 0

    def _search(self, model: str, rows: list, notes: list[str], console: Console) -> int:
        """The largest number of sessions that is kept up with."""
        tried: dict[int, tuple[float, float, float]] = {}

        def fits(count: int) -> bool:
            begun = server.cpu_s()
            times = _times(asyncio.run(live(server.host, server.port, count, self.seconds)), count, self.seconds)
            rtf = (server.cpu_s() - begun) / (count * self.seconds)
            tried[count] = (*np.percentile(times, [50, 99]), rtf)
            p50, p99, _ = tried[count]
            console.print(
                f"{count} sessions: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {rtf:.3f} cores each", highlight=False
            )
            notes.append(f"{count} sessions: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {rtf:.3f} cores each")
            return p99 < self.limit_ms

        with _serving(model, self.engine, self.most + 1, self.cores) as server:
            asyncio.run(live(server.host, server.port, 1, 2.0))  # warm
            kept, above = 0, 1
            while above <= self.most and fits(above):
                kept, above = above, 2 * above
            above = min(above, self.most + 1)
            while above - kept > 1:
                middle = (kept + above) // 2
                kept, above = (middle, above) if fits(middle) else (kept, middle)
            engine = server.health()["engine"]
        system = f"allears-{engine}"
        rows.append(results.row("server", system, "sessions", kept))
        if kept:
            for metric, value in zip(("p50_ms", "p99_ms", "rtf"), tried[kept], strict=True):
                rows.append(results.row("server", system, metric, value, n=round(kept * self.seconds / HOP_S)))
        return kept

    def _refusal(self, model: str, kept: int, rows: list, notes: list[str], console: Console) -> None:
        told: list[Heard] = []

        async def ask() -> None:
            told.append(await one_more(server.host, server.port))

        with _serving(model, self.engine, kept, self.cores) as server:
            times = _times(asyncio.run(live(server.host, server.port, kept, self.seconds, ask)), kept, self.seconds)
            system = f"allears-{server.health()['engine']}"
        (one,) = told
        if one.code != _FULL:
            raise ValueError(f"one more than {kept} sessions was closed with {one.code}, wanted {_FULL}")
        rows.append(results.row("server-full", system, "p99_ms", float(np.percentile(times, 99))))
        rows.append(results.row("server-full", system, "refused_ms", one.times_ms[0]))
        notes.append(f"one more than {kept}: closed with {one.code}, {one.message!r}, after {one.times_ms[0]:.1f} ms")
        console.print(notes[-1], highlight=False)

    def _leak(self, model: str, rows: list, notes: list[str], console: Console) -> None:
        with _serving(model, self.engine, 64, self.cores) as server:
            asyncio.run(come_and_go(server.host, server.port, max(1, self.sessions // 5)))
            before, begun = server.resident_mb(), time.perf_counter()
            ended, sizes = Counter[str](), [before]
            for part in (self.sessions // 2, self.sessions - self.sessions // 2):
                ended += Counter(asyncio.run(come_and_go(server.host, server.port, part)))
                sizes.append(server.resident_mb())
            elapsed, health = time.perf_counter() - begun, server.health()
            after, open_files = sizes[-1], len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        system = f"allears-{health['engine']}"
        rows.append(results.row("server-leak", system, "grown_mb", after - before, n=self.sessions))
        rows.append(results.row("server-leak", system, "grown_in_second_half_mb", after - sizes[1], n=self.sessions))
        rows.append(results.row("server-leak", system, "sessions_left", health["sessions"], n=self.sessions))
        notes.append(
            f"{self.sessions} sessions after {max(1, self.sessions // 5)} others, in {elapsed:.0f} s, ended as "
            f"{dict(ended)}: {before:.1f} MB before, {sizes[1]:.1f} MB halfway, {after:.1f} MB after, "
            f"{health['sessions']} left, {open_files} open files"
        )
        console.print(notes[-1], highlight=False)


def _times(heard: list[Heard], sessions: int, seconds: float) -> list[float]:
    """Of all frames; one that was not answered counts as a hundred seconds."""
    times = [value for one in heard for value in one.times_ms]
    wanted = sessions * (round(seconds / HOP_S) - 1)  # the first frame only fills the window
    if len(times) < wanted:
        logger.warning("%d of %d frames were not answered", wanted - len(times), wanted)
    return times + [1e5] * max(0, wanted - len(times))


def _random_weights(folder: Path) -> Path:
    import torch

    from allears.core.weights import save_weights
    from allears.models.echo import PRESETS
    from allears.models.echo.model import EchoNet

    torch.manual_seed(0)
    net = EchoNet(PRESETS["base"])
    save_weights(folder / "weights", net.state_dict(), {"model": "echo", "config": asdict(net.config)})
    return folder


@contextmanager
def _serving(model: str, engine: str, most: int, workers: int) -> Iterator[Server]:
    options = ["--model", model, "--engine", engine, "--max-sessions", str(most), "--workers", str(workers)]
    command = [sys.executable, "-m", "allears", "serve", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://localhost:(\d+)/", process.stdout.readline())
            if found is None:
                raise ValueError("the server did not start: see above")
            yield Server("127.0.0.1", int(found[1]), process.pid)
        finally:
            process.terminate()
            process.wait(30)
