"""The figure: seconds for a video by system, a panel a case, on a logarithmic axis."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.video.settings import SYSTEMS
from allears.core.errors import require

_OURS, _RUNG, _PEER = "#b2182b", "#f4a582", "#2166ac"
_PEERS = ("diffusers", "diffusers-compile", "sage")


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each case the seconds of each system that was timed, the slowest first."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "total_s" and row["system"] in SYSTEMS:
            found.setdefault(row["case"], {})[row["system"]] = row["value"]
    return {case: dict(sorted(values.items(), key=lambda item: -item[1])) for case, values in found.items()}


def draw(rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> Path:
    """Draw ``rows`` as a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: no case was timed.
    """
    shown = panels(rows)
    if not shown:
        raise ValueError("rows: no case was timed; nothing to draw")
    matplotlib = require("matplotlib", "train", "drawing the figure")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(shown), figsize=(6.5 * len(shown), 4.2), squeeze=False)
    for axis, (case, values) in zip(axes[0], shown.items(), strict=True):
        colours = [_PEER if n in _PEERS else _OURS if n.startswith("allears") else _RUNG for n in values]
        bars = axis.barh(list(values), list(values.values()), color=colours)
        base = values.get("diffusers")
        labels = [_seconds(s) + ("" if base is None else f"  ({base / s:.3g}x)") for s in values.values()]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(values.values()) / 2, max(values.values()) * 8)
        axis.invert_yaxis()
        axis.set_title(case, loc="left")
        axis.set_xlabel("seconds for a video, diffusion alone")
    figure.suptitle(subtitle, fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
