"""The figure: TFLOP/s over length, and beside it the error: of the output, or of dQ, the gradient with the largest."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.attention.cases import MODES, Case, parse
from allears.core.errors import require

_OURS = ("#b2182b", "#ef8a62", "#762a83", "#4d4d4d", "#e7298a", "#fdb863", "#8c510a")
_PEERS = ("#2166ac", "#1b9e77", "#67a9cf", "#a6761d", "#7570b3")
_TITLES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "forward + backward"}
_ERRORS = {"fwd": ("rel_err", "output"), "bwd": ("rel_err_dq", "dQ"), "fwd+bwd": ("rel_err_dq", "dQ")}
_DRAWN = {"tflops", *(metric for metric, _ in _ERRORS.values())}
Points = dict[str, dict[int, float]]  # system -> length -> value


def draw(rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> Path:
    """Draw the longest series of lengths in ``rows`` (equal tokens, heads and head size) as a PNG, a line a direction.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: the rows hold no timed case.
    """
    require("matplotlib", "train", "drawing the figure")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series, about = longest_series(rows)
    modes = _modes(series)
    figure = Figure(figsize=(11, 0.9 + 3.5 * len(modes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(modes), 2, squeeze=False)
    names = list(dict.fromkeys(name for key, points in series.items() if key[0] in modes for name in points))
    style = line_styles(names)
    for line, mode in zip(axes, modes, strict=True):
        error, tensor = _ERRORS[mode]
        for axis, metric, label in zip(
            line, ("tflops", error), ("TFLOP/s", f"relative L2 error of {tensor}"), strict=True
        ):
            for name, points in series.get((mode, metric), {}).items():
                axis.plot(list(points), list(points.values()), label=name, **style[name])
            axis.set(title=f"{_TITLES[mode]}: {label}", xlabel="length (tokens)")
            _length_ticks(axis, sorted({x for points in series.get((mode, metric), {}).values() for x in points}))
            axis.grid(True, alpha=0.3)
        line[0].set_ylim(bottom=0)
        line[1].set_yscale("log")
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_lines()}
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False)
    figure.suptitle(f"Attention, {about}", fontsize=12)
    figure.supxlabel(subtitle, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def longest_series(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str], Points], str]:
    """The family of shapes, equal but for length at one number of tokens, that covers most lengths.

    Returns:
        (mode, metric) -> system -> length -> value, lengths ascending, for what is drawn; and what is equal, in words.
    """
    families: dict[tuple[Any, ...], list[tuple[Case, Mapping[str, Any]]]] = defaultdict(list)
    for row in rows:
        if row["metric"] in _DRAWN and row["value"] is not None:
            case = parse(row["case"])
            s = case.shape
            families[s.batch * s.length, s.heads, s.kv_heads, s.head_dim, s.causal].append((case, row))
    timed = {
        family: {case.shape.length for case, row in found if row["metric"] == "tflops"}
        for family, found in families.items()
    }
    if not any(timed.values()):
        raise ValueError("rows: no case was timed, so there is nothing to draw; the notes say why")
    best = max(timed, key=lambda family: len(timed[family]))
    series: dict[tuple[str, str], Points] = defaultdict(lambda: defaultdict(dict))
    for case, row in sorted(families[best], key=lambda pair: pair[0].shape.length):
        if case.shape.length in timed[best]:
            series[case.mode, row["metric"]][row["system"]][case.shape.length] = row["value"]
    tokens, heads, kv_heads, head_dim, causal = best
    shared = "" if heads == kv_heads else f" on {kv_heads} key heads"
    return series, f"{tokens} tokens, {heads} heads{shared} of size {head_dim}{', causal' if causal else ''}"


def _modes(series: Mapping[tuple[str, str], Points]) -> list[str]:
    """The directions drawn: those measured at several lengths, or all where none was."""
    lengths = {mode: {x for points in series.get((mode, "tflops"), {}).values() for x in points} for mode in MODES}
    return [mode for mode in MODES if len(lengths[mode]) > 1] or [mode for mode in MODES if lengths[mode]]


def line_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    ours = [name for name in names if name.startswith("allears")]
    peers = [name for name in names if name not in ours]
    styles: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(ours):
        styles[name] = {"color": _OURS[index % len(_OURS)], "marker": "o", "linewidth": 2.2, "markersize": 5}
    for index, name in enumerate(peers):
        color = _PEERS[index % len(_PEERS)]
        styles[name] = {"color": color, "marker": "s", "linewidth": 1.3, "markersize": 4, "linestyle": "--"}
    return styles


def _length_ticks(axis: Any, lengths: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n) for n in lengths])
