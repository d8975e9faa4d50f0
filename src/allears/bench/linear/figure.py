"""The figure: time and memory over length, a line of panels for each shape."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from allears.bench.growth_figure import draw_growth
from allears.bench.linear.run import series

_STYLES = {
    "allears": {"color": "#b2182b", "marker": "o", "linewidth": 2.2, "markersize": 5},
    "allears-graph": {"color": "#762a83", "marker": "o", "linewidth": 1.3, "markersize": 4},
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
    heading = "heads x size {}"
    return draw_growth(
        series(rows), path, panels=_PANELS, styles=_STYLES, xlabel="tokens", heading=heading, subtitle=subtitle
    )
