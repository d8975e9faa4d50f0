"""What a corpus is on disk: a folder of audio files and one ``manifest.jsonl`` that says what each of them is."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from allears.core.config import from_dict, to_dict
from allears.core.errors import CorpusError

MANIFEST = "manifest.jsonl"
KINDS = ("speech", "noise", "event", "music", "babble", "rir", "hrtf")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One recording of a corpus.

    ``kind``: ``speech`` is clean speech fit as a target; ``babble`` is speech fit only as an interferer (narrow band,
    effects); ``noise`` is a longer ambience, ``event`` a short sound. ``frames`` are samples per channel at
    ``sample_rate_hz``. ``narrow_band``: the source was sampled below 16 kHz. ``bandwidth_hz``: where the long-term
    spectrum of the source falls 50 dB under its peak. ``noise_floor_db``: 5th percentile of the level of 20 ms
    frames, dB
    of full scale. ``clipped_fraction``: share of the source's samples at full scale. ``source_path``: the member of the
    package (``!`` goes into a container). ``audio_sha256``: hash of the decoded 16-bit samples (of the file itself
    for room and
    head responses, which are copied as they are).
    """

    id: str
    kind: str
    split: str
    path: str
    sample_rate_hz: int
    frames: int
    package: str
    version: str
    package_sha256: str
    source_path: str
    licence: str
    speaker: str | None = None
    language: str | None = None
    text: str | None = None
    label: str | None = None
    caption: str | None = None
    bandwidth_hz: float | None = None
    clipped_fraction: float = 0.0
    noise_floor_db: float | None = None
    audio_sha256: str = ""
    narrow_band: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CorpusError(f"Item.kind {self.kind!r} of {self.id!r}: wanted one of {', '.join(KINDS)}")
        if self.split not in SPLITS:
            raise CorpusError(f"Item.split {self.split!r} of {self.id!r}: wanted one of {', '.join(SPLITS)}")

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate_hz if self.sample_rate_hz else 0.0


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file with one JSON object a line.

    Raises:
        CorpusError: the file is missing, or a line is not JSON.
    """
    if not path.is_file():
        raise CorpusError(f"{path}: no such file; build the corpus with: allears data prepare {path.parent}")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise CorpusError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line, under the final name only when all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with part.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(part, path)


def item_to_dict(item: Item) -> dict:
    """The item as JSON types, without the fields that say nothing."""
    return {key: value for key, value in to_dict(item).items() if value not in (None, "")}


def item_from_dict(values: dict, where: str = "Item") -> Item:
    try:
        return from_dict(Item, values, where)
    except CorpusError:
        raise
    except ValueError as error:
        raise CorpusError(str(error)) from error


def read_manifest(folder: str | Path) -> list[Item]:
    """The items of the corpus in ``folder``, in the order of the manifest."""
    path = Path(folder) / MANIFEST
    return [item_from_dict(row, f"{path}, item {index}") for index, row in enumerate(read_jsonl(path), 1)]


def write_manifest(folder: str | Path, items: Iterable[Item]) -> Path:
    """Write the manifest of ``folder`` in one step; an older one stays until the new one is complete."""
    path = Path(folder) / MANIFEST
    write_jsonl(path, (item_to_dict(item) for item in items))
    return path


def check_splits(items: Iterable[Item]) -> list[str]:
    """Leaks between splits, as one line each: a speaker, a source file or the same audio in two of them."""
    leaks = []
    for name in ("speaker", "source", "audio_sha256"):
        seen: dict[str, set[str]] = defaultdict(set)
        for item in items:
            value = f"{item.package}:{item.source_path}" if name == "source" else getattr(item, name)
            if value:
                seen[value].add(item.split)
        leaks += [f"{name} {value!r} is in {' and '.join(sorted(s))}" for value, s in seen.items() if len(s) > 1]
    return leaks
