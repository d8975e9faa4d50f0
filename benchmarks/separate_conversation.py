"""Long conversations: does each talker stay on one output? Whole recordings in one pass, in windows, and unstitched.

Shapes: J outputs, K talkers, T samples.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import track

from allears.audio.activity import BLOCK_S, activities, block_powers
from allears.audio.metrics import bootstrap_interval

from . import results
from .registry import case
from .scores import interval_row
from .separate import about, load, separate
from .separate_scores import tables
from .talkers import TalkerClip, assign, from_manifest, si_snr_db

if TYPE_CHECKING:
    from allears.models.separate.pipeline import Separator

ALL = "conversation"
WINDOW_S = 30
SHORTEST_S, LONGEST_S = 0.5, 5.0
"""Spurts of speech below the first are not looked at; those above the second are looked at in parts."""

Outputs = Callable[[TalkerClip], np.ndarray]
Spurt = tuple[int, int]


@case("separate_conversation")
@dataclass
class SeparateConversationCase:
    """Count how often a talker changes the output from one spurt of speech to the next.

    Each spurt's output is the one with the best SI-SNR against that talker alone. Writes benchmarks/results/NAME.json.
    """

    weights: str = "separate-talkers-16k"
    """Weights: a shipped name or a path stem."""

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifest renders from."""

    clips: Path = results.ROOT / "benchmarks/sets/separate-conversation.jsonl"
    """The manifest."""

    device: str = "auto"
    """cuda, cpu or auto."""

    name: str = "separate_conversation"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        console = Console()
        separator = load(self.weights, self.device)
        systems = make_systems(separator)
        tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
        seconds = []
        for clip in track(from_manifest(self.corpus, self.clips), "clips", console=console, transient=True):
            clip = clip.at_rate(separator.config.sample_rate_hz)
            seconds.append(len(clip.mixture) / clip.rate_hz)
            for name, outputs in systems.items():
                found = outputs(clip)
                for which in (ALL, clip.id):
                    tallies[which, name].add(found, clip)
        if not seconds:
            raise ValueError(f"clips: {str(self.clips)!r} holds no clip")
        rows = [row for key, tally in sorted(tallies.items(), key=lambda pair: pair[0][0]) for row in tally.rows(*key)]
        notes = [
            f"{self.weights}: {about(separator)}, on {separator.device}",
            f"{len(seconds)} conversations of {min(seconds):.0f} to {max(seconds):.0f} s; spurts of {SHORTEST_S} s or "
            f"more, in parts of up to {LONGEST_S} s; an output that is missing counts as the mixture",
            f"allears: one pass; the others in windows of {WINDOW_S} s: allears-{WINDOW_S}s-windows as the pipeline "
            "joins them, no-stitching end to end in the order in which the network gives the outputs",
        ]
        path = results.write(self.name, rows, notes, self.results_folder)
        console.print(*tables(rows), *notes, f"written: {path}", sep="\n")
        return 0


def make_systems(separator: "Separator") -> dict[str, Outputs]:
    """Ways to hear a recording that is longer than a window."""

    def windows(clip: TalkerClip) -> np.ndarray:
        return np.asarray(separator(clip.mixture, clip.rate_hz, one_pass_s=WINDOW_S).talkers)

    def unstitched(clip: TalkerClip) -> np.ndarray:
        return join_blindly(separator, clip, WINDOW_S * clip.rate_hz)

    return {
        "allears": lambda clip: separate(separator, clip)[0],
        f"allears-{WINDOW_S}s-windows": windows,
        "no-stitching": unstitched,
    }


def join_blindly(separator: "Separator", clip: TalkerClip, window: int) -> np.ndarray:
    """(J, T): windows put end to end, each with its outputs in the order in which the network gives them."""
    import torch

    parts = []
    with torch.inference_mode():
        for first in range(0, len(clip.mixture), window):
            part = torch.from_numpy(clip.mixture[None, first : first + window]).to(separator.device)
            parts.append(separator.net(part)[0].float().cpu().numpy())
    return np.concatenate(parts, axis=1)


@dataclass
class Tally:
    """What one system did on the clips so far."""

    swaps: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    gains_db: list[float] = field(default_factory=list)

    def add(self, outputs: np.ndarray, clip: TalkerClip) -> None:
        """Outputs (J, T) of a clip."""
        missing = len(clip.sources) - len(outputs)
        if missing > 0:
            outputs = np.concatenate([outputs, np.tile(clip.mixture, (missing, 1))])
        held = [holders(outputs, source, own) for source, own in zip(clip.sources, spurts(clip), strict=True)]
        self.swaps.append(sum(count_swaps(own) for own in held))
        self.turns.append(sum(len(own) for own in held))
        homes = [max(set(own), key=own.count) for own in held if own]
        self.shared.append(len(set(homes)) < len(homes))
        gain = assign(outputs, clip.sources)[1] - si_snr_db(clip.mixture, clip.sources)
        self.gains_db.append(float(gain.mean()))

    def rows(self, which: str, system: str) -> list[dict[str, Any]]:
        """Sums over all clips, and the mean gain; a shared output has two talkers who are mostly on it."""
        clips = len(self.swaps)
        counts = {"swaps": self.swaps, "spurts": self.turns, "shared_outputs": self.shared}
        rows = [results.row(which, system, name, sum(found), n=clips) for name, found in counts.items()]
        return [*rows, interval_row(which, system, "si_snri_db", bootstrap_interval(self.gains_db))]


def spurts(clip: TalkerClip) -> list[list[Spurt]]:
    """Each talker's stretches of speech, in samples: pauses of up to 0.3 s closed, long ones cut in equal parts."""
    block = round(BLOCK_S * clip.rate_hz)
    found = []
    for source in clip.sources:  # each for itself: a loud talker does not hide a quiet one
        (activity,) = activities(block_powers(source[None], block), block / clip.rate_hz)
        parts: list[Spurt] = []
        for begin_s, end_s in activity.spans:
            if end_s - begin_s >= SHORTEST_S:
                count = int(np.ceil((end_s - begin_s) / LONGEST_S))
                edges = np.linspace(begin_s, end_s, count + 1) * clip.rate_hz
                parts += pairwise(int(edge) for edge in edges.round())
        found.append(parts)
    return found


def holders(outputs: np.ndarray, source: np.ndarray, own: list[Spurt]) -> list[int]:
    """The output that holds the talker ``source`` (T,) in each spurt."""
    return [int(si_snr_db(outputs[:, a:b], source[None, a:b]).argmax()) for a, b in own]


def count_swaps(held: list[int]) -> int:
    """Changes of the output from one spurt to the talker's next."""
    return sum(before != after for before, after in pairwise(held))
