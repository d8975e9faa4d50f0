"""The figure: time and memory over the length of the input, a line of panels for each size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.growth_figure import draw_growth
from allears.bench.separate.run import series

_PUBLISHED = {"color": "#2166ac", "marker": "s", "linewidth": 1.3, "markersize": 4, "linestyle": "--"}
_OPTIMISED = {"color": "#1b9e77", "marker": "^", "linewidth": 1.3, "markersize": 4, "linestyle": "--"}
_STYLES = {
    "sepreformer": _PUBLISHED,
    "locoformer": _PUBLISHED,
    "sepreformer-optimised": _OPTIMISED,
    "locoformer-optimised": _OPTIMISED,
    "allears-fla": {"color": "#b2182b", "marker": "o", "linewidth": 2.2, "markersize": 5},
}
_PANELS = (("ms", "forward, ms"), ("graph_ms", "forward as a CUDA graph, ms"), ("peak_gb", "peak memory, GB"))


def draw(rows: Sequence[Mapping[str, Any]], path: Path, subtitle: str = "") -> Path:
    """Draw ``rows`` as a PNG on logarithmic axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ValueError: the rows hold no timed case.
    """
    return draw_growth(
        series(rows),
        path,
        panels=_PANELS,
        styles=_STYLES,
        xlabel="length of the input, s",
        heading="size {}",
        subtitle=subtitle,
        ticks=True,
    )
