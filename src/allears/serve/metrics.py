"""Counters and times of the server, in the text format that Prometheus reads."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

_PREFIX = "allears_"
_QUANTILES = (0.5, 0.9, 0.99)


class Times:
    """The newest durations of a kind, for quantiles; and the sum and number of all.

    Args:
        kept: how many.
    """

    def __init__(self, kept: int = 8192) -> None:
        self._ring = np.zeros(kept, np.float32)
        self.count, self.total = 0, 0.0

    def add(self, value: float) -> None:
        self._ring[self.count % len(self._ring)] = value
        self.count += 1
        self.total += value

    def quantiles(self, shares: Iterable[float] = _QUANTILES) -> list[float]:
        """Of the durations kept; NaN where there are none."""
        known = self._ring[: min(self.count, len(self._ring))]
        return [float(np.quantile(known, share)) if known.size else float("nan") for share in shares]


class Metrics:
    """All that is counted. Used on the event loop alone."""

    def __init__(self) -> None:
        self.hop_ms, self.frame_ms = Times(), Times()
        self.sessions, self.refused, self.closed, self.faults = Counter(), Counter(), Counter(), Counter()
        self.audio_s = 0.0
        self.errors = 0

    def text(self, running: int, most: int, engine: str) -> str:
        """Everything, as text; ``running`` of at most ``most`` sessions."""
        lines: list[str] = []

        def tell(name: str, kind: str, about: str, values: dict[str, float]) -> None:
            lines.append(f"# HELP {_PREFIX}{name} {about}")
            lines.append(f"# TYPE {_PREFIX}{name} {kind}")
            lines.extend(f"{_PREFIX}{name}{label} {_number(value)}" for label, value in values.items())

        tell("info", "gauge", "What computes.", {f'{{engine="{engine}"}}': 1})
        tell("sessions", "gauge", "Sessions now.", {"": running})
        tell("sessions_most", "gauge", "Sessions that are taken at once.", {"": most})
        tell("sessions_total", "counter", "Sessions begun.", _labelled("stream", self.sessions))
        tell("refused_total", "counter", "Sessions refused, by close code.", _labelled("code", self.refused))
        tell("closed_total", "counter", "Sessions ended, by close code.", _labelled("code", self.closed))
        tell("frame_faults_total", "counter", "Frames that were not as they should be.", _labelled("kind", self.faults))
        tell("errors_total", "counter", "Faults of the server.", {"": self.errors})
        tell("audio_seconds_total", "counter", "Sound that was worked on.", {"": self.audio_s})
        for name, times, about in (
            ("hop_ms", self.hop_ms, "Time to work on 10 ms of a session, waiting for a core included."),
            ("frame_ms", self.frame_ms, "Time from a frame's arrival to its reply."),
        ):
            spread = zip(_QUANTILES, times.quantiles(), strict=True)
            tell(name, "summary", about, {f'{{quantile="{share}"}}': value for share, value in spread})
            lines.append(f"{_PREFIX}{name}_sum {_number(times.total)}")
            lines.append(f"{_PREFIX}{name}_count {times.count}")
        return "\n".join(lines) + "\n"


def _labelled(label: str, counted: Counter) -> dict[str, float]:
    return {f'{{{label}="{key}"}}': n for key, n in sorted(counted.items())}


def _number(value: float) -> str:
    return "NaN" if value != value else f"{value:.6g}" if value < 1e6 else f"{value:.0f}"
