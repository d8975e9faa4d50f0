"""``allears eval echo``: echo cancellers on a seeded grid of simulated clips."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import numpy as np

    from allears.audio.metrics import Interval
    from allears.audio.metrics.echo_clip import EchoTruth
    from allears.data.echo_sets import Cell

DELAYS_MS = (0, 20, 60, 120, 250, 500, 900)
RATIOS_DB = (-15.0, -5.0, 5.0)
RT60_S = (0.2, 0.5)
SCENARIOS = ("far", "near", "double", "path")
RATE_HZ = 16_000

System = Literal["input", "kalman", "model"]
Cancel = Callable[["EchoTruth"], "tuple[np.ndarray, np.ndarray | None]"]
"""A clip to the near end (S,), and to the delay found (T,) in frames, where there is one."""


@dataclass
class Echo:
    """Score an echo canceller on a grid of simulated clips of 10 s, beside doing nothing and a linear filter.

    The grid: far end alone, near end alone, both, and both with a path that changes; delays of 0 to 900 ms, near end
    15 dB below to 5 dB above the echo, linear and distorting loudspeakers, two reverberation times; 198 cells. Talkers
    are those of the corpus's test split. Scores are means with 95 % intervals; see allears.audio.metrics.echo_clip.
    For instance "allears eval echo --model runs/echo/export", or "allears eval echo --systems input kalman --limit 20".
    """

    corpus: Path = Path("corpus")
    """The prepared corpus that the clips are made of (allears data prepare)."""

    model: Annotated[str | None, tyro.conf.arg(metavar="NAME|FOLDER")] = None
    """A shipped model, or a folder with a checkpoint; by default the shipped echo canceller."""

    systems: tuple[System, ...] = ("input", "kalman", "model")
    """What to score: the microphone as it is, the Kalman filter that is told the delay, and the model."""

    scenarios: tuple[Literal["far", "near", "double", "path"], ...] = SCENARIOS
    """Which parts of the grid."""

    clips: Annotated[int, tyro.conf.arg(metavar="INT")] = 1
    """Clips a cell."""

    limit: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Only so many clips of each scenario, spread evenly."""

    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """The same seed draws the same clips from the same corpus."""

    cells: bool = False
    """Also print far and double by delay."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""

    json: bool = False
    """Print one JSON object instead of tables."""

    def run(self) -> int:
        from rich.console import Console
        from rich.progress import track

        from allears.audio.metrics import collect_reasons
        from allears.audio.metrics.echo_clip import score_echo

        if self.clips < 1:
            raise ValueError(f"clips: got {self.clips}, wanted 1 or more a cell")
        if not self.systems or not self.scenarios:
            raise ValueError("systems, scenarios: got none, wanted one of each or more")
        systems = {name: self._load(name) for name in self.systems}
        found: dict[str, dict[str, list[dict[str, float]]]] = {}
        chosen = [cell for name in dict.fromkeys(self.scenarios) for cell in grid(name, self.clips, self.limit)]
        clips = self._rendered(chosen)
        console = Console(stderr=True)
        for name, delay_ms, truth in track(clips, "clips", len(chosen), console=console, transient=True):
            groups = [name, f"{name} {delay_ms:.0f} ms"] if self.cells and name in ("far", "double") else [name]
            for system, cancel in systems.items():
                with collect_reasons():  # a metric that cannot judge a clip leaves it out; n says how many count
                    scores = score_echo(truth, *cancel(truth))
                for group in groups:
                    found.setdefault(group, {}).setdefault(system, []).append(scores)
        intervals = {g: {s: means(rows) for s, rows in by_system.items()} for g, by_system in found.items()}
        if self.json:
            scores = {group: {s: as_json(row) for s, row in rows.items()} for group, rows in intervals.items()}
            print(json.dumps({"seed": self.seed, "clips": len(chosen), "scores": scores}, indent=1))
            return 0
        for group, by_system in intervals.items():
            print_scores(group, len(next(iter(found[group].values()))), by_system)
        return 0

    def _load(self, name: System) -> Cancel:
        if name == "input":
            return lambda truth: (truth.mic, None)
        return kalman() if name == "kalman" else model(self.model, self.device)

    def _rendered(self, cells: "Sequence[Cell]") -> Any:
        """The clips (scenario of the grid, delay in ms, truth), rounded to 16 bit as test sets are."""
        from tempfile import TemporaryDirectory

        import numpy as np

        from allears.audio.metrics.echo_clip import EchoTruth
        from allears.data.echo_render import render_echo_set
        from allears.data.echo_sets import draw_cells
        from allears.data.echo_spec import write_echoes
        from allears.data.talker_sets import Material

        specs = draw_cells(Material.from_corpus(self.corpus, "test"), cells, np.random.default_rng(self.seed))
        with TemporaryDirectory() as folder:
            write_echoes(Path(folder) / "grid.jsonl", specs)
            for name, batch, facts in render_echo_set(self.corpus, Path(folder) / "grid.jsonl"):
                arrays = {key: getattr(batch, key)[0].cpu().numpy() for key in EchoTruth._fields[1:-1]}
                truth = EchoTruth(scenario=facts["scenario"], changed_s=facts["changed_s"], **arrays)
                yield name.partition("-")[0], facts["delay_ms"], truth


def grid(scenario: str, clips: int = 1, limit: int | None = None) -> "list[Cell]":
    """The cells of a scenario, ``clips`` times, or ``limit`` of them, spread evenly."""
    from itertools import product

    from allears.data.echo_sets import Cell

    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, wanted 1 or more clips of each scenario")
    echoes, both = scenario != "near", scenario in ("double", "path")
    axes = (RATIOS_DB if both else (None,), DELAYS_MS if echoes else (0,), (True, False) if echoes else (True,), RT60_S)
    cells = []
    for ser_db, delay_ms, linear, rt60_s in product(*axes):
        for index in range(clips):
            name = f"{scenario}-{delay_ms}-{ser_db}-{'linear' if linear else 'distorts'}-{rt60_s}-{index}"
            kind: Any = "double" if scenario == "path" else scenario
            cells.append(Cell(name, kind, delay_ms, ser_db, linear, rt60_s, moves=scenario == "path"))
    if limit is None or limit >= len(cells):
        return cells
    return [cells[index * len(cells) // limit] for index in range(limit)]


def kalman() -> Cancel:
    """The linear filter, told the delay."""
    import torch

    from allears.audio.kalman import KalmanEchoFilter, aligned

    def cancel(truth: "EchoTruth") -> "tuple[np.ndarray, None]":
        mic, reference, delays = (torch.from_numpy(x) for x in (truth.mic, truth.reference, truth.delay_frames))
        error, _ = KalmanEchoFilter()(mic, aligned(reference[None], 160 * delays[None])[0])
        return error.numpy(), None

    return cancel


def model(name: str | None, device: str) -> Cancel:
    """The network, fed as a stream; it finds the delay itself."""
    import numpy as np

    from allears.models.echo import EchoCanceller

    canceller = EchoCanceller.from_pretrained(*(() if name is None else (name,)), device=device)

    def cancel(truth: "EchoTruth") -> "tuple[np.ndarray, np.ndarray | None]":
        heard: list[np.ndarray | None] = []
        output = canceller(truth.mic, truth.reference, RATE_HZ, on_facts=lambda facts: heard.append(facts.delay_ms))
        delays = [part[0] for part in heard if part is not None]
        if not delays:
            return np.asarray(output), None
        count = len(truth.delay_frames)
        frames = np.concatenate(delays)[:count] / 10.0
        return np.asarray(output), np.pad(frames, (0, count - len(frames)), mode="edge")

    return cancel


def means(rows: "Sequence[dict[str, float]]") -> "dict[str, Interval]":
    """Each metric that some of the clips have."""
    from allears.audio.metrics import bootstrap_interval

    found = {metric: bootstrap_interval([row[metric] for row in rows]) for metric in rows[0]}
    return {metric: interval for metric, interval in found.items() if interval.n}


def as_json(row: "dict[str, Interval]") -> dict[str, dict[str, float | None]]:
    """Metrics to mean, low, high and n."""
    from allears.cli.eval import finite

    return {metric: finite(interval._asdict()) for metric, interval in row.items()}


def print_scores(group: str, count: int, rows: "dict[str, dict[str, Interval]]") -> None:
    """A table of one group of clips."""
    from allears.cli.eval import interval_text, print_table

    print(f"{group}: {count} clips, mean and 95 % interval")
    print_table("", {system: {m: interval_text(i) for m, i in row.items()} for system, row in rows.items()})
    print()
