"""The gate before any speed: a system must be right first. Shapes as in ``reference``."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allears.bench.attention.cases import Mode
from allears.bench.attention.inputs import Inputs
from allears.bench.attention.reference import GradientSample, OutputSample
from allears.bench.attention.systems import Attend, System


@dataclass(frozen=True)
class Verdict:
    """What a system's answer was worth.

    Args:
        errors: relative L2 errors by metric.
        failure: why it gets no speed; empty if it is right.
        spoils: it changed its inputs in place.
    """

    errors: dict[str, float]
    failure: str
    spoils: bool


def check(
    system: System[Any],
    attend: Attend,
    inputs: Inputs,
    causal: bool,
    mode: Mode,
    out: OutputSample,
    grads: GradientSample | None,
) -> Verdict:
    """Run a system once on copies of the inputs, in memory full of NaN, and compare with float32.

    Args:
        mode: ``"fwd"`` runs without gradients; the others need ``grads``.
    """
    backward = mode != "fwd"
    q, k, v = inputs.copies(requires_grad=backward)
    poison_free_memory(inputs.q, inputs.q, inputs.k, inputs.v)
    gradients: tuple[Tensor, ...] = ()
    with torch.set_grad_enabled(backward):
        answer = attend(q, k, v, causal)
    if answer.shape != inputs.q.shape:
        return Verdict({}, f"output of shape {tuple(answer.shape)} for queries of shape {tuple(inputs.q.shape)}", False)
    if backward:
        if not answer.requires_grad:
            return Verdict({}, "its output carries no gradient, though gradients were asked for", False)
        gradients = torch.autograd.grad(answer, (q, k, v), inputs.grad)
    spoils = not inputs.equal(q.detach(), k.detach(), v.detach())
    named = {"output": answer.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=False))}
    wrong = [name for name, tensor in named.items() if not bool(tensor.isfinite().all())]
    if wrong:
        return Verdict({}, f"NaN, infinity or unwritten memory in {', '.join(wrong)}", spoils)
    errors = {"rel_err": out.rel_err(answer.detach())}
    if backward and grads is not None:
        errors.update(grads.rel_errs(*gradients))
    return Verdict(errors, _above(errors, system.bounds), spoils)


def poison_free_memory(*like: Tensor) -> None:
    """Leave NaN in the memory that the next buffers of these sizes come from, so that what stays unwritten shows."""
    made = [torch.full_like(tensor, math.nan) for tensor in like]
    made += [torch.full_like(tensor, math.nan, dtype=torch.float32) for tensor in like]
    del made


def _above(errors: dict[str, float], bounds: tuple[float, float | None]) -> str:
    for metric, error in errors.items():
        bound = bounds[0] if metric == "rel_err" else bounds[1]
        if bound is not None and not error <= bound:
            return f"{metric} {error:.3g} is above its bound {bound:g}"
    return ""


def timed_call(attend: Attend, sets: list[Inputs], causal: bool, mode: Mode) -> Callable[[int], object]:
    """A call to time: forward without gradients, backward on graphs made before, or both."""
    if mode == "fwd":

        def forward(index: int) -> object:
            inputs = sets[index % len(sets)]
            with torch.no_grad():
                return attend(inputs.q, inputs.k, inputs.v, causal)

        return forward

    leaves = [tuple(x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)) for inputs in sets]
    if mode == "bwd":
        outputs = [attend(q, k, v, causal) for q, k, v in leaves]

        def backward(index: int) -> object:
            at = index % len(sets)
            return torch.autograd.grad(outputs[at], leaves[at], sets[at].grad, retain_graph=True)

        return backward

    def both(index: int) -> object:
        at = index % len(sets)
        q, k, v = leaves[at]
        return torch.autograd.grad(attend(q, k, v, causal), leaves[at], sets[at].grad)

    return both


def peak_bytes(call: Callable[[int], object], device: torch.device) -> int | None:
    """Most memory that a call takes above what is held before it; ``None`` on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
