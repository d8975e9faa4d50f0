"""Trainings of the separator that differ in the attention alone, on the same data with the same draws."""

import gc
import logging
from pathlib import Path
from typing import Any

import torch

from allears.core.device import resolve_device
from allears.models.separate.config import PRESETS
from allears.recipes.separate import CLEAN_MIX, train_separate
from allears.recipes.separate_data import load_data
from allears.train import TrainResult

log = logging.getLogger(__name__)

ARMS: dict[str, str] = {
    "sepreformer-t": "sepreformer-t-optimised",
    "fla-sepreformer-t": "fla-sepreformer-t",
    "no-focus": "fla-sepreformer-t-no-focus",
    "no-conv": "fla-sepreformer-t-no-conv",
    "no-gate": "fla-sepreformer-t-no-gate",
}
"""Arm to preset. The baseline trains in its optimised form, which computes what the published one does."""


def train_arms(
    corpus: list[str],
    out: str,
    steps: int = 2000,
    device: str = "auto",
    seed: int = 0,
    validation_clips: int = 64,
    arms: tuple[str, ...] = tuple(ARMS),
    **settings: Any,
) -> dict[str, TrainResult]:
    """Train each arm from scratch for ``steps`` on clean mixtures of two talkers at 8 kHz, and leave
    ``out/ARM/export.safetensors``; the data is read once.

    A run that is in ``out`` is resumed: an arm that is complete takes no time.

    Args:
        settings: further arguments of :func:`train_separate`, the same for all arms.

    Raises:
        ValueError: an arm is unknown.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise ValueError(f"arms: {unknown[0]!r} is unknown; known are {', '.join(ARMS)}")
    config = PRESETS[ARMS["fla-sepreformer-t"]]
    data = load_data(
        corpus,
        resolve_device(device),
        CLEAN_MIX,
        config.sample_rate_hz,
        config.talkers,
        seed=seed,
        validation_clips=validation_clips,
    )
    results = {}
    for arm in arms:
        log.info("arm %s: %d steps", arm, steps)
        folder = str(Path(out) / arm)
        results[arm] = train_separate(
            corpus, folder, steps=steps, device=device, preset=ARMS[arm], seed=seed, data=data, **settings
        )
        gc.collect()  # the graphs of one arm hold most of a GPU
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if results[arm].stop == "signal":
            break
    return results
