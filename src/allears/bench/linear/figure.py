"""The figure: time and memory over length, a line of panels for each shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.linear.run import series
from allears.core.errors import require

_STYLES = {
    "allears": {"color": "#b2182b", "marker": "o", "linewidth": 2.2, "markersize": 5},
    "allears-reference": {"color": "#ef8a62", "marker": "o", "linewidth": 1.3, "markersize": 4},
    "softmax": {"color": "#2166ac", "marker": "s", "linewidth": 1.3, "markersize": 4, "linestyle": "--"},
}
_PANELS = (("ms", "forward, ms"), ("fwd_bwd_ms", "forward + backward, ms"), ("peak_gb", "forward, peak memory, GB"))


def draw(rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> Path:
    """Draw ``rows`` as a PNG on logarithmic axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: the rows hold no timed case.
    """
    require("matplotlib", "train", "drawing the figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = series(rows)
    shapes = list(dict.fromkeys(shape for _, shape, _ in found))
    panels = [panel for panel in _PANELS if any(metric == panel[0] for *_, metric in found)]
    if not panels:
        raise ValueError("rows: no case was timed, so there is nothing to draw; the notes say why")
    figure = Figure(figsize=(4.2 * len(panels), 0.9 + 3.3 * len(shapes)), layout="constrained")
    FigureCanvasAgg(figure)
    for line, shape in zip(figure.subplots(len(shapes), len(panels), squeeze=False), shapes, strict=True):
        for axis, (metric, label) in zip(line, panels, strict=True):
            drawn = {system: points for (system, of, which), points in found.items() if (of, which) == (shape, metric)}
            for system, points in drawn.items():
                axis.plot(list(points), list(points.values()), label=system, **_STYLES[system])
            axis.set(xlabel="tokens", yscale="log")
            axis.set_title(f"heads x size {shape}\n{label}", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.grid(True, alpha=0.3)
    handles = {h.get_label(): h for axis in figure.axes for h in axis.get_lines()}
    figure.legend(
        list(handles.values()), list(map(str, handles)), loc="outside upper center", ncols=len(handles), frameon=False
    )
    figure.supxlabel(subtitle, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
