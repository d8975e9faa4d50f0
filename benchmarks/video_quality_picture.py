"""Frames of the same prompts and noise side by side, one row a setting.

Shapes: N prompts, F frames shown, T frames, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from allears.data.world import WorldSpec
from allears.data.world_text import caption

_SHOWN = 4


def save_frames(path: Path, found: dict[str, Tensor], specs: list[WorldSpec]) -> None:
    """Of each setting some frames of its videos (N, 3, T, H, W) in [0, 1], as uint8 (N, F, H, W, 3), with the captions.

    Args:
        path: an npz, whose folder is made.
        found: by the setting's name, in order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for index, (name, videos) in enumerate(found.items()):
        at = np.linspace(0, videos.shape[2] - 1, _SHOWN).round().astype(int)
        frames = (videos[:, :, at] * 255).round().byte().permute(0, 2, 3, 4, 1).numpy()
        arrays[f"{index:02d}/{name}"] = frames
    texts = np.array([caption(spec) for spec in specs])
    np.savez_compressed(path, allow_pickle=False, captions=texts, **arrays)


def sheet(frames: np.ndarray) -> np.ndarray:
    """uint8 (N, F, H, W, 3) as one picture (H, N F W and gaps, 3)."""
    gap = np.full((frames.shape[2], 3, 3), 255, np.uint8)
    parts: list[np.ndarray] = []
    for video in frames:
        parts += [np.concatenate(list(video), axis=1), gap]
    return np.concatenate(parts[:-1], axis=1)


def draw(source: Path, path: Path) -> None:
    """Draw what :func:`save_frames` wrote, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with np.load(source, allow_pickle=False) as file:
        names = sorted(name for name in file.files if name != "captions")
        rows = {name.split("/", 1)[1]: sheet(file[name]) for name in names}
        texts = [str(text) for text in file["captions"]]
    figure = Figure(figsize=(3.4 * len(texts), 0.95 * len(rows) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for panel, (name, picture) in zip(panels, rows.items(), strict=True):
        panel.imshow(picture, interpolation="nearest")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(name.replace(", ", "\n"), fontsize=6, rotation=0, ha="right", va="center")
        for side in panel.spines.values():
            side.set_visible(False)
    width = rows[next(iter(rows))].shape[1] if rows else 1
    for index, text in enumerate(texts):
        panels[0].text((index + 0.5) * width / len(texts), -4, text, fontsize=6, ha="center", va="bottom")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
