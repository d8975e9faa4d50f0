"""This library's own enhancer."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.registry import Enhance, NotInstalledError, system


@system("enhance", about="allears.models.enhance")
def allears(**options: Any) -> Enhance:
    """``options`` go to ``Enhancer.from_pretrained`` (``name_or_folder``) and to the call (``steps`` and the like)."""
    from allears.core.errors import WeightsError

    try:
        from allears.models.enhance import Enhancer

        name = options.pop("name_or_folder", None)
        enhancer = Enhancer.from_pretrained(name) if name else Enhancer.from_pretrained()
    except (ImportError, WeightsError) as error:
        raise NotInstalledError(str(error)) from error

    def enhance(audio: np.ndarray) -> np.ndarray:
        return np.asarray(enhancer(audio[None], sample_rate_hz=16_000, **options))[0]

    def process_file(source: Path, folder: Path) -> None:
        enhancer.process_file(source, folder / "out.wav", **options)

    enhance.enhancer = enhancer  # type: ignore[attr-defined]  # the ablation names its size
    enhance.process_file = process_file  # type: ignore[attr-defined]  # the speed case measures it
    return enhance
