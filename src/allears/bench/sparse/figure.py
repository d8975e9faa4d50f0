"""The figure: milliseconds over sparsity, a panel a direction and shape; dense kernels are level lines."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.attention.figure import line_styles
from allears.bench.sparse.cases import parse
from allears.core.errors import require

_TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
Points = dict[str, dict[float, float]]  # system -> sparsity -> ms


def draw(rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> Path:
    """Draw the timed cases of ``rows`` as a PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: the rows hold no timed case.
    """
    require("matplotlib", "train", "drawing the figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shown = panels(rows)
    figure = Figure(figsize=(1.5 + 4.2 * len(shown), 5), layout="constrained")
    FigureCanvasAgg(figure)
    style = line_styles(list(dict.fromkeys(name for points in shown.values() for name in points)))
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (title, points) in zip(axes, shown.items(), strict=True):
        for name, values in points.items():
            axis.plot([100 * x for x in values], list(values.values()), label=name, **style[name])
        axis.set(title=title, xlabel="sparsity (% of key blocks not read exactly)", ylabel="ms", yscale="log")
        axis.set_xticks([100 * x for x in sorted({x for values in points.values() for x in values})])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, which="both", alpha=0.3)
    handles = {h.get_label(): h for axis in axes for h in axis.get_lines()}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.suptitle("Sparse attention: whole modules beside dense kernels", fontsize=12)
    figure.supxlabel(subtitle, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """Title -> system -> sparsity -> ms, sparsities rising; of shapes with several sparsities, or of all if none has.

    Raises:
        ValueError: no case was timed.
    """
    found: dict[str, Points] = defaultdict(lambda: defaultdict(dict))
    timed = [(parse(row["case"]), row) for row in rows if row["metric"] == "ms" and row["value"] is not None]
    for case, row in sorted(timed, key=lambda pair: pair[0].sparsity):
        found[case.dense_name][row["system"]][case.sparsity] = row["value"]
    if not found:
        raise ValueError("rows: no case was timed, so there is nothing to draw; the notes say why")
    names = [name for name in dict.fromkeys(parse(row["case"]).dense_name for row in rows) if name in found]
    lines = [name for name in names if max(map(len, found[name].values())) > 1]
    return {_title(name): found[name] for name in lines or names}


def _title(dense_name: str) -> str:
    mode, _, shape = dense_name.partition(" ")
    return f"{_TITLES[mode]}, {shape}"
