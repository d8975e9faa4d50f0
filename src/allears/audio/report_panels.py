"""Plots of the report page that share the time axis of its tracks: curves, pictures and spans over time.

Shapes: N columns of time, H rows from the bottom up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from allears.audio.report_axes import Strip, as_uri, decimals, ticks, x_axis, y_axis
from allears.audio.spectrogram import spectrogram_png

_WIDTH, _HEIGHT = 1000.0, 100.0


@dataclass(frozen=True, eq=False)
class Curve:
    """Values at times, in seconds; NaN breaks the line. A ``faint`` one stands back behind the others."""

    name: str
    times_s: NDArray[np.floating]
    values: NDArray[np.floating]
    faint: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """Values (H, N) over the height of a panel and from 0 s to ``end_s``, dark for ``low`` to light for ``high``."""

    values: NDArray[np.floating]
    end_s: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Panel:
    """A plot over time: curves over a picture, with an axis from ``low`` to ``high`` in ``unit``; or rows of spans.

    ``note`` says below the heading what is to be seen.
    """

    name: str
    note: str = ""
    unit: str = ""
    low: float = 0.0
    high: float = 1.0
    curves: Sequence[Curve] = ()
    picture: Picture | None = None
    rows: Sequence[Strip] = ()


def show_panels(panels: Sequence[Panel], duration_s: float) -> str:
    """The panels below each other, each over 0 to ``duration_s``; what lies outside is cut off."""
    if not duration_s > 0:
        return ""
    return "\n".join(_show(panel, duration_s) for panel in panels)


def _show(panel: Panel, duration_s: float) -> str:
    seconds, step = ticks(duration_s, 5)
    times = x_axis([(at / duration_s, f"{at:.{decimals(step)}f}") for at in seconds])
    if panel.rows:
        kind, axis, inside = "rows", _names(panel.rows), _spans(panel.rows, duration_s)
    else:
        kind, axis = "curves", y_axis(_heights(panel))
        inside = (_picture(panel, duration_s) if panel.picture else "") + _curves(panel, duration_s)
        if panel.picture:
            kind = "curves dark"
    note = f'<p class="note">{escape(panel.note)}</p>' if panel.note else ""
    return f"""<section class="panel">
<h3>{escape(panel.name)}{_legend(panel.curves)}</h3>
{note}
<div class="plot {kind}">{axis}<div class="field">{inside}</div>
{times}</div>
</section>"""


def _heights(panel: Panel) -> list[tuple[float, str]]:
    """Labels at multiples of a round step; the highest carries the unit."""
    span = panel.high - panel.low
    step = ticks(span, 4)[1]
    first, last = math.ceil(panel.low / step - 1e-9), math.floor(panel.high / step + 1e-9)
    marks = [((n * step - panel.low) / span, f"{n * step:.{decimals(step)}f}") for n in range(first, last + 1)]
    return [*marks[:-1], (marks[-1][0], f"{marks[-1][1]} {escape(panel.unit)}".strip())]


def _names(rows: Sequence[Strip]) -> str:
    return y_axis([(1 - (index + 0.5) / len(rows), escape(row.name)) for index, row in enumerate(rows)])


def _spans(rows: Sequence[Strip], duration_s: float) -> str:
    """One bar of marks a row, with a gap between the rows."""
    height = _HEIGHT / len(rows)
    marks = ""
    for index, row in enumerate(rows):
        shares = [(begin / duration_s, min(1.0, end / duration_s)) for begin, end in row.spans if begin < duration_s]
        marks += f'<g aria-label="{escape(row.name)}">' + "".join(
            f'<rect x="{_WIDTH * begin:.2f}" y="{(index + 0.15) * height:.2f}" '
            f'width="{max(_WIDTH * (end - begin), 0.5):.2f}" height="{0.7 * height:.2f}"/>'
            for begin, end in shares
        )
        marks += "</g>"
    return _svg(marks)


def _curves(panel: Panel, duration_s: float) -> str:
    paths = ""
    for curve in sorted(panel.curves, key=lambda curve: not curve.faint):
        x = _WIDTH * np.asarray(curve.times_s, float) / duration_s
        share = (np.asarray(curve.values, float) - panel.low) / (panel.high - panel.low)
        y = _HEIGHT * (1 - np.clip(share, 0.0, 1.0))
        style = ' class="faint"' if curve.faint else ""
        paths += f'<path{style} aria-label="{escape(curve.name)}" d="{_line(x[x <= _WIDTH], y[x <= _WIDTH])}"/>'
    return _svg(paths)


def _line(x: NDArray[np.floating], y: NDArray[np.floating]) -> str:
    """An SVG path through the points; each run without NaN is a line of its own, and a single point a dash."""
    good = np.isfinite(y)
    cuts = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]])))
    lines = []
    for begin, end in cuts.reshape(-1, 2):
        points = [f"{a:.1f} {b:.1f}" for a, b in zip(x[begin:end], y[begin:end], strict=True)]
        lines.append("M" + " L".join(points) + ("h1" if len(points) == 1 else ""))
    return "".join(lines)


def _picture(panel: Panel, duration_s: float) -> str:
    picture = panel.picture
    assert picture is not None
    uri = as_uri("image/png", spectrogram_png(picture.values, picture.low, picture.high))
    width = f"width: {100 * picture.end_s / duration_s:.3f}%"
    return f'<img src="{uri}" style="{width}" alt="{escape(panel.name)} over time">'


def _legend(curves: Sequence[Curve]) -> str:
    """The names of the curves, where there are several."""
    if len(curves) < 2:
        return ""
    names = "".join(f"<i{' class=faint' if curve.faint else ''}></i>{escape(curve.name)}" for curve in curves)
    return f'<span class="legend">{names}</span>'


def _svg(inside: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" preserveAspectRatio="none" role="img">{inside}</svg>'
