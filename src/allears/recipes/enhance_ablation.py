"""Short trainings of the enhancer that differ in one thing each, on the same data with the same draws."""

import logging
from pathlib import Path
from typing import Any

from allears.core.device import resolve_device
from allears.recipes.enhance import train_enhance
from allears.recipes.enhance_data import load_data
from allears.train import TrainResult

log = logging.getLogger(__name__)

ARMS: dict[str, dict[str, Any]] = {
    "base-noisy": {"preset": "base", "prior": "noisy"},
    "base-gaussian": {"preset": "base", "prior": "gaussian"},
    "tiny-noisy": {"preset": "tiny", "prior": "noisy"},
}
"""What each arm sets; all else is alike."""


def train_arms(
    corpus: list[str],
    out: str,
    steps: int = 650,
    device: str = "auto",
    seed: int = 0,
    rirs: int = 2000,
    rooms_folder: str | None = None,
    validation_clips: int = 64,
    arms: tuple[str, ...] = tuple(ARMS),
    **settings: Any,
) -> dict[str, TrainResult]:
    """Train each arm from scratch for ``steps`` and leave ``out/ARM/export.safetensors``; the data is read once.

    A run that is in ``out`` is resumed: an arm that is complete takes no time.

    Args:
        settings: further arguments of :func:`train_enhance`, the same for all arms.

    Raises:
        ValueError: an arm is unknown.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"arms: {unknown[0]!r} is unknown; known are {', '.join(ARMS)}")
    data = load_data(corpus, resolve_device(device), rirs, seed, validation_clips, rooms_folder)
    results = {}
    for arm in arms:
        log.info("arm %s: %d steps", arm, steps)
        folder = str(Path(out) / arm)
        results[arm] = train_enhance(
            corpus, folder, steps=steps, device=device, seed=seed, data=data, **ARMS[arm], **settings
        )
        if results[arm].stop == "signal":
            break
    return results
