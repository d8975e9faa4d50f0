"""Learning rate over a run: linear warm-up, then half a cosine (SGDR, Loshchilov and Hutter, 2017, eq. 5)."""

import math

WARMUP_SHARE = 0.1


def run_progress(step: int, steps: int, elapsed_s: float = 0.0, budget_s: float | None = None) -> float:
    """Share of the run that is done, 0 to 1: of its steps or of its time, whichever is further."""
    done = step / steps
    if budget_s is not None:
        done = max(done, elapsed_s / budget_s if budget_s > 0 else 1.0)
    return min(max(done, 0.0), 1.0)


def learning_rate(step: int, progress: float, peak: float, final_ratio: float, warmup_steps: int) -> float:
    """Learning rate of the step with index ``step`` (from 0) at ``progress`` (0 to 1) of the run.

    The warm-up ends after ``warmup_steps`` or a tenth of the run, whichever comes first.
    """
    warm = 1.0
    if step < warmup_steps:
        warm = min(1.0, max((step + 1) / warmup_steps, progress / WARMUP_SHARE))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * warm * (final_ratio + (1.0 - final_ratio) * cosine)
