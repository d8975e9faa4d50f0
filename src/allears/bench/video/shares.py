"""Where the time of a call of the network goes: attention (without its projections), linear layers, and the rest.

On a GPU the call is captured as a CUDA graph with events in it, so that the times are those of the kernels and not of
the Python between them. Events cost a little of their own, so that these calls are apart from those timed as a whole.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from allears.bench.attention.run import one_line
from allears.core.capture import capture
from allears.nn.attention_processors import WanProcessor
from allears.nn.w8a8 import W8A8Linear
from allears.ops.attention import attention

_DISPATCH = "dispatch_attention_fn"  # through which diffusers' own processor attends


class Clock:
    """Collects the times of calls by kind, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.external = False  # events that a graph records
        self._found: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """A point in the device's work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=self.external)
        event.record()
        return event

    def around(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            found = function(*args, **kwargs)
            self._found.append((kind, start, self.now()))
            return found

        return timed

    def clear(self) -> None:
        """Forget what was found."""
        self._found.clear()

    def sums_ms(self) -> dict[str, float]:
        """By kind, since the beginning."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums: dict[str, float] = {}
        for kind, start, stop in self._found:
            ms = start.elapsed_time(stop) if self.device.type == "cuda" else (stop - start) * 1e3
            sums[kind] = sums.get(kind, 0.0) + ms
        return sums


def shares_ms(model: Any, call: Callable[[], object], device: torch.device) -> tuple[dict[str, float], str]:
    """``attention_ms``, ``linear_ms`` (of the blocks) and ``other_ms`` of one call, and why they are those of an eager
    call; empty where they are those of a graph, or of a CPU."""
    clock, undo = Clock(device), []
    for part in model.blocks.modules():
        if isinstance(part, nn.Linear | W8A8Linear):
            part.forward = clock.around("linear", part.forward)  # type: ignore[method-assign]
            undo.append(lambda part=part: part.__dict__.pop("forward"))
        processor = getattr(part, "processor", None)
        if isinstance(processor, WanProcessor):
            before = processor.attend
            processor.attend = clock.around("attention", _ours if before is None else before)
            undo.append(lambda processor=processor, before=before: setattr(processor, "attend", before))
    home: Any = sys.modules.get(type(model).__module__)
    if hasattr(home, _DISPATCH):
        original = getattr(home, _DISPATCH)
        setattr(home, _DISPATCH, clock.around("attention", original))
        undo.append(lambda: setattr(home, _DISPATCH, original))
    why = ""
    try:
        try:
            _run(clock, call, device)
        except Exception as error:  # a call that cannot be captured has shares all the same
            why = f"{type(error).__name__}: {one_line(error)}"
            clock.clear()
            clock.external = False
            clock.around("all", call)()
        sums = clock.sums_ms()
    finally:
        for step in reversed(undo):
            step()
    attention_ms, linear_ms = sums.get("attention", 0.0), sums.get("linear", 0.0)
    other_ms = sums["all"] - attention_ms - linear_ms
    return {"attention_ms": attention_ms, "linear_ms": linear_ms, "other_ms": other_ms}, why


def _run(clock: Clock, call: Callable[[], object], device: torch.device) -> None:
    """The call once, with the clock around it; on a GPU as a graph."""
    timed = clock.around("all", call)
    if device.type != "cuda":
        timed()
        return
    clock.external = True
    graph, _ = capture(timed, device)
    graph.replay()
    torch.cuda.synchronize(device)


def _ours(layer: Any, q: Any, k: Any, v: Any, spec: Any, mask: Any) -> Any:
    return attention(q, k, v, spec, mask)
