"""Runs cases x systems: every system is held to its own formula, and those that are right are timed in turn."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from allears.bench.attention import systems as dense
from allears.bench.attention.cases import Case
from allears.bench.attention.check import Verdict, peak_bytes, timed_call
from allears.bench.attention.inputs import OFFSET, Inputs
from allears.bench.attention.run import Report, Runner, load_systems, run_cases
from allears.bench.attention.systems import Attend, Machine, System
from allears.bench.sparse import cases, systems
from allears.bench.sparse.cases import SparseCase
from allears.bench.sparse.formula import Formula, router_gap, sample_gradients, sample_output
from allears.bench.sparse.settings import Settings
from allears.bench.sparse.systems import Ours, Prepared, TrainingFree
from allears.bench.timing import Timing
from allears.core.device import resolve_device

DENSE = "fa2"  # speeds are given over this system's
ROUTER_GAP = 0.02  # above this the router picks the wrong blocks; see formula.router_gap


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
    report.note(
        "errors: of dense kernels against dense attention; of our modules against their exact form on the blocks that "
        "they picked, and these blocks against the best; of SLA, SageSLA and SpargeAttn against the softmax branch on "
        "their own blocks, since the linear branch of the first two covers all keys and is multiplied by "
        "zero in a new module"
    )
    loaded = load_systems(wanted, settings, device, report)
    runner = SparseRunner(device, loaded, report, seed, settings.quick)
    run_cases(runner, chosen, settings.minutes, started, on_case)
    for system, make in loaded.items():
        if isinstance(make, Ours | TrainingFree):
            report.notes += [f"{system.name}: kernel {kernel} ran {calls}" for kernel, calls in make.ran().items()]
    return report


class SparseRunner(Runner):
    """Systems are made for each case, and judged by their own formula: another map for each of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made: dict[System[Any], Prepared] = {}
        self.made_for: Case | None = None
        self.judged: dict[tuple[str, bool, str], Verdict | str] = {}
        self.dense_peaks: dict[str, int | None] = {}

    def prepare(self, case: Case) -> None:
        """See the base; what was made for another case is dropped."""
        if case != self.made_for:
            self.made, self.made_for = {}, case
        super().prepare(case)

    def prepared(self, case: Case, system: System[Any]) -> Prepared:
        """The system made for this case."""
        if system not in self.made:
            self.made[system] = self.loaded[system](case)
        return self.made[system]

    def attend(self, case: Case, system: System[Any]) -> Attend:
        return self.prepared(case, system).attend

    def verdict(self, case: Case, system: System[Any]) -> Verdict | str:
        """The check of a sparse system against its own formula; of a dense one against dense attention."""
        assert isinstance(case, SparseCase), "cases.select gives no others"
        prepared = self.attempt(lambda: self.prepared(case, system))
        if isinstance(prepared, str):
            return prepared
        if prepared.formula is None:
            return super().verdict(case, system)
        key = (system.name, case.mode == "fwd", f"{case.shape.name} {case.sparsity}")
        if key not in self.judged:
            found = self.attempt(lambda: self._judge_sparse(case, system, prepared.formula))
            self.judged[key] = found
        return self.judged[key]

    def call(self, case: Case, system: System[Any], verdict: Verdict) -> Callable[[int], object]:
        """The call to time; a row of the memory that it takes beyond dense flash attention's."""
        attend, sets = self.attend(case, system), self.sets
        if self.prepared(case, system).heads_first:
            sets = [_heads_first(inputs) for inputs in sets]
        if verdict.spoils:
            sets = [Inputs(*inputs.copies(), inputs.grad) for inputs in sets]
        peak = None if self.prepared(case, system).replays else self._peak(attend, sets, case)
        if peak is not None:
            least = self._dense_peak(case)
            assert least is not None, "both are measured on one device"
            self.rows(case, system, {"extra_memory_frac": (peak - least) / _input_bytes(sets[0])})
        call = timed_call(attend, sets, case.shape.causal, case.mode)
        call(0)  # what is compiled or tuned at first use is not timed
        return call

    def timed(self, case: Case, timings: Mapping[System[Any], Timing]) -> None:
        """Rows of what was timed, and how many times faster than dense flash attention it is."""
        super().timed(case, timings)
        dense_ms = next((timing.ms for system, timing in timings.items() if system.name == DENSE), None)
        if dense_ms is not None:
            for system, timing in timings.items():
                self.rows(case, system, {"speedup": dense_ms / timing.ms})

    def timing_values(self, case: Case, timing: Timing) -> dict[str, float]:
        """None: a dense count of operations says little where most are left out."""
        return {}

    def _judge_sparse(
        self, case: SparseCase, system: System[Any], formula_of: Callable[[Tensor, Tensor], Formula]
    ) -> Verdict | str:
        inputs = self.sets[0]
        with torch.no_grad():
            formula = formula_of(inputs.q, inputs.k)
        out = sample_output(inputs, formula, self.seed)
        grads = sample_gradients(inputs, formula, self.seed) if case.mode != "fwd" else None
        verdict = self.judge(case, system, out, grads)
        if isinstance(verdict, str) or verdict.failure or formula.router is None:
            return verdict
        gap = router_gap(inputs, formula, self.seed)
        if gap <= ROUTER_GAP:
            return verdict
        return replace(verdict, failure=f"its router's blocks fall short of the best by {gap:.3g} standard deviations")

    def _peak(self, attend: Attend, sets: list[Inputs], case: Case) -> int | None:
        """Most memory of a call above what is held before; of backward together with its forward."""
        call = timed_call(attend, sets[:1], case.shape.causal, "fwd" if case.mode == "fwd" else "fwd+bwd")
        call(0)
        return peak_bytes(call, self.device)

    def _dense_peak(self, case: Case) -> int | None:
        """That of torch's flash attention, whether or not it is among the systems."""
        key = f"{case.mode == 'fwd'} {case.shape.name}"
        if key not in self.dense_peaks:
            flash, _ = dense.select([DENSE])[0].load(Machine(self.device))
            self.dense_peaks[key] = self._peak(flash, self.sets, case)
        return self.dense_peaks[key]


def _heads_first(inputs: Inputs) -> Inputs:
    """The same values, laid out as (B, H, L, D)."""
    turned = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v, inputs.grad))
    return Inputs(*turned)


def _input_bytes(inputs: Inputs) -> int:
    return sum(x.numel() * x.element_size() for x in (inputs.q, inputs.k, inputs.v))
