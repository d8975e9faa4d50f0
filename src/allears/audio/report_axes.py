"""Axes of the report's plots, and strips that show over the whole length of a file who speaks when."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np


@dataclass(frozen=True)
class Strip:
    """A line of the "who speaks when" of an entry: a name, and the spans (begin, end) in seconds that are marked."""

    name: str
    spans: Sequence[tuple[float, float]]


def show_strips(strips: Sequence[Strip], duration_s: float) -> str:
    """The strips below each other over one time axis from 0 to ``duration_s``; nothing where there are none."""
    if not strips or not duration_s > 0:
        return ""
    rows = "".join(
        f'<span class="who">{escape(strip.name)}</span>'
        f'<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="when {escape(strip.name)} '
        f'speaks">{"".join(_mark(begin / duration_s, end / duration_s) for begin, end in strip.spans)}</svg>'
        for strip in strips
    )
    seconds, step = ticks(duration_s, 8)
    marks = [(at / duration_s, f"{at:.{decimals(step)}f}") for at in seconds]
    return f'<div class="strips">{rows}{x_axis(marks)}</div>'


def _mark(begin: float, end: float) -> str:
    return f'<rect x="{1000 * begin:.2f}" y="0" width="{max(1000 * (end - begin), 0.5):.2f}" height="10"/>'


def ticks(limit: float, most: int) -> tuple[list[float], float]:
    """Round numbers from 0 up to ``limit``, at most ``most`` steps of 1, 2 or 5 times a power of ten; and the step."""
    power = 10.0 ** np.floor(np.log10(limit / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= limit * (1 - 1e-9))
    return [float(i * step) for i in range(int(limit / step + 1e-9) + 1)], float(step)


def decimals(step: float) -> int:
    """Decimal places that tell multiples of ``step`` apart."""
    return max(0, int(-np.floor(np.log10(step) + 1e-9)))


def y_axis(marks: Sequence[tuple[float, str]]) -> str:
    """Labels at shares of the height."""
    spans = ""
    for share, label in marks:
        side = ' class="bottom"' if share < 0.02 else ' class="top"' if share > 0.98 else ""
        spans += f'<span{side} style="bottom: {100 * share:.1f}%">{label}</span>'
    return f'<div class="y">{spans}</div>'


def x_axis(marks: Sequence[tuple[float, str]]) -> str:
    """Labels, in seconds, at shares of the width."""
    spans = ""
    for share, label in marks:
        side = ' class="first"' if share < 0.02 else ' class="last"' if share > 0.96 else ""
        spans += f'<span{side} style="left: {100 * share:.1f}%">{label} s</span>'
    return f'<div class="x">{spans}</div>'


def as_uri(kind: str, data: bytes) -> str:
    """Data of a media type such as ``image/png`` as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
