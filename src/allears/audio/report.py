"""One self-contained HTML page about processed audio: players, spectrograms, waveforms, scores and time taken.

The page needs no network and no other file. Nothing in it knows what the tracks are: "input" and "enhanced",
"talker 1" and "talker 2", "microphone" and "echo removed" are all names that the caller gives.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isfinite, isnan
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from allears.audio.report_axes import Strip, as_uri, decimals, show_strips, ticks, x_axis, y_axis
from allears.audio.report_panels import Panel, show_panels
from allears.audio.report_style import SCRIPT, STYLE
from allears.audio.spectrogram import as_channels, colour_map, level_range_db, spectrogram_db, spectrogram_png

# Shape letters: C channels, T samples

GENERATOR = "allears report"
"""Content of the page's ``<meta name="generator">``: by it a caller knows an older report from a foreign file."""

CLIP_S = 30.0
"""Longer tracks are shown and played up to here, and the page says so."""


@dataclass(frozen=True)
class Track:
    """One sound of an entry.

    ``samples`` is (T,) or (C, T) in [-1, 1]; ``full_duration_s`` is the length of the whole file where ``samples`` is
    only its start; ``scores`` maps a metric, with its unit, to a value.
    """

    name: str
    samples: NDArray[np.floating]
    sample_rate_hz: int
    full_duration_s: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ReportEntry:
    """Tracks to compare, on one time axis and one colour scale.

    ``facts`` are shown as "name value" below the title, and ``strips`` below those, over ``duration_s``. With
    ``panels``, tracks stand below each other, and the panels below them, on one time axis: that of the clip that is
    shown. ``overview`` holds panels over ``duration_s``; they are shown where that is longer than the clip.
    """

    title: str
    tracks: Sequence[Track]
    elapsed_s: float | None = None
    duration_s: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    strips: Sequence[Strip] = ()
    panels: Sequence[Panel] = ()
    overview: Sequence[Panel] = ()


def write_report(
    path: str | os.PathLike[str],
    title: str,
    entries: Sequence[ReportEntry],
    summary: Mapping[str, str] | None = None,
) -> None:
    """Write the page; it appears under its name only when it is complete.

    Args:
        path: the HTML file; an existing one is replaced, a missing folder is made.
        title: heading of the page.
        entries: one card each, in this order.
        summary: name and value pairs below the heading: model, settings, machine, time.

    Raises:
        ValueError: a track holds no samples, or not (T,) or (C, T).
        OSError: the file cannot be written.
    """
    page = render_report(title, entries, summary)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def render_report(title: str, entries: Sequence[ReportEntry], summary: Mapping[str, str] | None = None) -> str:
    """The page that :func:`write_report` writes, as text."""
    cards = "\n".join(_card(entry) for entry in entries)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{_facts(summary or {})}
{cards}
<footer>Players of one card stay in step: start another one while the first plays, and it goes on from the same moment.
Levels are relative to a full-scale sine; every spectrogram of a card has the same colour scale.</footer>
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def is_report(path: Path) -> bool:
    """Whether ``path`` is a page that :func:`write_report` wrote."""
    with path.open("rb") as file:
        return f'name="generator" content="{GENERATOR}"'.encode() in file.read(1024)


def _card(entry: ReportEntry) -> str:
    clips = [_clip(track) for track in entry.tracks]
    levels = [spectrogram_db(clip, track.sample_rate_hz) for clip, track in zip(clips, entry.tracks, strict=True)]
    low, high = level_range_db(levels)
    peak = max((float(np.abs(clip).max()) for clip in clips), default=0.0)
    shown = "\n".join(
        _track(track, clip, level, low, high, peak)
        for track, clip, level in zip(entry.tracks, clips, levels, strict=True)
    )
    return f"""<article>
<h2>{escape(entry.title)}</h2>
{_facts({**_timing(entry), **entry.facts})}
{show_strips(entry.strips, entry.duration_s or 0.0)}
{_scores(entry.tracks)}
{_overview(entry, clips)}
<div class="{"stacked" if entry.panels else "tracks"}">
{shown}
{show_panels(entry.panels, _longest_s(entry, clips))}
</div>
{_scale(low, high)}
</article>"""


def _longest_s(entry: ReportEntry, clips: Sequence[NDArray[np.float64]]) -> float:
    return max(clip.shape[1] / track.sample_rate_hz for track, clip in zip(entry.tracks, clips, strict=True))


def _overview(entry: ReportEntry, clips: Sequence[NDArray[np.float64]]) -> str:
    """The panels over the whole length, where the clip is not all of it."""
    if not entry.overview or not entry.duration_s or entry.duration_s <= _longest_s(entry, clips) + 0.01:
        return ""
    return f"""<h2 class="part">The whole recording</h2>
<div class="stacked">
{show_panels(entry.overview, entry.duration_s)}
</div>
<h2 class="part">The first {_longest_s(entry, clips):.0f} s</h2>"""


def _clip(track: Track) -> NDArray[np.float64]:
    return as_channels(track.samples)[:, : max(1, int(CLIP_S * track.sample_rate_hz))]


def _timing(entry: ReportEntry) -> dict[str, str]:
    facts = {}
    if entry.duration_s is not None:
        facts["length"] = clock(entry.duration_s)
    if entry.elapsed_s is not None:
        facts["time taken"] = f"{entry.elapsed_s:.2f} s"
        if entry.duration_s:
            facts["real-time factor"] = f"{entry.elapsed_s / entry.duration_s:.3f}"
    return facts


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def _scores(tracks: Sequence[Track]) -> str:
    metrics = list(dict.fromkeys(metric for track in tracks for metric in track.scores))
    if not metrics:
        return ""
    scored = [track for track in tracks if track.scores]
    head = "".join(f"<th>{escape(track.name)}</th>" for track in scored) + (
        "<th>change</th>" if len(scored) == 2 else ""
    )
    body = ""
    for metric in metrics:
        values = [track.scores.get(metric) for track in scored]
        cells = "".join(f"<td>{'' if value is None or isnan(value) else f'{value:.2f}'}</td>" for value in values)
        if len(scored) == 2:
            before, after = values
            change = "" if before is None or after is None or not isfinite(after - before) else f"{after - before:+.2f}"
            cells += f'<td class="change">{change}</td>'
        body += f"<tr><td>{escape(metric)}</td>{cells}</tr>"
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th>score</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _track(
    track: Track, clip: NDArray[np.float64], level: NDArray[np.float32], low: float, high: float, peak: float
) -> str:
    rate, channels = track.sample_rate_hz, clip.shape[0]
    duration_s = clip.shape[1] / rate
    whole_s = track.full_duration_s or as_channels(track.samples).shape[1] / rate
    notes = [f"{rate / 1000:g} kHz, {'mono' if channels == 1 else f'{channels} channels'}"]
    if whole_s > duration_s + 0.01:
        notes.append(f"the first {duration_s:.0f} s of {clock(whole_s)}")
    if channels > 2:
        notes.append("played as the mean of all channels")
    name, picture = escape(track.name), as_uri("image/png", spectrogram_png(level, low, high))
    seconds, step = ticks(duration_s, 5)
    times = [(at / duration_s, f"{at:.{decimals(step)}f}") for at in seconds]
    khz, step = ticks(rate / 2000, 5)
    frequencies = [(at / (rate / 2000), f"{at:.{decimals(step)}f}") for at in khz]
    frequencies[-1] = (frequencies[-1][0], f"{frequencies[-1][1]} kHz")
    return f"""<section class="track">
<h3>{name}</h3>
<p class="note">{escape("; ".join(notes))}</p>
<audio controls preload="metadata" src="{_player(clip, rate)}"></audio>
<div class="plot wave">{y_axis([(0.5, "0"), (1.0, f"{max(peak, 1e-4):.2g}")])}
<div class="field">{_waveform(clip, peak)}</div></div>
<div class="plot">{y_axis(frequencies)}<div class="field"><img src="{picture}" alt="spectrogram of {name}"></div>
{x_axis(times)}</div>
</section>"""


def _waveform(clip: NDArray[np.float64], peak: float, columns: int = 600) -> str:
    """The span between lowest and highest sample of each column, over all channels, as an SVG outline."""
    edges = np.linspace(0, clip.shape[1], min(columns, clip.shape[1]) + 1).astype(np.int64)[:-1]
    top = np.maximum.reduceat(clip.max(axis=0), edges) / max(peak, 1e-4)
    bottom = np.minimum.reduceat(clip.min(axis=0), edges) / max(peak, 1e-4)
    at = np.linspace(0, columns, len(edges))
    up = [f"{x:.0f} {50 - 48 * y:.1f}" for x, y in zip(at, np.maximum(top, bottom + 0.01), strict=True)]
    down = [f"{x:.0f} {50 - 48 * y:.1f}" for x, y in zip(at[::-1], bottom[::-1], strict=True)]
    return (
        f'<svg viewBox="0 0 {columns} 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<path fill="currentColor" d="M{" L".join(up + down)}Z"/></svg>'
    )


def _player(clip: NDArray[np.float64], sample_rate_hz: int) -> str:
    """The sound as a data URI: FLAC where the format holds the rate, else WAV; at most two channels."""
    heard = clip if clip.shape[0] <= 2 else clip.mean(axis=0, keepdims=True)
    kind = "FLAC" if sample_rate_hz <= 192_000 else "WAV"
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(heard.T, -1, 1), sample_rate_hz, format=kind, subtype="PCM_16")
    return as_uri(f"audio/{kind.lower()}", stream.getvalue())


def _scale(low: float, high: float) -> str:
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colour_map()[::17])
    return (
        f'<div class="scale"><span>{low:.0f} dB</span>'
        f'<i style="background: linear-gradient(to right, {stops})"></i><span>{high:.0f} dB</span>'
        "<span>frequency upwards, time to the right</span></div>"
    )


def clock(seconds: float) -> str:
    """12.3 s, 4:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
