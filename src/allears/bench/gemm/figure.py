"""The figure: how many times faster than bf16 each layer is, a group of bars for each shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.attention.figure import line_styles
from allears.core.errors import require


def draw(rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> Path:
    """Draw the speed-ups of linear layers and blocks in ``rows`` as a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: the rows hold no such case.
    """
    values = speedups(rows)
    if not values:
        raise ValueError("rows: no case was timed, so there is nothing to draw; the notes say why")
    require("matplotlib", "train", "drawing the figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    systems = list(dict.fromkeys(system for points in values.values() for system in points))
    styles = line_styles(systems)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.85 / len(systems)
    for index, system in enumerate(systems):
        places = [place + index * width for place, points in enumerate(values.values()) if system in points]
        heights = [points[system] for points in values.values() if system in points]
        axis.bar(places, heights, width, label=system, color=styles[system]["color"])
    axis.axhline(1.0, color="black", linewidth=0.8)
    ticks = [place + 0.425 - width / 2 for place in range(len(values))]
    axis.set_xticks(ticks, list(values), fontsize=8, rotation=15)
    axis.set_ylabel("times faster than cuBLAS in bf16")
    axis.set_title("Linear layers in 8 bits, with the quantisation of their inputs (M x K x N)", fontsize=11)
    axis.grid(True, axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.supxlabel(subtitle, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def speedups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Case -> system -> times faster, of linear layers and blocks."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "speedup" and row["value"] is not None and row["case"].startswith(("linear", "block")):
            found.setdefault(row["case"], {})[row["system"]] = row["value"]
    return found
