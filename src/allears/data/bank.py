"""All audio of a selection in memory: one flat int16 array, and where each item lies in it."""

import logging
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile as sf

from allears.core.errors import CorpusError
from allears.data.corpus import KINDS, Item, item_from_dict, read_jsonl, read_manifest
from allears.data.decode import SAMPLE_RATE_HZ

log = logging.getLogger(__name__)

SOUND_KINDS = tuple(kind for kind in KINDS if kind not in ("rir", "hrtf"))
NOISE_KINDS = ("noise", "event", "music", "babble")
"""What disturbs a talker."""

INDEX = "index.jsonl"


@dataclass(frozen=True)
class AudioBank:
    """Items and their samples, 16 kHz mono.

    ``audio``: int16 ``(all frames,)``; item ``i`` is ``audio[starts[i] : starts[i] + lengths[i]]``. ``starts`` and
    ``lengths`` are
    int64 ``(items,)``. A selection shares ``audio`` with the bank that it came from.
    """

    audio: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)
    lengths: np.ndarray = field(repr=False)
    items: list[Item] = field(repr=False)
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not len(self.starts) == len(self.lengths) == len(self.items):
            raise CorpusError(
                f"AudioBank: {len(self.starts)} starts, {len(self.lengths)} lengths and {len(self.items)} items; "
                "wanted as many of each"
            )
        if len(self.starts) and int((self.starts + self.lengths).max()) > len(self.audio):
            raise CorpusError(f"AudioBank: an item ends behind the {len(self.audio)} samples of audio")
        object.__setattr__(self, "_index", {item.id: index for index, item in enumerate(self.items)})

    def __len__(self) -> int:
        return len(self.items)

    @property
    def seconds(self) -> float:
        return float(self.lengths.sum()) / SAMPLE_RATE_HZ

    @classmethod
    def from_corpus(
        cls,
        folder: str | Path,
        kinds: Collection[str] = SOUND_KINDS,
        splits: Collection[str] | None = None,
        ids: Collection[str] | None = None,
        workers: int | None = None,
    ) -> "AudioBank":
        """Read the items of a prepared corpus: all of ``kinds`` in ``splits`` (all splits by default), or only ``ids``.

        Raises:
            CorpusError: no manifest, an id that is not in it, or a file that is missing or not as the manifest says.
        """
        folder = Path(folder)
        items = [item for item in read_manifest(folder) if item.kind in kinds and item.kind in SOUND_KINDS]
        items = [item for item in items if splits is None or item.split in splits]
        if ids is not None:
            wanted = set(ids)
            items = [item for item in items if item.id in wanted]
            if missing := wanted - {item.id for item in items}:
                raise CorpusError(f"ids: {min(missing)!r} and {len(missing) - 1} more are not in the corpus {folder}")
        lengths = np.array([item.frames for item in items], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])[: len(items)].astype(np.int64)
        audio = np.zeros(int(lengths.sum()), np.int16)
        jobs = [(folder / item.path, slice(a, a + n)) for item, a, n in zip(items, starts, lengths, strict=True)]
        _read_all(jobs, audio, workers)
        return cls(audio, starts, lengths, items)

    @classmethod
    def from_pack(
        cls,
        folders: str | Path | Sequence[str | Path],
        kinds: Collection[str] = SOUND_KINDS,
        splits: Collection[str] | None = None,
        workers: int | None = None,
    ) -> "AudioBank":
        """Read packs (see :func:`allears.data.pack.pack`). A folder without an index stands for all packs inside it.

        Raises:
            CorpusError: no pack there, or a shard that is missing or shorter than the index says.
        """
        rows: list[tuple[Path, dict]] = []
        for folder in [folders] if isinstance(folders, str | Path) else folders:
            for pack in pack_folders(folder):
                rows += [(pack, row) for row in read_jsonl(pack / INDEX)]
        rows = [row for row in rows if row[1]["item"]["kind"] in kinds]
        rows = [row for row in rows if splits is None or row[1]["item"]["split"] in splits]
        frames: dict[Path, int] = {}
        for pack, row in rows:
            shard = pack / row["shard"]
            frames[shard] = max(frames.get(shard, 0), int(row["start"]) + int(row["frames"]))
        offsets, total = {}, 0
        for shard, count in frames.items():
            offsets[shard] = total
            total += count
        audio = np.zeros(total, np.int16)
        _read_all(
            [(shard, slice(offsets[shard], offsets[shard] + count)) for shard, count in frames.items()], audio, workers
        )
        starts = np.array([offsets[pack / row["shard"]] + int(row["start"]) for pack, row in rows], np.int64)
        lengths = np.array([row["frames"] for _, row in rows], np.int64)
        return cls(audio, starts, lengths, [item_from_dict(row["item"], str(pack / INDEX)) for pack, row in rows])

    def select(self, predicate: Callable[[Item], bool]) -> "AudioBank":
        """The items that ``predicate`` keeps; no audio is copied."""
        keep = [index for index, item in enumerate(self.items) if predicate(item)]
        return AudioBank(self.audio, self.starts[keep], self.lengths[keep], [self.items[index] for index in keep])

    def index_of(self, item_id: str) -> int:
        """Position of the item.

        Raises:
            CorpusError: the bank has no such item.
        """
        try:
            return self._index[item_id]
        except KeyError:
            raise CorpusError(f"item {item_id!r} is not among the {len(self)} items of the bank") from None

    def crop(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Samples ``offset ... offset + length`` of item ``index`` as float32 in [-1, 1); zeros outside the item."""
        have = int(self.lengths[index])
        length = have - offset if length is None else length
        out = np.zeros(max(0, length), np.float32)
        first, last = max(0, offset), min(have, offset + length)
        if last > first:
            start = int(self.starts[index])
            out[first - offset : last - offset] = self.audio[start + first : start + last] / np.float32(32768.0)
        return out

    def speakers(self) -> dict[str, list[int]]:
        """Speaker to the positions of that speaker's items."""
        found: dict[str, list[int]] = {}
        for index, item in enumerate(self.items):
            if item.speaker is not None:
                found.setdefault(item.speaker, []).append(index)
        return found


def pack_folders(folder: str | Path) -> list[Path]:
    """``folder`` if it is a pack, else the packs directly inside it."""
    folder = Path(folder)
    found = [folder] if (folder / INDEX).is_file() else sorted(path.parent for path in folder.glob(f"*/{INDEX}"))
    if not found:
        raise CorpusError(
            f"{folder}: no pack there (no {INDEX}, nor in its sub-folders); make one with: allears data pack"
        )
    return found


def read_int16(path: Path, frames: int) -> np.ndarray:
    """The first ``frames`` samples of a 16 kHz mono file, int16.

    Raises:
        CorpusError: the file is missing, damaged, shorter, or of another rate or channel count.
    """
    try:
        with sf.SoundFile(path) as file:
            if (file.samplerate, file.channels) != (SAMPLE_RATE_HZ, 1):
                raise CorpusError(
                    f"{path}: {file.samplerate} Hz, {file.channels} channels; wanted 16000 Hz mono: prepare it again"
                )
            if file.subtype == "PCM_16":
                audio = file.read(frames, dtype="int16")
            else:
                blocks = [np.zeros(0, np.int16)]
                for block in file.blocks(1 << 20, frames=frames, dtype="float32"):
                    blocks.append(np.clip(np.round(block * 32768.0), -32768, 32767).astype(np.int16))
                audio = np.concatenate(blocks)
    except (sf.LibsndfileError, OSError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}); prepare or pack the corpus again") from error
    if len(audio) != frames:
        raise CorpusError(f"{path}: {len(audio)} samples, wanted {frames}; prepare or pack the corpus again")
    return audio


def _read_all(jobs: list[tuple[Path, slice]], audio: np.ndarray, workers: int | None) -> None:
    def read(job: tuple[Path, slice]) -> None:
        path, where = job
        audio[where] = read_int16(path, where.stop - where.start)

    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for _ in pool.map(read, jobs):
            pass


def load_bank(folders: list[str], kinds: tuple[str, ...], splits: tuple[str, ...]) -> AudioBank:
    """Items of prepared corpora or packs (see ``allears data``), in memory. A warning tells if there are none:
    without recorded noises a training goes on with made ones.
    """
    if all((Path(folder) / "manifest.jsonl").is_file() for folder in folders) and len(folders) == 1:
        bank = AudioBank.from_corpus(folders[0], kinds=kinds, splits=splits)
    else:
        bank = AudioBank.from_pack(folders, kinds=kinds, splits=splits)
    if not len(bank):
        wanted, among = ", ".join(kinds), ", ".join(splits)
        log.warning("folders: %s hold no item of kind %s in split %s; is a pack missing?", folders, wanted, among)
    return bank
