"""Times the candidates of tile sizes of the Triton product, without the quantiser, and names the fastest.

Shapes: M rows, K channels in, N out.
"""

import time

import torch

from allears.bench import results
from allears.bench.attention.run import Report, one_line
from allears.bench.gemm.cases import Case
from allears.bench.gemm.inputs import Inputs
from allears.bench.timing import Call, Stopwatch
from allears.ops.gemm.call import explain, quantise, w8a8_linear
from allears.ops.gemm.schemes import SCHEMES
from allears.ops.gemm.tuned import candidates_for, chip_of

_BOUND = 0.1


def tune(case: Case, inputs: Inputs, stopwatch: Stopwatch, report: Report, deadline: float) -> None:
    """Rows ``ms`` of the system ``SCHEME CONFIG`` for each candidate, and a note with the line for ``tuned.MEASURED``.

    Where cuBLAS runs the scheme, it is timed beside them. Schemes that are not begun at ``deadline``, on the clock of
    ``time.monotonic``, are named in a note.

    Raises:
        ValueError: there is no CUDA GPU.
    """
    if not inputs.x.is_cuda:
        raise ValueError("device: tile sizes are tuned on a CUDA GPU; use device='cuda'")
    with torch.no_grad():
        for done, scheme in enumerate(SCHEMES):
            if time.monotonic() > deadline:
                report.note(f"{case.name}: left out for lack of time: {', '.join([*SCHEMES][done:])}")
                break
            _tune(case, scheme, inputs, stopwatch, report)


def _tune(case: Case, scheme: str, inputs: Inputs, stopwatch: Stopwatch, report: Report) -> None:
    from allears.ops.gemm.triton_host import compile_ahead, product

    assert inputs.linear is not None
    major, minor = torch.cuda.get_device_capability(inputs.x.device)
    chip = chip_of(10 * major + minor)
    bias = inputs.linear.bias
    x, weight = quantise(inputs.x, scheme), quantise(inputs.linear.weight, scheme)
    operands = (x.values, weight.values, x.scale, weight.scale, bias, scheme, torch.bfloat16)
    calls: dict[str, Call] = {}
    lines: dict[str, str] = {}
    candidates = candidates_for(chip, scheme)
    compile_ahead(*operands, candidates)
    for config in candidates:
        try:
            error = inputs.error(product(*operands, config))
        except Exception as reason:  # what this Triton does not compile is no candidate
            report.note(f"{case.name}: {scheme} {config.name}: {type(reason).__name__}: {one_line(reason)}")
            continue
        if not error <= _BOUND:
            report.note(f"{case.name}: {scheme} {config.name}: its error {error:.3g} is above {_BOUND}")
            continue
        calls[config.name] = lambda index, config=config: product(*operands, config)
        lines[config.name] = f"({chip}, {scheme!r}, {case.columns}, {case.inner}): {config}"
    if "cublas" not in explain(x, weight, bias).refused:
        calls["cublas"] = lambda index: w8a8_linear(x, weight, bias, "cublas")
    timings = dict(zip(calls, stopwatch.time(list(calls.values())), strict=True))
    for name, timing in timings.items():
        made = (case.name, f"{scheme} {name}")
        report.rows.append(results.row(*made, "ms", timing.ms, timing.low_ms, timing.high_ms, timing.n))
        report.rows.append(results.row(*made, "tflops", case.flops / timing.ms / 1e9))
    if lines:
        report.note(f"fastest: {lines[min(lines, key=lambda name: timings[name].ms)]}")
