"""Why a clip has no score: a metric returns NaN and says the reason here, instead of ending a long job."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

logger = logging.getLogger("allears.audio.metrics")

_collector: ContextVar[dict[str, str] | None] = ContextVar("allears_metric_reasons", default=None)


def unscored(metric: str, reason: str) -> float:
    """NaN, with the reason logged or, inside :func:`collect_reasons`, kept."""
    reasons = _collector.get()
    if reasons is None:
        logger.warning("%s: no score: %s", metric, reason)
    else:
        reasons[metric] = reason
    return float("nan")


@contextmanager
def collect_reasons() -> Iterator[dict[str, str]]:
    """Within the block, metrics that give NaN write ``{metric: reason}`` into the yielded dict instead of the log."""
    reasons: dict[str, str] = {}
    token = _collector.set(reasons)
    try:
        yield reasons
    finally:
        _collector.reset(token)
