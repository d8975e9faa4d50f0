"""A figure of costs over length on logarithmic axes: a line of panels for each group, a curve for each system."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.core.errors import require

Series = Mapping[tuple[str, str, str], Mapping[float, float]]
"""(system, group, metric) -> length -> value."""


def draw_growth(
    found: Series,
    path: Path,
    *,
    panels: Sequence[tuple[str, str]],
    styles: Mapping[str, Mapping[str, Any]],
    xlabel: str,
    heading: str,
    subtitle: str = "",
    ticks: bool = False,
) -> Path:
    """Draw ``found`` as a PNG.

    Args:
        panels: the metrics drawn, each with its words; those without a value are left out.
        styles: of each system's curve.
        heading: of each panel, with ``{}`` for the group.
        ticks: mark the lengths that were measured, and not powers of two.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    require("matplotlib", "train", "drawing the figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(group for _, group, _ in found))
    panels = [panel for panel in panels if any(metric == panel[0] for *_, metric in found)]
    if not panels:
        raise ValueError("rows: no case was timed, so there is nothing to draw; the notes say why")
    figure = Figure(figsize=(max(6.0, 4.2 * len(panels)), 0.9 + 3.3 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, group in zip(figure.subplots(len(groups), len(panels), squeeze=False), groups, strict=True):
        for axis, (metric, label) in zip(line, panels, strict=True):
            drawn = {system: points for (system, of, which), points in found.items() if (of, which) == (group, metric)}
            for system, points in drawn.items():
                axis.plot(list(points), list(points.values()), label=system, **styles[system])
            axis.set(xlabel=xlabel, yscale="log")
            axis.set_title(f"{heading.format(group)}\n{label}", fontsize=10)
            axis.set_xscale("log", base=2)
            if ticks:
                lengths = sorted({x for points in drawn.values() for x in points})
                axis.set_xticks(lengths, [f"{x:g}" for x in lengths], fontsize=8)
            axis.grid(True, alpha=0.3)
    handles = {h.get_label(): h for axis in figure.axes for h in axis.get_lines()}
    figure.legend(
        list(handles.values()), list(map(str, handles)), loc="outside upper center", ncols=len(handles), frameon=False
    )
    figure.supxlabel(subtitle, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
