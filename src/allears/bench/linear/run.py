"""Runs linear attention over lengths: checked, timed, and held against the copy bandwidth of the same run.

The call is the whole layer without its projections: focused feature map with a learned scale, both directions, and the
depthwise convolution of V with 5 taps, in bfloat16.

Shapes: B = 1, L tokens, H heads, D head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from allears.bench import results
from allears.bench.attention.check import peak_bytes
from allears.bench.attention.run import Report
from allears.bench.growth import power_law
from allears.bench.linear.settings import SHAPES, Settings
from allears.bench.timing import Stopwatch
from allears.core.device import resolve_device
from allears.ops.attention.linear.call import linear_attention
from allears.turbo.graphs import Replayed

TAPS = 5
GRAPH = "allears-graph"
BOUND = 0.015
"""Relative L2 error against the reference in float32, above which there is no speed."""
_ROTATE_BYTES, _MAX_SETS = 2**28, 4
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**24}
_FROM = 2**15  # a fit over long inputs begins here: below, time is that of launches


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output (1, L, H, D) in bfloat16; scale (H, D), weight (D, K), bias (D,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def bytes_moved(self) -> int:
        """What must move at least: q, k and v read once, the output written once."""
        return 4 * self.q.numel() * self.q.element_size()


def make_inputs(length: int, heads: int, size: int, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    q, k, v, grad = (normal(1, length, heads, size).to(torch.bfloat16) for _ in range(4))
    return Inputs(q, k, v, grad, normal(heads, size).sigmoid() + 0.3, normal(size, TAPS) / TAPS, normal(size))


def attend(system: str, inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The output of a system (1, L, H, D)."""
    if system == "softmax":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    kernel = "reference" if system == "allears-reference" else "triton"
    return linear_attention(
        q, k, v, scale=inputs.scale, conv_weight=inputs.weight, conv_bias=inputs.bias, kernel=kernel
    )


def measure(settings: Settings, on_case: Callable[[str], None] = lambda name: None) -> Report:
    """Check and time the systems at every length; see :class:`Settings`.

    Args:
        on_case: told the name of each case before it runs.
    """
    device = resolve_device(settings.device)
    report = Report()
    report.note(
        f"inputs: normal bfloat16, seed {settings.seed}, on {device}; focused map with a scale, both directions, "
        f"depthwise convolution of V with {TAPS} taps; softmax: torch's scaled_dot_product_attention alone"
    )
    stopwatch = Stopwatch(device, 0.02 if settings.quick else 0.15)
    bandwidth = copy_bandwidth(device, stopwatch)
    report.rows.append(results.row("copy", "torch", "gb_per_s", bandwidth / 1e9))
    report.note(
        f"copy bandwidth: {bandwidth / 1e9:.0f} GB/s, bytes read and written, of a copy of {_COPY_BYTES[device.type]} "
        "bytes; bandwidth_frac is the bytes of q, k, v and the output, each once, over the time and this"
    )
    if GRAPH in settings.systems and device.type != "cuda":
        report.note(f"{GRAPH}: not available: CUDA graphs need a CUDA GPU; this is {device}")
        settings = replace(settings, systems=tuple(name for name in settings.systems if name != GRAPH))
    for heads, size in SHAPES:
        for length in settings.tokens:
            case = case_name(length, heads, size)
            on_case(case)
            try:
                _run(case, make_sets(length, heads, size, device, settings), settings, stopwatch, bandwidth, report)
            except torch.OutOfMemoryError as error:
                report.note(f"{case}: left out: the inputs do not fit: {str(error).splitlines()[0]}")
    report.notes += growth(report.rows)
    return report


def case_name(length: int, heads: int, size: int) -> str:
    """The number of tokens; with H and D for all but the first shape."""
    return str(length) if (heads, size) == SHAPES[0] else f"{length} {heads}x{size}"


def make_sets(length: int, heads: int, size: int, device: torch.device, settings: Settings) -> list[Inputs]:
    """One set of inputs if long, several if short; the timed calls rotate among them."""
    first = make_inputs(length, heads, size, device, settings.seed)
    count = min(_MAX_SETS, max(1, _ROTATE_BYTES // first.bytes_moved))
    return [first, *(make_inputs(length, heads, size, device, settings.seed + i) for i in range(1, count))]


def copy_bandwidth(device: torch.device, stopwatch: Stopwatch) -> float:
    """Bytes read and written a second by a copy of one tensor to another."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = stopwatch.time([lambda index: target.copy_(source)])[0]
    return 2 * source.numel() / (timing.ms / 1e3)


def _run(
    case: str, sets: list[Inputs], settings: Settings, stopwatch: Stopwatch, bandwidth: float, report: Report
) -> None:
    length, device = sets[0].q.shape[1], sets[0].q.device
    right: list[tuple[str, str, Callable[[int], object]]] = []
    for system in settings.systems:
        if system == "softmax" and length > settings.dense_up_to:
            continue
        try:
            calls = _calls(system, sets, settings.backward)
            if system in ("allears", GRAPH):
                error = _error(calls["ms"], sets[0])
                report.rows.append(results.row(case, system, "rel_err", error))
                if not error <= BOUND:
                    report.note(f"{case}: {system}: no speed: its error {error:.3g} is above {BOUND}")
                    continue
            for metric, call in calls.items():
                peak = None if system == GRAPH else peak_bytes(call, device)
                if peak is not None:
                    name = "peak_gb" if metric == "ms" else "fwd_bwd_peak_gb"
                    report.rows.append(results.row(case, system, name, peak / 1e9))
                right.append((system, metric, call))
        except (ValueError, RuntimeError) as error:  # also out of memory; the other systems go on
            report.note(f"{case}: {system}: no speed: {type(error).__name__}: {str(error).splitlines()[0]}")
    timings = stopwatch.time([call for *_, call in right])
    for (system, metric, _), timing in zip(right, timings, strict=True):
        report.rows.append(results.row(case, system, metric, timing.ms, timing.low_ms, timing.high_ms, timing.n))
        if metric == "ms" and system != "softmax":
            share = sets[0].bytes_moved / (timing.ms / 1e3) / bandwidth
            report.rows.append(results.row(case, system, "bandwidth_frac", share))


def _error(forward: Callable[[int], Tensor], inputs: Inputs) -> float:
    """Of the output of ``forward(0)``, against the reference's."""
    with torch.no_grad():
        wanted = attend("allears-reference", inputs, inputs.q, inputs.k, inputs.v).float()
        return float((forward(0).float() - wanted).norm() / wanted.norm())


def _replays(sets: list[Inputs]) -> Callable[[int], Tensor]:
    """The kernel's forward as a graph of each set of inputs."""
    graphs = [Replayed(partial(attend, GRAPH, inputs), inputs.q, inputs.k, inputs.v) for inputs in sets]

    def forward(index: int) -> Tensor:
        graph = graphs[index % len(graphs)]
        return graph(*graph.inputs)

    return forward


def _calls(system: str, sets: list[Inputs], backward: bool) -> dict[str, Callable[[int], Tensor]]:
    if system == GRAPH:
        return {"ms": _replays(sets)}

    def forward(index: int) -> Tensor:
        inputs = sets[index % len(sets)]
        with torch.no_grad():
            return attend(system, inputs, inputs.q, inputs.k, inputs.v)

    def both(index: int) -> Tensor:
        inputs = sets[index % len(sets)]
        leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        return torch.autograd.grad(attend(system, inputs, *leaves), leaves, inputs.grad)[0]

    return {"ms": forward, "fwd_bwd_ms": both} if backward else {"ms": forward}


def growth(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on the exponents of time and memory over length, by least squares of their logarithms."""
    said = {key: power_law(points, _FROM, "tokens") for key, points in series(rows).items()}
    return [
        f"{system}, heads and size {shape}, {metric}: {text}" for (system, shape, metric), text in said.items() if text
    ]


def series(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], dict[float, float]]:
    """(system, shape, metric) -> length -> value, of times and memory."""
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in rows:
        length, _, shape = row["case"].partition(" ")
        if length.isdigit() and row["value"] and row["metric"] in ("ms", "fwd_bwd_ms", "peak_gb", "fwd_bwd_peak_gb"):
            shape = shape or "x".join(map(str, SHAPES[0]))
            found.setdefault((row["system"], shape, row["metric"]), {})[int(length)] = row["value"]
    return found
