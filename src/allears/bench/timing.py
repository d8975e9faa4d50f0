"""Timing of calls on a GPU (CUDA events) or on the CPU (wall clock): warm, in turns, the second-level cache flushed."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from allears.core.capture import capture

Call = Callable[[int], object]
"""A call to time; its argument counts up, so that a call can rotate among several sets of inputs."""

_FLUSH_BYTES = 2**28  # well above the second-level cache of any GPU on sale
_ROUNDS = 2
_MIN_CALLS, _MAX_CALLS = 4, 100  # a round


class Timing(NamedTuple):
    """Median of ``n`` calls in milliseconds, and its 95 % interval."""

    ms: float
    low_ms: float
    high_ms: float
    n: int


class Stopwatch:
    """Times calls on one device.

    Args:
        device: where the calls run.
        round_s: about how long one system is timed in each of two rounds, in seconds.
    """

    def __init__(self, device: torch.device, round_s: float = 0.15):
        self.device, self.round_s = device, round_s
        self._flush = None
        if device.type == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, calls: Sequence[Call]) -> list[Timing]:
        """Time several calls in alternating order, so that a chip that slows down as it warms slows all of them.

        Args:
            calls: each is called several times before the timed calls.

        Returns:
            A timing for each call, in order.
        """
        samples: list[list[float]] = [[] for _ in calls]
        for turn in range(_ROUNDS):
            order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
            for index in order:
                samples[index] += self._round(calls[index])
        return [summarise(values) for values in samples]

    def _round(self, call: Call) -> list[float]:
        estimate_s = self._measure(call, 2)[-1] / 1e3
        warm = min(_MAX_CALLS, int(0.2 * self.round_s / max(estimate_s, 1e-6)))
        self._measure(call, warm)
        count = min(_MAX_CALLS, max(_MIN_CALLS, int(self.round_s / max(estimate_s, 1e-6))))
        return self._measure(call, count)

    def _measure(self, call: Call, count: int) -> list[float]:
        if self._flush is None:
            return [_wall_ms(call, index) for index in range(count)]
        pairs = []
        for index in range(count):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            call(index)
            stop.record()
            pairs.append((start, stop))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) for start, stop in pairs]


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call as a CUDA graph, replayed: the time of its kernels, not that of the Python that launches them.

    What it compiles at first use must have run. On a CPU it is the call itself.
    """
    if device.type != "cuda":
        return call
    graph, held = capture(call, device, warm_calls=1)

    def replay() -> object:
        graph.replay()
        return held

    return replay


def summarise(samples_ms: Sequence[float]) -> Timing:
    """Median, and its 95 % interval by order statistics (binomial ranks, normal approximation)."""
    ordered = sorted(samples_ms)
    n = len(ordered)
    reach = 0.98 * math.sqrt(n)
    low, high = math.floor(n / 2 - reach), math.ceil(n / 2 + reach)
    return Timing(statistics.median(ordered), ordered[max(low, 0)], ordered[min(high, n - 1)], n)


def _wall_ms(call: Call, index: int) -> float:
    start = time.perf_counter()
    call(index)
    return (time.perf_counter() - start) * 1e3
