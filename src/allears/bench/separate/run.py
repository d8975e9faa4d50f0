"""Runs the separators over lengths: checked once a size, then timed in turn, and their memory read.

Each system is a net of the same size and drawn weights; only its attention differs. The call is the whole network,
from a waveform to waveforms, one input at a time, without gradients. Shapes: B = 1, J outputs, S samples.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from allears.bench import results
from allears.bench.attention.check import peak_bytes
from allears.bench.attention.run import Report, one_line
from allears.bench.growth import power_law
from allears.bench.separate.graph import captured
from allears.bench.separate.nets import BOUNDS, check, make_mixture, make_nets, products, system_name
from allears.bench.separate.settings import FIRST_S, Case, Settings, parse
from allears.bench.timing import Stopwatch, Timing
from allears.core.device import resolve_device
from allears.models.separate.model import SeparateNet

Call = Callable[[int], Tensor]
Found = TypeVar("Found")
_GROWS = ("ms", "graph_ms", "peak_gb")
_CALLS = 30  # about how many a system gets in a case of long calls, graphs included


def measure(settings: Settings, on_case: Callable[[str], None] = lambda name: None) -> Report:
    """Check and time the separators at every length; see :class:`Settings`.

    Args:
        on_case: told the name of each case before it runs.
    """
    started = time.monotonic()
    device = resolve_device(settings.device)
    runner = Runner(settings, device)
    runner.report.note(
        f"one input of normal noise, seed {settings.seed}, on {device}; drawn weights, equal for published and "
        "optimised; inference; float32 is without TF32"
    )
    left_out = []
    for case in settings.cases(device.type == "cuda"):
        left_s = 60 * settings.minutes - (time.monotonic() - started)
        if left_s <= 0 or runner.guess_s(case) > left_s:
            left_out.append(case.name)
            continue
        on_case(case.name)
        runner.run(case)
    if left_out:
        runner.report.note(f"left out, to end after {settings.minutes:g} minutes: {', '.join(left_out)}")
    runner.report.notes += growth(runner.report.rows)
    return runner.report


class Runner:
    """Holds the nets of the sizes met so far, and what it learnt of each."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.report = Report()
        self.stopwatch = Stopwatch(device, 0.02 if settings.quick else 0.15)
        self.nets: dict[str, dict[str, SeparateNet]] = {}
        self.full_at: dict[tuple[str, str, str], float] = {}  # (size, attention, precision) -> seconds of input
        self.took: dict[tuple[str, str, str], tuple[float, float]] = {}  # the same -> seconds of input, and of a call

    def guess_s(self, case: Case) -> float:
        """About how long a case takes, by the last ones of its size; 0 where none ran."""
        found = [self.took.get((case.size, a, case.precision)) for a in self.settings.attentions(case)]
        return sum(_CALLS * call_s * case.seconds / seconds for seconds, call_s in filter(None, found))

    def run(self, case: Case) -> None:
        """Rows of one case."""
        if case.size not in self.nets:
            self.nets[case.size] = self.checked(case.size)
        calls: dict[str, Call] = {}
        with torch.inference_mode(), products(case.precision, self.device):
            for attention in self.settings.attentions(case):
                if attention in self.nets[case.size]:
                    call = self.attempt(case, attention, lambda a=attention: self.call(case, a))
                    if call is not None:
                        calls[attention] = call
            for attention, timing in self.timed(case, calls).items():
                self.row(case, attention, "ms", timing)
                self.took[case.size, attention, case.precision] = (case.seconds, timing.ms / 1e3)
            if self.settings.graphs and self.device.type == "cuda":
                for attention, call in calls.items():
                    timing = self.attempt(case, attention, lambda c=call: self.graph_timing(c), "no graph")
                    if timing is not None:
                        self.row(case, attention, "graph_ms", timing)
        self.report.rows += ratios(self.report.rows, case.name, system_name(case.size, "published"))

    def checked(self, size: str) -> dict[str, SeparateNet]:
        """The nets of a size, without those that are wrong."""
        nets = make_nets(size, self.settings.attention, self.device, self.settings.seed)
        for attention, net in nets.items():
            self.report.note(f"{size}: {system_name(size, attention)}: {size_words(net)}")
        for attention, error in check(size, nets, self.device, self.settings.seed, self.settings.quick).items():
            name = system_name(size, attention)
            self.report.rows.append(results.row(f"{size} check", name, "rel_err", error))
            if not error <= BOUNDS[attention]:
                self.report.note(f"{size}: {name}: no speed: its error {error:.3g} is above {BOUNDS[attention]:g}")
                del nets[attention]
        return nets

    def call(self, case: Case, attention: str) -> Call:
        """The call to time, warm; its peak memory is read here."""
        net = self.nets[case.size][attention]
        mixture = make_mixture(net, case.seconds, self.settings.seed)

        def call(index: int) -> Tensor:
            return net(mixture)

        call(0)  # what is compiled or tuned at first use is no part of the peak
        peak = peak_bytes(call, self.device)
        if peak is not None:
            name = system_name(case.size, attention)
            self.report.rows.append(results.row(case.name, name, "peak_gb", peak / 1e9))
        return call

    def timed(self, case: Case, calls: Mapping[str, Call]) -> dict[str, Timing]:
        """All in turn; one after the other where their caches do not fit beside each other."""
        try:
            return dict(zip(calls, self.stopwatch.time(list(calls.values())), strict=True))
        except RuntimeError as error:  # out of memory, mostly
            self.report.note(f"{case.name}: timed one after the other, since in turn: {one_line(error)}")
        timings = {a: self.attempt(case, a, lambda c=c: self.stopwatch.time([c])[0]) for a, c in calls.items()}
        return {attention: timing for attention, timing in timings.items() if timing is not None}

    def graph_timing(self, call: Call) -> Timing:
        """Of the call as a CUDA graph, alone: a graph holds the memory of its peak."""
        return self.stopwatch.time([captured(call, self.device)])[0]

    def attempt(self, case: Case, attention: str, work: Callable[[], Found], what: str = "no speed") -> Found | None:
        """The result, or ``None`` and a note: a system that fails, or finds no memory, does not stop the others."""
        key, name = (case.size, attention, case.precision), system_name(case.size, attention)
        full_at = self.full_at.get(key, math.inf)
        if case.seconds >= full_at and what == "no speed":
            self.report.note(f"{case.name}: {name}: {what}: memory was too small at {full_at:g} s already")
            return None
        reason = ""
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = f"out of memory: {one_line(error)}"
            if what == "no speed":
                self.full_at[key] = min(case.seconds, full_at)
        except (RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
        self.report.note(f"{case.name}: {name}: {what}: {reason}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def row(self, case: Case, attention: str, metric: str, timing: Timing) -> None:
        name = system_name(case.size, attention)
        self.report.rows.append(
            results.row(case.name, name, metric, timing.ms, timing.low_ms, timing.high_ms, timing.n)
        )


def size_words(net: torch.nn.Module) -> str:
    """Parameters, and the memory of all that is held."""
    held = [*net.parameters(), *net.buffers()]
    parameters = sum(x.numel() for x in net.parameters()) / 1e6
    return f"{parameters:.2f} M parameters, {sum(x.numel() * x.element_size() for x in held) / 1e9:.3f} GB"


def ratios(rows: Sequence[Mapping[str, Any]], case: str, base: str) -> list[dict[str, Any]]:
    """How many times faster than ``base`` each other system of the case is, and its share of ``base``'s memory."""
    values = {(row["system"], row["metric"]): row["value"] for row in rows if row["case"] == case}
    found = []
    for system in dict.fromkeys(system for system, _ in values if system != base):
        for metric, of, faster in (
            ("speedup", "ms", True),
            ("graph_speedup", "graph_ms", True),
            ("memory_frac", "peak_gb", False),
        ):
            this, other = values.get((system, of)), values.get((base, of))
            if this and other:
                found.append(results.row(case, system, metric, other / this if faster else this / other))
    return found


def growth(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on the exponents of time and memory over length."""
    said = {key: power_law(points, FIRST_S, "s") for key, points in series(rows).items()}
    return [f"{system}, {size}, {metric}: {text}" for (system, size, metric), text in said.items() if text]


def series(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[float, float]]:
    """(system, size and precision, metric) -> seconds of input -> value, lengths rising, of times and memory."""
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    read = [(case, row) for row in rows if row["metric"] in _GROWS and row["value"] and (case := parse(row["case"]))]
    for case, row in sorted(read, key=lambda pair: pair[0].seconds):
        found.setdefault((row["system"], case.group, row["metric"]), {})[case.seconds] = row["value"]
    order = list(dict.fromkeys((row["system"], case.group) for case, row in read))
    return dict(sorted(found.items(), key=lambda item: order.index(item[0][:2])))
