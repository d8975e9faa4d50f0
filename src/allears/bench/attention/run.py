"""Runs cases x systems: every system of a shape is checked, and those that are right are timed in turn."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from allears.bench import results
from allears.bench.attention import cases, systems
from allears.bench.attention.cases import Case, Shape
from allears.bench.attention.check import Verdict, check, peak_bytes, timed_call
from allears.bench.attention.inputs import OFFSET, Inputs, make_input_sets, make_inputs
from allears.bench.attention.peers import UnavailableError, add_folders
from allears.bench.attention.reference import GradientSample, OutputSample, sample_gradients, sample_output
from allears.bench.attention.settings import Settings
from allears.bench.attention.systems import Attend, Machine, Ours, System
from allears.bench.timing import Stopwatch, Timing
from allears.core.device import resolve_device

logger = logging.getLogger(__name__)
_SEEDS_APART = 1000  # of the inputs that errors are measured on, behind those that timed calls rotate among


@dataclass
class Report:
    """Rows as ``bench.results.row`` makes them, and notes: what each system is, what failed, what was left out."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        logger.info("%s", text)
        self.notes.append(text)


class BrokenContextError(Exception):
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
    seed = settings.seed_to_use()
    report = Report()
    report.note(f"inputs: normal bfloat16, K with an offset of size {OFFSET} on each channel, seed {seed}; on {device}")
    loaded = load_systems(wanted, settings, device, report)
    runner = Runner(device, loaded, report, seed, settings.quick, settings.error_seeds)
    run_cases(runner, chosen, settings.minutes, started, on_case)
    for system, attend in loaded.items():
        if isinstance(attend, Ours):
            report.notes += [f"{system.name}: kernel {kernel} ran {calls}" for kernel, calls in attend.ran().items()]
    return report


def load_systems(
    wanted: Sequence[System[Any]], settings: Settings, device: torch.device, report: Report
) -> dict[System[Any], Any]:
    """What each system's ``load`` gives, for those that can run here; a note for each."""
    add_folders(settings.peer_folders)
    machine = Machine(device, settings.peer_folders)
    loaded: dict[System[Any], Any] = {}
    for system in wanted:
        try:
            loaded[system], about = system.load(machine)
            report.note(f"{system.name}: {about}")
        except UnavailableError as error:
            report.note(f"{system.name}: not available: {error}")
        except Exception as error:  # whatever a peer does at import, the others go on
            report.note(f"{system.name}: not available: {type(error).__name__}: {one_line(error)}")
    return loaded


def run_cases(
    runner: "Runner", chosen: Sequence[Case], minutes: float, started_s: float, on_case: Callable[[str], None]
) -> None:
    """Run the cases until the minutes since ``started_s`` (``time.monotonic``) are over; the notes name the others."""
    report = runner.report
    for done, case in enumerate(chosen):
        if time.monotonic() - started_s > 60 * minutes:
            report.note(f"left out after {minutes:g} minutes: {', '.join(c.name for c in chosen[done:])}")
            break
        on_case(case.name)
        try:
            runner.run(case)
        except BrokenContextError as error:
            report.note(f"stopped: {error}; left out: {', '.join(c.name for c in chosen[done + 1 :]) or 'nothing'}")
            break
        except torch.OutOfMemoryError as error:
            report.note(f"{case.name}: left out: inputs and reference do not fit: {one_line(error)}")


class Runner:
    """Checks and times systems; holds the inputs and exact answers of the shape at hand, which its cases share.

    Args:
        error_seeds: how many inputs the error of a forward pass is the mean of.
    """

    def __init__(
        self,
        device: torch.device,
        loaded: Mapping[System[Any], Any],
        report: Report,
        seed: int,
        quick: bool,
        error_seeds: int = 1,
    ) -> None:
        self.error_seeds = error_seeds
        self.device, self.loaded, self.report, self.seed = device, loaded, report, seed
        self.stopwatch = Stopwatch(device, 0.02 if quick else 0.15)
        self.shape: Shape | None = None
        self.sets: list[Inputs] = []
        self.others: list[tuple[Inputs, OutputSample]] = []
        self.out: OutputSample | None = None
        self.grads: GradientSample | None = None
        self.verdicts: dict[tuple[str, bool], Verdict | str] = {}

    def run(self, case: Case) -> None:
        self.prepare(case)
        right: list[tuple[System[Any], Callable[[int], object]]] = []
        for system in self.loaded:
            if (case.mode != "fwd" and not system.trains) or (system.shapes and case.shape.name not in system.shapes):
                continue
            verdict = self.verdict(case, system)
            if isinstance(verdict, str):
                self.report.note(f"{case.name}: {system.name}: no speed: {verdict}")
                continue
            self.error_rows(case, system, verdict)
            if verdict.failure:
                self.report.note(f"{case.name}: {system.name}: no speed: {verdict.failure}")
                continue
            call = self.attempt(lambda s=system, v=verdict: self.call(case, s, v))
            if isinstance(call, str):
                self.report.note(f"{case.name}: {system.name}: no speed: {call}")
            else:
                right.append((system, call))
        timings = self.attempt(lambda: self.stopwatch.time([call for _, call in right]))
        if isinstance(timings, str):
            self.report.note(f"{case.name}: no speed: timing failed: {timings}")
            return
        self.timed(case, {system: timing for (system, _), timing in zip(right, timings, strict=True)})

    def error_rows(self, case: Case, system: System[Any], verdict: Verdict) -> None:
        """Rows of the errors; a right forward's is the mean over several inputs, with the lowest and the highest."""
        others = [] if case.mode != "fwd" or verdict.failure else self.others
        found = self.attempt(lambda: [self._error(case, system, inputs, out) for inputs, out in others])
        if isinstance(found, str):
            self.report.note(f"{case.name}: {system.name}: its error is of one input: {found}")
        if isinstance(found, str) or not found:
            self.rows(case, system, verdict.errors)
            return
        errors = [verdict.errors["rel_err"], *found]
        row = (sum(errors) / len(errors), min(errors), max(errors), len(errors))
        self.report.rows.append(results.row(case.name, system.name, "rel_err", *row))

    def _error(self, case: Case, system: System[Any], inputs: Inputs, out: OutputSample) -> float:
        with torch.no_grad():
            return out.rel_err(self.attend(case, system)(*inputs.copies(), case.shape.causal))

    def attend(self, case: Case, system: System[Any]) -> Attend:
        """The function that the system runs on this case."""
        return self.loaded[system]

    def timed(self, case: Case, timings: Mapping[System[Any], Timing]) -> None:
        """Rows of what was timed."""
        for system, timing in timings.items():
            row = (case.name, system.name)
            self.report.rows.append(results.row(*row, "ms", timing.ms, timing.low_ms, timing.high_ms, timing.n))
            self.rows(case, system, self.timing_values(case, timing))

    def timing_values(self, case: Case, timing: Timing) -> dict[str, float]:
        """More metrics of a timing."""
        return {"tflops": case.flops / timing.ms / 1e9}

    def prepare(self, case: Case) -> None:
        """Inputs and exact answers of the case's shape."""
        if case.shape != self.shape:
            self.shape, self.sets, self.others, self.out, self.grads, self.verdicts = None, [], [], None, None, {}
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.sets = make_input_sets(case.shape, self.device, self.seed)
            self.out = sample_output(self.sets[0], case.shape.causal, self.seed)
            self.shape = case.shape
        if case.mode == "fwd" and not self.others:
            for index in range(1, self.error_seeds):
                inputs = make_inputs(case.shape, self.device, self.seed + _SEEDS_APART * index)
                self.others.append((inputs, sample_output(inputs, case.shape.causal, self.seed + index)))
        if case.mode != "fwd" and self.grads is None:
            self.grads = sample_gradients(self.sets[0], case.shape.causal, self.seed)

    def verdict(self, case: Case, system: System[Any]) -> Verdict | str:
        """The check of a system on this shape; forward alone and with gradients are checked apart."""
        key = (system.name, case.mode == "fwd")
        if key not in self.verdicts:
            assert self.out is not None, "prepare comes first"
            self.verdicts[key] = self.judge(case, system, self.out, self.grads)
        return self.verdicts[key]

    def judge(self, case: Case, system: System[Any], out: OutputSample, grads: GradientSample | None) -> Verdict | str:
        """Compare one call of a system with these samples."""
        attend = self.attend(case, system)
        arguments = (system, attend, self.sets[0], case.shape.causal, case.mode, out, grads)
        found = self.attempt(lambda: check(*arguments))
        if isinstance(found, Verdict) and found.spoils:
            self.report.note(f"{case.shape.name}: {system.name} changes its inputs in place; timed on copies")
        return found

    def call(self, case: Case, system: System[Any], verdict: Verdict) -> Callable[[int], object]:
        """The call to time."""
        sets = self.sets
        if verdict.spoils:
            sets = [Inputs(*inputs.copies(), inputs.grad) for inputs in sets]
        call = timed_call(self.attend(case, system), sets, case.shape.causal, case.mode)
        call(0)  # what is compiled or tuned at first use is no part of the peak
        peak = peak_bytes(call, self.device) if case.mode == "fwd+bwd" else None
        if peak is not None:
            self.rows(case, system, {"peak_gb": peak / 1e9})
        return call

    def rows(self, case: Case, system: System[Any], values: dict[str, float]) -> None:
        self.report.rows += [results.row(case.name, system.name, metric, value) for metric, value in values.items()]

    def attempt(self, work: Callable[[], Any]) -> Any:
        """The result, or the reason for the failure as text; a system that fails does not stop the others."""
        try:
            found = work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return found
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            raise BrokenContextError(f"the GPU's context is broken after {reason}") from error
        return reason


def one_line(error: BaseException) -> str:
    """The message for a note: its first 300 characters, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
