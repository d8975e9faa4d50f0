"""A corpus as a few large files: quick to carry to another machine and to load there.

A pack is a folder with shards (the items one after the other, 20 ms of silence between them) and ``index.jsonl``,
one line
an item: ``{"item": {...}, "shard": name, "start": frame, "frames": count}``.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from allears.core.errors import CorpusError
from allears.core.progress import OnProgress, Progress
from allears.data.bank import INDEX, SOUND_KINDS, read_int16
from allears.data.corpus import Item, item_to_dict, read_manifest, write_jsonl
from allears.data.decode import SAMPLE_RATE_HZ

log = logging.getLogger(__name__)

GAP_FRAMES = SAMPLE_RATE_HZ // 50
_MIB = 1 << 20
_BLOCK = SAMPLE_RATE_HZ * 10


def opus_compression_level(kbps: float) -> float:
    """libsndfile's ``compression_level`` for a nominal Opus rate: it sets ``6 + 250 (1 - level)`` kbit/s a channel,
    variable."""
    if not 6.0 <= kbps <= 256.0:
        raise ValueError(f"kbps={kbps}: Opus takes 6 to 256 kbit/s a channel")
    return 1.0 - (kbps - 6.0) / 250.0


def choose_evenly(items: Iterable[Item], minutes: float) -> list[Item]:
    """At most ``minutes`` of ``items``, chosen by a hash of their ids (so without order or favour), in their own
    order."""
    items = list(items)
    left, chosen = minutes * 60.0, set()
    for item in sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest()):
        if item.seconds <= left:
            chosen.add(item.id)
            left -= item.seconds
    return [item for item in items if item.id in chosen]


@dataclass(frozen=True)
class _Shard:
    """One file to be written."""

    name: str
    codec: str
    kbps: float
    items: tuple[Item, ...]

    def write(self, corpus_folder: Path, folder: Path) -> tuple[Path, list[dict]]:
        """Encode the items; returns the file and its lines of the index."""
        how: dict[str, Any] = {"format": "FLAC", "subtype": "PCM_16"}
        if self.codec == "opus":
            how = {"format": "OGG", "subtype": "OPUS", "compression_level": opus_compression_level(self.kbps)}
        rows, frames, gap = [], 0, np.zeros(GAP_FRAMES, np.int16)
        with sf.SoundFile(folder / self.name, "w", SAMPLE_RATE_HZ, 1, **how) as file:
            for item in self.items:
                rows.append({"item": item_to_dict(item), "shard": self.name, "start": frames, "frames": item.frames})
                audio = np.concatenate([read_int16(corpus_folder / item.path, item.frames), gap])
                for first in range(0, len(audio), _BLOCK):
                    file.write(audio[first : first + _BLOCK])
                frames += len(audio)
        return folder / self.name, rows


def _plan(name: str, items: list[Item], codec: str, kbps: float, max_bytes: float) -> list[_Shard]:
    """Cut a group of items into shards. FLAC never needs more than 2 bytes a sample; Opus varies around its rate."""
    bytes_per_frame = kbps * 125.0 * 1.15 / SAMPLE_RATE_HZ if codec == "opus" else 2.01
    parts: list[list[Item]] = []
    used = max_bytes
    for item in items:
        need = (item.frames + GAP_FRAMES) * bytes_per_frame + 16
        if used + need > max_bytes:
            parts.append([])
            used = 65536.0
        parts[-1].append(item)
        used += need
    return [_Shard(f"{name}-{number:02d}.{codec}", codec, kbps, tuple(part)) for number, part in enumerate(parts)]


def pack(
    corpus_folder: str | Path,
    out_folder: str | Path,
    kinds: Collection[str] = SOUND_KINDS,
    splits: Collection[str] = ("train", "val"),
    *,
    codec: str = "opus",
    kbps: float | Mapping[str, float] = 40.0,
    max_minutes: Mapping[str, float] | None = None,
    max_shard_mib: float = 15.0,
    max_folder_mib: float | None = None,
    workers: int = 2,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Pack the items of ``kinds`` (in that order) and ``splits`` of a prepared corpus; returns the folders written.

    Args:
        kbps: Opus rate, or a rate for each kind (40 for kinds not named).
        max_minutes: at most so much of a kind and split, chosen evenly.
        max_shard_mib: size of a shard; Opus, whose rate varies, may rarely pass it (a warning says so).
        max_folder_mib: spread the shards over sub-folders ``a``, ``b``, ... of at most this size, each a
            pack by itself.

    Raises:
        CorpusError: nothing to pack, ``out_folder`` holds a pack already, or a file is missing or damaged.
    """
    corpus_folder, out_folder = Path(corpus_folder), Path(out_folder)
    if codec not in ("opus", "flac"):
        raise CorpusError(f"codec={codec!r}: wanted 'opus' or 'flac'")
    if any((out_folder / pattern).exists() for pattern in (INDEX, f"a/{INDEX}")):
        raise CorpusError(f"{out_folder}: holds a pack already; remove it or name another folder")
    manifest = read_manifest(corpus_folder)
    groups = []
    for kind in kinds:
        for split in splits:
            group = [item for item in manifest if item.kind == kind and item.split == split and kind in SOUND_KINDS]
            if max_minutes and kind in max_minutes:
                group = choose_evenly(group, max_minutes[kind])
            groups.append((f"{kind}-{split}", group))
    total = sum(len(group) for _, group in groups)
    if not total:
        raise CorpusError(f"{corpus_folder}: no item of kinds {', '.join(kinds)} in splits {', '.join(splits)}")

    shards: list[_Shard] = []
    for name, group in groups:
        rate = kbps if isinstance(kbps, int | float) else kbps.get(name.partition("-")[0], 40.0)
        shards += _plan(name, group, codec, rate, max_shard_mib * _MIB)
    out_folder.mkdir(parents=True, exist_ok=True)
    index: dict[Path, list[dict]] = {}
    folder, used, done = (out_folder if max_folder_mib is None else out_folder / "a"), 0, 0
    with (
        tempfile.TemporaryDirectory(prefix=".packing-", dir=out_folder) as temporary,
        ThreadPoolExecutor(workers) as pool,
    ):
        for path, rows in pool.map(lambda shard: shard.write(corpus_folder, Path(temporary)), shards):
            size = path.stat().st_size
            if size > max_shard_mib * _MIB:
                log.warning("%s: %.1f MiB, more than the %.1f asked for", path.name, size / _MIB, max_shard_mib)
            if max_folder_mib is not None and used and used + size > max_folder_mib * _MIB:
                folder, used = out_folder / chr(ord(folder.name) + 1), 0
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / path.name)
            used += size + sum(len(json.dumps(row)) for row in rows)
            index.setdefault(folder, []).extend(rows)
            done += len(rows)
            if on_progress:
                on_progress(Progress(done, total, "items", path.name))
    for written, rows in index.items():
        write_jsonl(written / INDEX, rows)
        log.info("%s: %d items", written, len(rows))
    return list(index)
