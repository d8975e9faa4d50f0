"""Functions that return a complete run: the only place where models meet training and data.

A recipe takes ``(corpus, out, minutes, steps, device, preset, seed, **overrides)`` and returns a ``TrainResult``.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

_ENTRIES = {
    "echo": "allears.recipes.echo:train_echo",
    "enhance": "allears.recipes.enhance:train_enhance",
    "pretrain": "allears.recipes.pretrain:train_language",
    "rcm": "allears.recipes.rcm:distil_enhancer",
    "separate": "allears.recipes.separate:train_separate",
    "sparse-tune": "allears.recipes.sparse_tune:tune_enhancer",
    "video": "allears.recipes.video:train_video",
    "video-family": "allears.recipes.video_family:train_video_family",
    "video-rcm": "allears.recipes.video_distil:distil_video",
}


class _Recipes(dict[str, str]):
    """Recipe functions by name, imported when asked for."""

    def __getitem__(self, name: str) -> Callable[..., Any]:  # type: ignore[override]
        module, _, function = super().__getitem__(name).partition(":")
        return getattr(import_module(module), function)


RECIPES = _Recipes(_ENTRIES)
