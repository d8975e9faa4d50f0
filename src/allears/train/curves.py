"""A picture of a run's log."""

import logging
import math
from pathlib import Path
from typing import Any

from allears.core.errors import MissingDependencyError, require
from allears.train.logs import read_log

log = logging.getLogger(__name__)

_SKIPPED = {"kind", "step", "elapsed_s"}
_MAX_POINTS = 2000


def curve_series(rows: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """``kind/name`` -> (steps, values) for each value in the rows; a null becomes NaN, which a curve leaves open."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in _SKIPPED:
                steps, values = series.setdefault(f"{row['kind']}/{name}", ([], []))
                steps.append(row["step"])
                values.append(math.nan if value is None else value)
    return series


def draw_curves(out: Path) -> Path | None:
    """Draw ``log.jsonl`` of ``out`` as ``curves.png``, a panel a value. ``None``, and a warning, without matplotlib."""
    try:
        require("matplotlib", "train", "drawing the curves of a run")
    except MissingDependencyError as error:
        log.warning("%s", error)
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = curve_series(read_log(out / "log.jsonl"))
    columns = min(3, max(1, len(series)))
    lines = max(1, math.ceil(len(series) / columns))
    figure = Figure(figsize=(4.2 * columns, 2.6 * lines))
    FigureCanvasAgg(figure)
    for place, (name, (steps, values)) in enumerate(series.items()):
        panel = figure.add_subplot(lines, columns, place + 1)
        stride = max(1, len(steps) // _MAX_POINTS)
        panel.plot(steps[::stride], values[::stride], marker="." if len(steps) < 30 else None, linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=7)
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) > 10 and min(finite) > 0 and max(finite) > 30 * min(finite):
            panel.set_yscale("log")
    figure.subplots_adjust(0.05, 0.08, 0.98, 0.92, wspace=0.22, hspace=0.4)
    path, part = out / "curves.png", out / ".curves.png.part"
    figure.savefig(part, dpi=110, format="png")
    part.replace(path)
    return path
