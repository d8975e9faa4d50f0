"""A picture of what a router picks, beside where the attention mass is."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def save_maps(path: Path, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Of each layer the mass (H, N_q, N_k) and the picked blocks, as ``LAYER/mass`` and ``LAYER/map`` of an npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, (mass, picked) in found.items():
        arrays |= {f"{name}/mass": mass.astype(np.float16), f"{name}/map": picked.astype(bool)}
    np.savez_compressed(path, allow_pickle=False, **arrays)


def choose(arrays: dict[str, np.ndarray], count: int) -> list[tuple[str, int]]:
    """``count`` (layer, head), from layers spread evenly, of each the head whose mass is the least uniform."""
    names = [name.removesuffix("/mass") for name in arrays if name.endswith("/mass")]
    chosen = []
    for index in range(min(count, len(names))):
        name = names[index * len(names) // min(count, len(names))]
        mass = arrays[f"{name}/mass"].astype(np.float32)
        entropy = -(mass * np.log(np.maximum(mass, 1e-12))).sum(-1).mean(-1)
        chosen.append((name, int(entropy.argmin())))
    return chosen


def draw(source: Path, path: Path, count: int = 4) -> list[str]:
    """Draw ``count`` heads of what :func:`save_maps` wrote, as a PNG; what each shows, in words.

    The colour is the logarithm of the mass relative to an even share; both pictures have the same scale.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with np.load(source, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    chosen = choose(arrays, count)
    figure = Figure(figsize=(3.6 * len(chosen), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(chosen), squeeze=False)
    said, image = [], None
    for column, (name, head) in enumerate(chosen):
        mass, picked = arrays[f"{name}/mass"][head].astype(np.float32), arrays[f"{name}/map"][head]
        share = float((mass * picked).sum(-1).mean())
        relative = np.log10(np.maximum(mass * mass.shape[1], 1e-3))
        more = {"aspect": "auto", "interpolation": "nearest"}
        image = panels[0, column].imshow(relative, cmap="magma", vmin=-1, vmax=1.3, **more)
        panels[1, column].imshow(picked, cmap="Greys", vmin=0, vmax=1, **more)
        panels[0, column].set_title(f"{name}, head {head}\nattention mass", fontsize=8)
        panels[1, column].set_title(f"picked: {picked.mean():.1%} of blocks, {share:.0%} of mass", fontsize=8)
        said.append(f"{name} head {head}: {picked.mean():.1%} of blocks hold {share:.1%} of the mass")
        for panel in panels[:, column]:
            panel.tick_params(labelsize=6)
            panel.set_xlabel("key block", fontsize=7)
            panel.set_ylabel("query block", fontsize=7)
    if image is not None:
        bar = figure.colorbar(image, ax=panels[0, :].tolist(), shrink=0.8)
        bar.set_label("log10 of mass over an even share", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    return said
