"""Check that a corpus or a pack on disk is what its manifest or index says."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import soundfile as sf

from allears.core.errors import CorpusError
from allears.core.progress import OnProgress, Progress
from allears.data.bank import INDEX, SOUND_KINDS, pack_folders, read_int16
from allears.data.corpus import MANIFEST, Item, check_splits, item_from_dict, read_jsonl, read_manifest


def verify(folder: str | Path, on_progress: OnProgress | None = None) -> list[str]:
    """The faults of the corpus or pack in ``folder``, one line each; empty if there is none.

    A corpus: every file is there with the length and samples of the manifest; no speaker, source or audio lies in two
    splits. A pack: every shard is there and as long as its index says.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return [fault for pack in pack_folders(folder) for fault in _verify_pack(pack)]
    items = read_manifest(folder)
    faults = check_splits(items) + _repeated(item.id for item in items)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, fault in enumerate(pool.map(lambda item: _verify_item(folder, item), items), 1):
            faults += [fault] if fault else []
            if on_progress and (done % 100 == 0 or done == len(items)):
                on_progress(Progress(done, len(items), "items"))
    return faults


def _verify_item(folder: Path, item: Item) -> str | None:
    path = folder / item.path
    if not path.is_file():
        return f"{path}: missing"
    if item.kind not in SOUND_KINDS:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        try:
            audio = read_int16(path, item.frames)
        except CorpusError as error:
            return str(error)
        if path.suffix != ".flac":
            return None
        found = hashlib.sha256(audio.tobytes()).hexdigest()
    return None if found == item.audio_sha256 else f"{path}: its samples are not those of the manifest"


def _verify_pack(pack: Path) -> list[str]:
    rows = read_jsonl(pack / INDEX)
    ends: dict[str, int] = defaultdict(int)
    for row in rows:
        ends[row["shard"]] = max(ends[row["shard"]], row["start"] + row["frames"])
    faults = _repeated(item_from_dict(row["item"], str(pack)).id for row in rows)
    for name, end in ends.items():
        try:
            frames = sf.info(str(pack / name)).frames
        except sf.LibsndfileError as error:
            faults.append(f"{pack / name}: {error}")
            continue
        if frames < end:
            faults.append(f"{pack / name}: {frames} samples, the index wants {end}")
    return faults


def _repeated(ids: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [f"item {name!r} is there twice" for name in ids if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
