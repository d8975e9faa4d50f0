"""Trainings of the echo canceller that leave out one part each, with the same budget, on the same data."""

import logging
from pathlib import Path
from typing import Any

from allears.core.device import resolve_device
from allears.recipes.echo import train_echo
from allears.recipes.echo_data import STAGES, load_data
from allears.train import TrainResult

log = logging.getLogger(__name__)


def _without(name: str) -> dict[str, float]:
    return {stage.name: stage.share for stage in STAGES.values() if stage.name != name}


ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-progressive": {"loss": {"stages": (0.0, 1.0)}},
    "no-transfer": {"stages": _without("linear")},
    "no-alignment-loss": {"loss": {"alignment": 0.0}},
    "no-voice": {"stages": _without("voice")},
}
"""What differs from the whole recipe, as arguments of :func:`train_echo`.

``no-progressive`` is the same network, whose first stage has no target of its own. Without transfer, or without voice
activity, the other stages of the training share the time of the one that is left out.
"""


def train_echo_ablation(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    rirs: int = 1000,
    rooms_folder: str | None = None,
    arms: tuple[str, ...] = tuple(ARMS),
    **settings: Any,
) -> dict[str, TrainResult]:
    """Train the arms one after another, ``minutes`` or ``steps`` each, and leave ``out/ARM/export.safetensors``; the
    data is read once.

    A run that is in ``out`` is resumed: an arm that is complete takes no time.

    Args:
        settings: further arguments of :func:`train_echo`, the same for all arms.

    Raises:
        ValueError: an arm is unknown, or ``settings`` has what an arm sets.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"arms: {unknown[0]!r} is unknown; known are {', '.join(ARMS)}")
    if taken := sorted({name for arm in arms for name in ARMS[arm]} & set(settings)):
        raise ValueError(f"{taken[0]}: given for all arms, but one of {', '.join(arms)} sets it; leave it out")
    data = load_data(corpus, resolve_device(device), rirs, seed, rooms_folder)
    results = {}
    for arm in arms:
        log.info("arm %s", arm)
        results[arm] = train_echo(
            corpus,
            str(Path(out) / arm),
            minutes=minutes,
            steps=steps,
            device=device,
            seed=seed,
            data=data,
            **ARMS[arm],
            **settings,
        )
        if results[arm].stop == "signal":
            break
    return results
