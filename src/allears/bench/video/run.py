"""Climbs the ladder: the stock network first, then each system against it; checked, timed, its memory read.

A video of a system that keeps the stock scheduler is 100 calls of the network (50 steps with guidance): ``total_s`` is
so many times the time of a call, which is what the loop costs: the scheduler's own work is below a thousandth. Few-step
systems are timed as whole videos, from noise to latents. The text encoder and the decoder are apart (``whole``).
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from allears.bench import results
from allears.bench.attention.peers import UnavailableError
from allears.bench.attention.run import Report, one_line
from allears.bench.timing import Timing, summarise
from allears.bench.video.rungs import SIZES, Rung, make_model, rungs, sample_video
from allears.bench.video.settings import Settings
from allears.bench.video.shares import shares_ms
from allears.bench.video.whole import measure_whole
from allears.core.device import resolve_device
from allears.turbo import estimate_memory
from allears.turbo.graphs import eager
from allears.turbo.report import random_inputs, relative_error, run_model
from allears.turbo.steps import FewSteps

BASE = "diffusers"
PLANNED = "allears-4step"  # whose plan is told; those of the other systems are parts of it
_MOST_CALLS = 20


def measure(settings: Settings, on_case: Callable[[str], None] = lambda name: None) -> Report:
    """Check and time the systems on the cases.

    Args:
        settings: what to run; see there.
        on_case: told the name of each case and system before it runs.

    Raises:
        ValueError: the device is unknown.
    """
    deadline = time.monotonic() + 60 * settings.minutes
    runner = Runner(settings, resolve_device(settings.device), deadline, on_case)
    runner.report.note(
        f"random weights in bfloat16, one video, seed {settings.seed}, on {runner.device}; linear layers in "
        f"{settings.linear}, {settings.keep:g} of the key blocks exact; total_s without text encoder and decoder; "
        f"{BASE}: 50 steps with guidance, that is 100 times step_ms"
    )
    for case in settings.case_names:
        try:
            runner.run(case)
        except (UnavailableError, torch.OutOfMemoryError) as error:
            runner.report.note(f"{case}: left out: {one_line(error)}")
    if settings.whole:
        for case in settings.case_names:
            on_case(f"{case}: text encoder and decoder")
            measure_whole(case, SIZES[case][1], runner.device, settings.seed, runner.report, settings.quick)
    return runner.report


class Runner:
    """Runs cases; holds the network at hand, which its systems change in turn and leave as it was."""

    def __init__(
        self, settings: Settings, device: torch.device, deadline: float, on_case: Callable[[str], None]
    ) -> None:
        self.settings, self.device, self.deadline, self.on_case = settings, device, deadline, on_case
        self.report = Report()

    @torch.no_grad()
    def run(self, case: str) -> None:
        """All systems on one case."""
        shape, size = SIZES[case]
        self.on_case(f"{case}: making the network")
        model = make_model(shape, self.device, self.settings.seed)
        inputs = random_inputs(model, size, seed=self.settings.seed)
        wanted: Tensor | None = None
        self.base_s: float | None = None
        for rung in rungs(self.settings):
            if time.monotonic() > self.deadline:
                self.report.note(f"{case}: {rung.name}: left out after {self.settings.minutes:g} minutes")
                continue
            self.on_case(f"{case}: {rung.name}")
            try:
                out = self.climb(case, rung, model, inputs, wanted)
            except UnavailableError as error:
                self.report.note(f"{case}: {rung.name}: not available: {one_line(error)}")
                continue
            except Exception as error:  # a system that fails does not stop the others
                self.report.note(f"{case}: {rung.name}: no speed: {type(error).__name__}: {one_line(error)}")
                continue
            wanted = out if rung.name == BASE else wanted

    def climb(self, case: str, rung: Rung, model: Any, inputs: dict[str, Tensor], wanted: Tensor | None) -> Tensor:
        """One system on one case; gives the output of the network for the inputs."""
        undo, plan = rung.install(model)
        try:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            out = run_model(model, inputs)  # what is compiled or tuned at first use is not timed
            if rung.spec is not None and rung.spec.graphs:
                run_model(model, inputs)
                out = run_model(model, inputs)  # replayed
            failure = self._check(case, rung, out, wanted)
            if failure:
                self.report.note(f"{case}: {rung.name}: no speed: {failure}")
                return out
            self._memory(case, rung)
            step = self._time(lambda: run_model(model, inputs))
            self.rows(case, rung, "step_ms", step)
            if rung.sampled is not None:
                sampler, text = FewSteps(rung.sampled), inputs["encoder_hidden_states"]
                latents = inputs["hidden_states"].float()
                if rung.spec is not None and rung.spec.graphs:
                    sample_video(model, sampler, latents, text)  # its calls may be a graph of their own
                video = self._time(lambda: sample_video(model, sampler, latents, text))
                total = _scaled(video, 1e-3)
            else:
                total = _scaled(step, 1e-3 * rung.calls)
            self.rows(case, rung, "total_s", total)
            self.base_s = total.ms if rung.name == BASE else self.base_s
            if self.base_s is not None:
                self.row(case, rung, "speedup", self.base_s / total.ms)
            if rung.prepare is None:  # what is compiled whole has no layers to time
                with eager(model):
                    shares, how = shares_ms(model, lambda: run_model(model, inputs), self.device)
                for metric, value in shares.items():
                    self.row(case, rung, metric, value)
                if how:
                    self.report.note(f"{case}: {rung.name}: shares of an eager call: {how}")
        finally:
            undo()
        for line in plan.splitlines() if rung.name == PLANNED else ():
            self.report.note(f"{case}: {rung.name}: {line.strip()}")
        return out

    def row(self, case: str, rung: Rung, metric: str, value: float) -> None:
        self.report.rows.append(results.row(case, rung.name, metric, value))

    def rows(self, case: str, rung: Rung, metric: str, timing: Timing) -> None:
        """A timing, whose unit is the metric's."""
        self.report.rows.append(results.row(case, rung.name, metric, *timing))

    def _check(self, case: str, rung: Rung, out: Tensor, wanted: Tensor | None) -> str:
        if not bool(out.isfinite().all()):
            return "NaN or infinity in its output"
        if wanted is None:
            return ""
        error = relative_error(out, wanted)
        self.row(case, rung, "rel_err", error)
        return f"rel_err {error:.3g} above {rung.most:g}" if rung.most is not None and error > rung.most else ""

    def _memory(self, case: str, rung: Rung) -> None:
        if self.device.type == "cuda":
            self.row(case, rung, "peak_gb", torch.cuda.max_memory_allocated(self.device) / 1e9)
        shape, size = SIZES[case]
        if rung.prepare is None:
            self.row(case, rung, "estimate_gb", estimate_memory(shape, size, rung.spec).peak_bytes / 1e9)

    def _time(self, call: Callable[[], object]) -> Timing:
        """Calls for about the settings' seconds, at least one; each waits for the device."""
        samples: list[float] = []
        started = time.perf_counter()
        while not samples or (time.perf_counter() - started < self.settings.seconds and len(samples) < _MOST_CALLS):
            self._wait()
            start = time.perf_counter()
            call()
            self._wait()
            samples.append((time.perf_counter() - start) * 1e3)
        return summarise(samples)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(factor * timing.ms, factor * timing.low_ms, factor * timing.high_ms, timing.n)
