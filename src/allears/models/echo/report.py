"""What a report page shows of a run over files: the three signals, the delay found, the attenuation, who is active.

Attenuation is the level of the microphone over that of the output. It is that of the echo alone only while the
reference plays and nobody at the near end speaks, which the network itself judges; the page keeps the two apart.

Shapes: M microphones, n samples, T frames, N blocks of 20 ms, D delays.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allears.audio.activity import PowerMeter, Span, activities
from allears.audio.files import AudioReader
from allears.audio.report import CLIP_S, ReportEntry, Track
from allears.audio.report_axes import Strip
from allears.audio.report_panels import Curve, Panel, Picture
from allears.models.echo.files import BLOCK_FRAMES, opened
from allears.models.echo.result import DelayMap, EchoResult

VOICE = 0.5
"""Probability above which a frame counts as near-end voice."""
SURE = 0.5
"""Share of the attention within a frame of the delay, above which the delay counts as found."""
MOST_DB = 60.0
_SHORTEST_S = 0.24  # of a point of the attenuation's curve
_POINTS = 600
_QUIET = 1e-8  # a microphone below -80 dB has no echo that could be measured
_TINY = 1e-14


@dataclass(frozen=True, eq=False)
class Heard:
    """What was read of the files of a run.

    Attributes:
        clip: the first seconds, (M + 1 + M, n): microphones, reference as the network heard it, outputs.
        powers: (3, N), of first microphone, reference, first output.
        block_s: length of a block.
        playing: when the reference plays.
        rate_hz, duration_s, mics: of the microphone's file; M.
    """

    clip: np.ndarray
    powers: np.ndarray
    block_s: float
    playing: tuple[Span, ...]
    rate_hz: int
    duration_s: float
    mics: int


class Attenuation(NamedTuple):
    """Points of a curve at ``times_s``: dB where nobody speaks at the near end, and where somebody does; else NaN."""

    times_s: np.ndarray
    alone_db: np.ndarray
    both_db: np.ndarray


def hear(
    mic: str | Path, reference: str | Path | None, output: str | Path, reference_channel: int | None = None
) -> Heard:
    """Read the files of a finished run side by side, in bounded memory.

    Raises:
        AudioFileError: a file cannot be read.
    """
    clip: list[np.ndarray] = []
    with opened(mic, reference, reference_channel) as recording, AudioReader(output, BLOCK_FRAMES) as written:
        rate, mics, done = recording.info.sample_rate_hz, recording.mics, 0
        meter, wanted = PowerMeter(3, rate), int(CLIP_S * rate)
        for both, near in zip(recording.blocks(), written, strict=False):
            length = min(both.shape[1], near.shape[1])  # a codec may round
            rows = np.concatenate([both[:, :length], near[:, :length]])
            meter.push(rows[[0, mics, mics + 1]])
            if done < wanted:
                clip.append(rows[:, : wanted - done])
            done += length
    powers, duration_s = meter.powers(), done / rate
    playing = activities(powers[1:2], meter.block_s, duration_s)[0].spans
    return Heard(np.concatenate(clip, axis=1), powers, meter.block_s, playing, rate, duration_s, mics)


def entry(title: str, heard: Heard, result: EchoResult | None, facts: dict[str, str] | None = None) -> ReportEntry:
    """The card of one recording.

    Args:
        title: of the card.
        heard: of its files.
        result: of the run; ``None`` where an earlier one finished it: the delay and the voice are not known then.
        facts: more to show, name to value.
    """
    echoed, voiced = echo_blocks(heard, result), voice_blocks(heard, result)
    clip_s = heard.clip.shape[1] / heard.rate_hz
    mics, rate, clip = heard.mics, heard.rate_hz, heard.clip
    tracks = {"microphone": clip[:mics], "reference": clip[mics : mics + 1], "output": clip[mics + 1 :]}
    shown = _facts(heard, result, echoed, voiced)
    return ReportEntry(
        title=title,
        tracks=[Track(name, samples, rate, heard.duration_s) for name, samples in tracks.items()],
        elapsed_s=result.elapsed_s if result else None,
        duration_s=heard.duration_s,
        facts={**shown, **(facts or {})},
        panels=_panels(heard, result, echoed, voiced, clip_s),
        overview=_panels(heard, result, echoed, voiced, heard.duration_s),
    )


def echo_blocks(heard: Heard, result: EchoResult | None) -> np.ndarray:
    """(N,): whether the reference, brought into time by the delay that was found, plays in a block."""
    count = heard.powers.shape[1]
    playing = np.zeros(count, bool)
    for begin, end in heard.playing:
        playing[round(begin / heard.block_s) : round(end / heard.block_s)] = True
    if result is None or result.facts.delay_ms is None:
        return playing
    delay_s = _at_blocks(steady_delay_ms(result), heard, result) / 1000
    back = np.arange(count) - np.rint(delay_s / heard.block_s).astype(int)
    return np.where(back >= 0, playing[np.maximum(back, 0)], False)


def steady_delay_ms(result: EchoResult) -> np.ndarray:
    """(T,): the delay that was found where the network was sure, and elsewhere the last such (before it the first, and
    0 where there is none)."""
    delay_ms, confidence = result.facts.delay_ms, result.facts.confidence
    assert delay_ms is not None and confidence is not None
    sure = np.flatnonzero(confidence[0] >= SURE)
    if not len(sure):
        return np.zeros_like(delay_ms[0])
    last = np.searchsorted(sure, np.arange(delay_ms.shape[1]), side="right") - 1
    return delay_ms[0, sure[np.maximum(last, 0)]]


def voice_blocks(heard: Heard, result: EchoResult | None) -> np.ndarray | None:
    """(N,): whether somebody at the near end speaks, by the network; ``None`` where it did not tell."""
    if result is None or result.facts.voice is None:
        return None
    return _at_blocks(result.facts.voice[0], heard, result) >= VOICE


def attenuation(
    heard: Heard, echoed: np.ndarray, voiced: np.ndarray | None, until_s: float, points: int = _POINTS
) -> Attenuation:
    """Of the first ``until_s`` seconds, in points of 0.24 s or more; without a voice head all counts as both."""
    each = max(round(_SHORTEST_S / heard.block_s), int(np.ceil(until_s / heard.block_s / points)))
    count = -(-min(heard.powers.shape[1], int(np.ceil(until_s / heard.block_s))) // each)
    kinds = (echoed & ~voiced, echoed & voiced) if voiced is not None else (np.zeros_like(echoed), echoed)
    times_s = (np.arange(count) + 0.5) * each * heard.block_s
    curves = []
    for kind in kinds:
        mask = kind & (heard.powers[0] > _QUIET)
        sums = np.add.reduceat(np.where(mask, heard.powers[[0, 2]], 0.0), np.arange(count) * each, axis=1)
        curves.append(_ratio_db(sums[0], sums[1]))
    return Attenuation(times_s, *curves)


def _ratio_db(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """dB, at most ``MOST_DB``; NaN where nothing was there before."""
    ratio = 10 * np.log10(np.maximum(before, _TINY) / np.maximum(after, _TINY))
    return np.where(before > 0, np.clip(ratio, -MOST_DB, MOST_DB), np.nan)


def _at_blocks(values: np.ndarray, heard: Heard, result: EchoResult) -> np.ndarray:
    """Values of frames (T,) at the middle of every block, (N,)."""
    hop_s = result.hop_s
    frames = np.rint((np.arange(heard.powers.shape[1]) + 0.5) * heard.block_s / hop_s).astype(int)
    return values[np.minimum(frames, len(values) - 1)]


def _facts(heard: Heard, result: EchoResult | None, echoed: np.ndarray, voiced: np.ndarray | None) -> dict[str, str]:
    total = heard.block_s
    facts = {"microphones": str(heard.mics), "reference plays": f"{sum(e - b for b, e in heard.playing):.1f} s"}
    for name, mask in (("far end alone", ~voiced), ("both talk", voiced)) if voiced is not None else ():
        mask = echoed & mask & (heard.powers[0] > _QUIET)
        before, after = heard.powers[0, mask].sum(), heard.powers[2, mask].sum()
        if mask.any():
            facts[f"attenuation, {name}"] = f"{_ratio_db(before, after):.1f} dB over {mask.sum() * total:.1f} s"
    if voiced is not None:
        facts["near end speaks"] = f"{voiced.sum() * total:.1f} s"
    if result is not None and result.facts.delay_ms is not None and echoed.any():
        facts["delay found"] = _delay_fact(heard, result, echoed)
    for number, note in enumerate(result.notes if result else (), start=1):
        facts[f"note {number}"] = note
    return facts


def _delay_fact(heard: Heard, result: EchoResult, echoed: np.ndarray) -> str:
    assert result.facts.confidence is not None
    sure = echoed & (_at_blocks(result.facts.confidence[0], heard, result) >= SURE)
    if not sure.any():
        return "nowhere for sure"
    found = _at_blocks(steady_delay_ms(result), heard, result)[sure]
    low, middle, high = np.quantile(found, (0.1, 0.5, 0.9))
    return f"{middle:.0f} ms (mostly {low:.0f} to {high:.0f}), sure for {sure.sum() / echoed.sum():.0%} of the echo"


def _panels(
    heard: Heard, result: EchoResult | None, echoed: np.ndarray, voiced: np.ndarray | None, until_s: float
) -> list[Panel]:
    panels = []
    if result is not None and result.alignment is not None and result.facts.delay_ms is not None:
        panels.append(_delay_panel(result, result.alignment, until_s))
    found = attenuation(heard, echoed, voiced, until_s)
    curves = [Curve("far end alone", found.times_s, found.alone_db)] if voiced is not None else []
    name = "while somebody at the near end speaks too: no measure of the echo" if voiced is not None else "all"
    top = float(np.nanmax([20.0, *found.alone_db, *found.both_db]))
    low = float(np.nanmin([0.0, *found.alone_db, *found.both_db]))
    low = -10.0 if low < -2 else 0.0
    panels.append(
        Panel(
            "Attenuation while the reference plays",
            "Level of the microphone over that of the output.",
            "dB",
            low,
            10 * np.ceil(top / 10),
            [*curves, Curve(name, found.times_s, found.both_db, faint=voiced is not None)],
        )
    )
    rows = [Strip("reference", heard.playing)]
    if voiced is not None:
        rows.append(Strip("near end", _spans(voiced, heard.block_s)))
    note = "When the reference plays, by its level, and when somebody at the near end speaks, by the network."
    panels.append(Panel("Activity", note if len(rows) > 1 else "When the reference plays, by its level.", rows=rows))
    return panels


def _delay_panel(result: EchoResult, found: DelayMap, until_s: float) -> Panel:
    assert result.facts.delay_ms is not None and result.facts.confidence is not None
    columns = max(1, int(np.ceil(until_s / found.column_s)))
    weights = found.weights[:columns]
    longest_ms = found.delay_ms * weights.shape[1]
    shades = np.sqrt(weights.T)  # so that a spread attention is seen too
    picture = Picture(shades, len(weights) * found.column_s, 0.0, max(0.3, float(np.quantile(shades, 0.999))))
    times_s = np.arange(result.facts.delay_ms.shape[1]) * result.hop_s
    sure = result.facts.confidence[0] >= SURE
    delay_ms = np.where(sure, result.facts.delay_ms[0] + found.delay_ms / 2, np.nan)
    every = max(1, int(until_s / result.hop_s / (4 * _POINTS)))
    return Panel(
        "Delay of the echo behind the reference",
        "The network's attention over the delays, light where it looks; a line where most of it is on one delay.",
        "ms",
        0.0,
        longest_ms,
        [Curve("delay found", times_s[::every], delay_ms[::every])],
        picture,
    )


def _spans(mask: np.ndarray, block_s: float) -> list[Span]:
    """Begin and end of the runs, in seconds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]))).reshape(-1, 2)
    return [(float(begin * block_s), float(end * block_s)) for begin, end in edges]
