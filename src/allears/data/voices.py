"""Narrow-band voices of an adventure game with many actors, told apart by their sound.

At 8 kHz these recordings are full band, and widen what a separator hears. Their names tell in part who speaks: all
lines of the hero are marked, and each dialogue has one other person. So the voices of whole dialogues are compared,
many seconds each, and dialogues that sound alike are one voice. Lines of other scenes go to the voice that is clearly
nearest. The result ships as ``voices.tsv`` (a voice a line), so that building the corpus takes no speaker embedding.

Shapes: N clips, D features of an embedding, V voices.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import soundfile

from allears.audio.metrics.speaker import speaker_embedding
from allears.core.errors import CorpusError, require
from allears.core.progress import OnProgress, Progress
from allears.data.corpus import MANIFEST, Item, read_manifest, write_manifest
from allears.data.fetch import PACKAGES_DIR
from allears.data.packages import Package, parse_packages
from allears.data.prepare import prepare

log = logging.getLogger(__name__)

SHORTEST_CLIP_S = 1.0
SHORTEST_VOICE_S = 30.0
SHORTEST_SCENE_S = 10.0
SCENE_DISTANCE = 0.07
"""Cosine distance up to which the persons of two dialogues are one voice.

Two halves of one dialogue differ by 0.015 (median; 0.07 at the 95th percentile), persons of different dialogues by 0.2;
from 0.075 on the hero would be one with others.
"""
SIMILARITY, MARGIN = 0.8, 0.02
"""A line goes to a voice whose cosine is at least the one, and ahead of the next voice's by the other: on lines whose
voice is known, 99 % of the time that this assigns is right.
"""

_HERO = re.compile(r"JOE\d|\d\d\w{4}J")
_DIALOGUE = re.compile(r"(\d\d)\w{4}P")


@cache
def voice_packages() -> dict[str, Package]:
    """The table of packages with many voices that ships with allears."""
    return parse_packages((files("allears.data") / "voices_packages.toml").read_text(encoding="utf-8"))


@cache
def known_voices() -> Mapping[str, str]:
    """Name of each clip to its voice, as it ships with allears."""
    return parse_voices((files("allears.data") / "voices.tsv").read_text(encoding="utf-8"))


def parse_voices(text: str) -> dict[str, str]:
    """Lines of ``voice TAB clip clip ...`` as clip to voice."""
    rows = (line.split("\t") for line in text.splitlines() if line and not line.startswith("#"))
    return {clip: voice for voice, clips in rows for clip in clips.split()}


def format_voices(voices: Mapping[str, str]) -> str:
    """The inverse of :func:`parse_voices`."""
    clips: dict[str, list[str]] = {}
    for clip, voice in sorted(voices.items()):
        clips.setdefault(voice, []).append(clip)
    return "".join(f"{voice}\t{' '.join(found)}\n" for voice, found in sorted(clips.items()))


def clip_name(item: Item) -> str:
    """The clip's name in its container: ``"...queen.1c!0312B4J1.SB"`` -> ``"0312B4J1"``."""
    return item.source_path.rpartition("!")[2].partition(".")[0]


def scene_of(clip: str) -> str | None:
    """``"hero"``, the number of the dialogue whose other person speaks, or ``None`` where the name does not tell."""
    if _HERO.match(clip):
        return "hero"
    found = _DIALOGUE.match(clip)
    return found[1] if found else None


def prepare_voices(
    folder: str | Path,
    packages_dir: str | Path = PACKAGES_DIR,
    *,
    regroup: bool = False,
    workers: int = 2,
    on_progress: OnProgress | None = None,
) -> list[Item]:
    """Build the corpus of voices in ``folder``: kind speech, split train, 16 kHz mono, flagged as narrow band.

    Clips without a voice are left out of the manifest.

    Args:
        folder: of its own, not that of another corpus.
        packages_dir: holds the ``.deb`` file, which is fetched with ``apt-get download`` if missing.
        regroup: embed and group all clips anew, in place of the grouping that ships with allears, and write the result
            to ``voices.tsv`` in ``folder``.

    Raises:
        CorpusError: ``folder`` holds another corpus, or the package is missing, damaged or not the one of the table.
        MissingDependencyError: ``regroup`` without ``resemblyzer`` or ``scipy``.
    """
    folder, table = Path(folder).expanduser(), voice_packages()
    if (folder / MANIFEST).is_file() and any(item.package not in table for item in read_manifest(folder)):
        raise CorpusError(f"{folder}: holds another corpus, which this would replace; name a folder of its own")
    items = prepare(folder, packages_dir, packages=table, workers=workers, on_progress=on_progress)
    voices = group_clips(folder, items, on_progress) if regroup else known_voices()
    if regroup:
        (folder / "voices.tsv").write_text(format_voices(voices), encoding="utf-8")
    kept = [replace(item, speaker=voices[clip_name(item)]) for item in items if clip_name(item) in voices]
    write_manifest(folder, kept)
    log.info("%d of %d clips have one of %d voices", len(kept), len(items), len({item.speaker for item in kept}))
    return kept


def group_clips(folder: Path, items: Sequence[Item], on_progress: OnProgress | None = None) -> dict[str, str]:
    """Name of each clip that has a voice to that voice, ``SPEAKER-00`` being the one heard most."""
    items = [item for item in items if item.seconds >= SHORTEST_CLIP_S]
    embeddings = []
    for done, item in enumerate(items):
        audio, rate = soundfile.read(folder / item.path, dtype="float32")
        embeddings.append(speaker_embedding(audio, rate))
        if on_progress and done % 50 == 0:
            on_progress(Progress(done, len(items), "clips", "voices"))
    names = [clip_name(item) for item in items]
    seconds = np.array([item.seconds for item in items])
    # The last character of a name counts the parts of one line.
    found = group_voices(np.stack(embeddings), seconds, [name[:-1] for name in names], [scene_of(n) for n in names])
    return {
        name: f"{item.speaker}-{voice:02d}" for name, item, voice in zip(names, items, found, strict=True) if voice >= 0
    }


def group_voices(
    embeddings: np.ndarray,
    seconds: np.ndarray,
    lines: Sequence[str],
    scenes: Sequence[str | None],
    distance: float = SCENE_DISTANCE,
) -> np.ndarray:
    """Voice of each clip (N,), -1 for none; voice 0 is heard most.

    Args:
        embeddings: (N, D), unit length.
        seconds: (N,).
        lines: clips of one line are one person's.
        scenes: clips of one scene are one person's, as a rule; a line whose own voice is not its nearest is left out.
        distance: average-linkage distance up to which scenes are one voice.

    Raises:
        ValueError: no scene is long enough to tell a voice from.
    """
    voices = _voices_of_scenes(embeddings, seconds, scenes, distance)
    weighted = embeddings * seconds[:, None]
    sums = np.stack([weighted[voices == voice].sum(0) for voice in range(voices.max() + 1)])  # (V, D)
    number = np.unique(np.asarray(lines), return_inverse=True)[1]
    of_line = np.zeros((number.max() + 1, embeddings.shape[1]))
    np.add.at(of_line, number, weighted)
    own = np.full(len(of_line), -1)
    own[number] = voices
    near = _unit(of_line) @ _unit(sums).T  # (lines, V)
    rows = np.flatnonzero(own >= 0)  # a line is compared with its own voice's other lines
    near[rows, own[rows]] = (_unit(of_line[rows]) * _unit(sums[own[rows]] - of_line[rows])).sum(1)
    best, ranked = near.argmax(1), np.sort(np.pad(near, ((0, 0), (1, 0)), constant_values=-1.0), axis=1)
    clear = (ranked[:, -1] >= SIMILARITY) & (ranked[:, -1] - ranked[:, -2] >= MARGIN)
    found = np.where((own == best) | ((own < 0) & clear), best, -1)[number]
    return _by_time(found, seconds)


def _voices_of_scenes(
    embeddings: np.ndarray, seconds: np.ndarray, scenes: Sequence[str | None], distance: float
) -> np.ndarray:
    """Voice (N,) of the clips whose scene tells it; -1 for the others."""
    hierarchy = require("scipy.cluster.hierarchy", "eval", "grouping clips into voices")
    names = np.array([scene or "" for scene in scenes])
    known = [name for name in dict.fromkeys(scenes) if name and seconds[names == name].sum() >= SHORTEST_SCENE_S]
    if not known:
        raise ValueError(f"scenes: none has {SHORTEST_SCENE_S:g} s of clips, so there is no voice to tell")
    centres = np.stack([(embeddings[names == name] * seconds[names == name, None]).sum(0) for name in known])
    groups = np.zeros(1, int)
    if len(known) > 1:
        tree = hierarchy.linkage(_unit(centres), "average", metric="cosine")
        groups = hierarchy.fcluster(tree, distance, "distance")
    voices = np.full(len(names), -1)
    for name, group in zip(known, groups, strict=True):
        voices[names == name] = group
    return _by_time(voices, seconds)


def _by_time(voices: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Voices numbered anew, the one heard most first; those heard too little become -1.

    Raises:
        ValueError: none is heard enough.
    """
    heard = {voice: seconds[voices == voice].sum() for voice in set(voices.tolist()) - {-1}}
    order = [voice for voice in sorted(heard, key=lambda v: (-heard[v], v)) if heard[voice] >= SHORTEST_VOICE_S]
    if not order:
        raise ValueError(f"seconds: no voice has {SHORTEST_VOICE_S:g} s of clips; give more clips")
    numbered = np.full(len(voices), -1)
    for number, voice in enumerate(order):
        numbered[voices == voice] = number
    return numbered


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length; a row of zeros stays so."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
