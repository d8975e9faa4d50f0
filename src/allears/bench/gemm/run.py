"""Runs 8-bit layers on cases: each is checked against float64, and those that are right are timed in turn.

Shapes: M rows, K channels in, N out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from allears.bench import results
from allears.bench.attention.peers import UnavailableError
from allears.bench.attention.run import Report, one_line
from allears.bench.gemm.cases import BLOCKS, Case, select
from allears.bench.gemm.inputs import OUTLIER, OUTLIERS, SPREAD, Inputs, make_inputs
from allears.bench.gemm.settings import Settings
from allears.bench.gemm.systems import Run, System, torchao_version
from allears.bench.gemm.systems import select as select_systems
from allears.bench.gemm.tune import tune
from allears.bench.timing import Call, Stopwatch, captured
from allears.core.device import resolve_device
from allears.ops.gemm.call import explain, quantise
from allears.ops.gemm.schemes import SCHEMES, Quantised

BASELINE = {"linear": "cublas-bf16", "norm": "torch-compile", "gelu": "torch-compile"}


_SLOW_S = 2.0  # to prepare a system; longer is told


def measure(
    settings: Settings,
    on_case: Callable[[str], None] = lambda name: None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Check and time the systems on the cases, or with ``tune`` the candidates of tile sizes.

    Args:
        settings: what to run; see there.
        on_case: told the name of each case before it runs.
        keep: given the report so far after each case, so that a run that is stopped loses one case at most.

    Raises:
        ValueError: a case, system or device is unknown.
    """
    deadline = time.monotonic() + 60 * settings.minutes
    device = resolve_device(settings.device)
    cases, systems = select(settings.case_names), select_systems(settings.systems)
    report = Report()
    report.note(
        f"inputs: normal bfloat16 times log-normal gains of the channels (deviation {SPREAD}), {OUTLIERS} channels "
        f"{OUTLIER:g} times larger, seed {settings.seed}, on {device}; errors: relative L2, against float64; times "
        f"hold the quantisation of the inputs; ms: as a CUDA graph, eager_ms: called; {torchao_version()}"
    )
    stopwatch = Stopwatch(device, 0.02 if settings.quick else 0.15)
    for done, case in enumerate(cases):
        if time.monotonic() > deadline:
            report.note(f"left out after {settings.minutes:g} minutes: {', '.join(c.name for c in cases[done:])}")
            break
        on_case(case.name)
        try:
            inputs = make_inputs(case, device, settings.seed)
            if not settings.tune:
                _run(case, inputs, [s for s in systems if case.kind in s.kinds], stopwatch, report, deadline)
            elif case.kind == "linear":
                tune(case, inputs, stopwatch, report, deadline)
        except torch.OutOfMemoryError as error:
            report.note(f"{case.name}: left out: it does not fit: {one_line(error)}")
        keep(report)
    report.rows += block_rows(report.rows)
    return report


def _run(
    case: Case, inputs: Inputs, systems: Sequence[System], stopwatch: Stopwatch, report: Report, deadline: float
) -> None:
    right: list[tuple[System, Run]] = []
    for done, system in enumerate(systems):
        began = time.monotonic()
        if began > deadline:
            report.note(f"{case.name}: left out for lack of time: {', '.join(s.name for s in systems[done:])}")
            break
        try:
            with torch.no_grad():
                call = system.prepare(inputs)
                out = call()
                error = inputs.error(_plain(out))
        except UnavailableError as reason:
            report.note(f"{case.name}: {system.name}: not available: {reason}")
            continue
        except Exception as reason:  # a peer that fails does not stop the others
            report.note(f"{case.name}: {system.name}: no speed: {type(reason).__name__}: {one_line(reason)}")
            continue
        took_s = time.monotonic() - began
        if took_s > _SLOW_S:
            report.note(f"{case.name}: {system.name}: {took_s:.1f} s until its first result")
        report.rows.append(results.row(case.name, system.name, "rel_err", error))
        if error <= system.bound:
            right.append((system, call))
        else:
            report.note(f"{case.name}: {system.name}: no speed: its error {error:.3g} is above {system.bound}")
    with torch.no_grad():
        names = [f"{case.name}: {system.name}" for system, _ in right]
        calls = _calls([call for _, call in right], inputs.x.device, report, names)
        timings = stopwatch.time(calls)
        eager = stopwatch.time([lambda index, call=call: call() for _, call in right])
        times = {system.name: timing.ms for (system, _), timing in zip(right, timings, strict=True)}
        base = times.get(BASELINE[case.kind])
        for (system, _), timing, alone in zip(right, timings, eager, strict=True):
            name = (case.name, system.name)
            report.rows.append(results.row(*name, "ms", timing.ms, timing.low_ms, timing.high_ms, timing.n))
            report.rows.append(results.row(*name, "eager_ms", alone.ms, alone.low_ms, alone.high_ms, alone.n))
            if case.flops:
                report.rows.append(results.row(*name, "tflops", case.flops / timing.ms / 1e9))
            if base is not None:
                report.rows.append(results.row(*name, "speedup", base / timing.ms))
        if inputs.linear is not None:
            _parts(case, inputs, stopwatch, report)


def _calls(runs: Sequence[Run], device: torch.device, report: Report, names: Sequence[str]) -> list[Call]:
    """Each as a CUDA graph; as it is, with a note, where one cannot be captured."""
    calls: list[Call] = []
    for run, name in zip(runs, names, strict=True):
        try:
            ready = captured(run, device)
        except Exception as reason:  # a peer that cannot be captured is timed all the same
            report.note(f"{name}: ms is that of eager calls: {type(reason).__name__}: {one_line(reason)}")
            torch.cuda.synchronize(device)
            ready = run
        calls.append(lambda index, ready=ready: ready())
    return calls


def _parts(case: Case, inputs: Inputs, stopwatch: Stopwatch, report: Report) -> None:
    """Time of the quantiser alone, for each scheme, and a note on the kernel that ``auto`` takes."""
    assert inputs.linear is not None
    runs: list[Run] = [lambda scheme=scheme: quantise(inputs.x, scheme) for scheme in SCHEMES]
    timings = stopwatch.time(_calls(runs, inputs.x.device, report, [f"{case.name}: quantise {s}" for s in SCHEMES]))
    for scheme, timing in zip(SCHEMES, timings, strict=True):
        report.rows.append(results.row(case.name, f"allears-{scheme}", "quantise_ms", timing.ms))
        choice = explain(inputs.x, quantise(inputs.linear.weight.detach(), scheme), inputs.linear.bias)
        report.note(f"{case.name}: allears-{scheme} runs {choice.kernel}")


def _plain(out: Tensor | Quantised) -> Tensor:
    return out.dequantise() if isinstance(out, Quantised) else out


def block_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers of a whole transformer block, where all of its shapes were timed: milliseconds and times faster."""
    found = {(r["case"], r["system"]): r["value"] for r in rows if r["metric"] == "ms"}
    made = []
    for name, parts in BLOCKS.items():
        times = {}
        for system in dict.fromkeys(system for _, system in found):
            if all((case.name, system) in found for case, _ in parts):
                times[system] = sum(count * found[case.name, system] for case, count in parts)
        for system, ms in times.items():
            made.append(results.row(f"block {name}", system, "ms", ms))
            if BASELINE["linear"] in times:
                made.append(results.row(f"block {name}", system, "speedup", times[BASELINE["linear"]] / ms))
    return made
