"""Runs cases x systems: every system of a shape is checked, and those that are right are timed in turn."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from allears.bench import results
from allears.bench.attention import cases, systems
from allears.bench.attention.cases import Case, Shape
from allears.bench.attention.check import Verdict, check, peak_bytes, timed_call
from allears.bench.attention.inputs import OFFSET, Inputs, make_input_sets
from allears.bench.attention.peers import UnavailableError, add_folders
from allears.bench.attention.reference import GradientSample, OutputSample, sample_gradients, sample_output
from allears.bench.attention.settings import Settings
from allears.bench.attention.systems import Attend, Machine, Ours, System
from allears.bench.timing import Stopwatch
from allears.core.device import resolve_device

logger = logging.getLogger(__name__)


@dataclass
class Report:
    """Rows as ``bench.results.row`` makes them, and notes: what each system is, what failed, what was left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        logger.info("%s", text)
        self.notes.append(text)


class _BrokenContextError(Exception):
    """The GPU answers nothing more after a crash of a kernel."""


def measure(settings: Settings, on_case: Callable[[str], None] = lambda name: None) -> Report:
    """Check and time the systems on the cases.

    Args:
        settings: what to run; see there.
        on_case: told the name of each case before it runs.

    Raises:
        ValueError: a case, system, folder or device is unknown.
    """
    started = time.monotonic()
    device = resolve_device(settings.device)
    chosen, wanted = cases.select(settings.case_names), systems.select(settings.systems)
    add_folders(settings.peer_folders)
    seed = secrets.randbelow(2**31) if settings.seed is None else settings.seed
    report = Report()
    report.note(f"inputs: normal bfloat16, K with an offset of size {OFFSET} on each channel, seed {seed}; on {device}")
    loaded = _load(wanted, Machine(device, settings.peer_folders), report)
    runner = _Runner(device, loaded, report, seed, settings.quick)
    for done, case in enumerate(chosen):
        if time.monotonic() - started > 60 * settings.minutes:
            report.note(f"left out after {settings.minutes:g} minutes: {', '.join(c.name for c in chosen[done:])}")
            break
        on_case(case.name)
        try:
            runner.run(case)
        except _BrokenContextError as error:
            report.note(f"stopped: {error}; left out: {', '.join(c.name for c in chosen[done + 1 :]) or 'nothing'}")
            break
        except torch.OutOfMemoryError as error:
            report.note(f"{case.name}: left out: inputs and reference do not fit: {_one_line(error)}")
    for system, attend in loaded.items():
        if isinstance(attend, Ours):
            report.notes += [f"{system.name}: kernel {kernel} ran {calls}" for kernel, calls in attend.ran().items()]
    return report


def _load(wanted: list[System], machine: Machine, report: Report) -> dict[System, Attend]:
    loaded: dict[System, Attend] = {}
    for system in wanted:
        try:
            loaded[system], about = system.load(machine)
            report.note(f"{system.name}: {about}")
        except UnavailableError as error:
            report.note(f"{system.name}: not available: {error}")
        except Exception as error:  # whatever a peer does at import, the others go on
            report.note(f"{system.name}: not available: {type(error).__name__}: {_one_line(error)}")
    return loaded


class _Runner:
    """Holds the inputs and the exact answers of the shape at hand, which its directions share."""

    def __init__(
        self, device: torch.device, loaded: dict[System, Attend], report: Report, seed: int, quick: bool
    ) -> None:
        self.device, self.loaded, self.report, self.seed = device, loaded, report, seed
        self.stopwatch = Stopwatch(device, 0.02 if quick else 0.15)
        self.shape: Shape | None = None
        self.sets: list[Inputs] = []
        self.out: OutputSample | None = None
        self.grads: GradientSample | None = None
        self.verdicts: dict[tuple[str, bool], Verdict | str] = {}

    def run(self, case: Case) -> None:
        self._prepare(case)
        right: list[tuple[System, Callable[[int], object]]] = []
        for system, attend in self.loaded.items():
            if case.mode != "fwd" and not system.trains:
                continue
            verdict = self._verdict(case, system, attend)
            if isinstance(verdict, str):
                self.report.note(f"{case.name}: {system.name}: no speed: {verdict}")
                continue
            self._rows(case, system, verdict.errors)
            if verdict.failure:
                self.report.note(f"{case.name}: {system.name}: no speed: {verdict.failure}")
                continue
            call = self._attempt(lambda s=system, a=attend, v=verdict: self._call(case, s, a, v))
            if isinstance(call, str):
                self.report.note(f"{case.name}: {system.name}: no speed: {call}")
            else:
                right.append((system, call))
        timings = self._attempt(lambda: self.stopwatch.time([call for _, call in right]))
        if isinstance(timings, str):
            self.report.note(f"{case.name}: no speed: timing failed: {timings}")
            return
        for (system, _), timing in zip(right, timings, strict=True):
            row = (case.name, system.name)
            self.report.rows.append(results.row(*row, "ms", timing.ms, timing.low_ms, timing.high_ms, timing.n))
            self._rows(case, system, {"tflops": case.flops / timing.ms / 1e9})

    def _prepare(self, case: Case) -> None:
        if case.shape != self.shape:
            self.shape, self.sets, self.out, self.grads, self.verdicts = None, [], None, None, {}
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.sets = make_input_sets(case.shape, self.device, self.seed)
            self.out = sample_output(self.sets[0], case.shape.causal, self.seed)
            self.shape = case.shape
        if case.mode != "fwd" and self.grads is None:
            self.grads = sample_gradients(self.sets[0], case.shape.causal, self.seed)

    def _verdict(self, case: Case, system: System, attend: Attend) -> Verdict | str:
        """The check of a system on this shape; forward alone and with gradients are checked apart."""
        key = (system.name, case.mode == "fwd")
        if key not in self.verdicts:
            assert self.out is not None, "_prepare comes first"
            arguments = (system, attend, self.sets[0], case.shape.causal, case.mode, self.out, self.grads)
            self.verdicts[key] = self._attempt(lambda: check(*arguments))
            found = self.verdicts[key]
            if isinstance(found, Verdict) and found.spoils:
                self.report.note(f"{case.shape.name}: {system.name} changes its inputs in place; timed on copies")
        return self.verdicts[key]

    def _call(self, case: Case, system: System, attend: Attend, verdict: Verdict) -> Callable[[int], object]:
        sets = self.sets
        if verdict.spoils:
            sets = [Inputs(*inputs.copies(), inputs.grad) for inputs in sets]
        call = timed_call(attend, sets, case.shape.causal, case.mode)
        call(0)  # what is compiled or tuned at first use is no part of the peak
        peak = peak_bytes(call, self.device) if case.mode == "fwd+bwd" else None
        if peak is not None:
            self._rows(case, system, {"peak_gb": peak / 1e9})
        return call

    def _rows(self, case: Case, system: System, values: dict[str, float]) -> None:
        self.report.rows += [results.row(case.name, system.name, metric, value) for metric, value in values.items()]

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """The result, or the reason for the failure as text; a system that fails does not stop the others."""
        try:
            found = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return found
        except Exception as error:
            reason = f"{type(error).__name__}: {_one_line(error)}"
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            raise _BrokenContextError(f"the GPU's context is broken after {reason}") from error
        return reason


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
