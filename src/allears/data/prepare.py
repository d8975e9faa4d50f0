"""Build a corpus: every package of the table, one after the other, then one manifest for all."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from allears.core.errors import CorpusError
from allears.core.progress import OnProgress, Progress
from allears.data.archives import refuse_sealed
from allears.data.corpus import KINDS, Item, check_splits, item_from_dict, item_to_dict, write_manifest
from allears.data.extract import build_package
from allears.data.fetch import PACKAGES_DIR, find_package
from allears.data.labels import TABLE_DIGEST
from allears.data.packages import Package, known_packages

log = logging.getLogger(__name__)

MAX_CHARACTERS_PER_S = 30.0
_STATE, _STATE_FORM = ".state", 1


def _drop_duplicates(items: Iterable[Item]) -> list[Item]:
    """One item for each decoded audio. What is in the test set stays there, then validation, then train."""
    rank = {"test": 0, "val": 1, "train": 2}
    first: dict[str, str] = {}
    items = list(items)
    for item in sorted(items, key=lambda item: rank[item.split]):
        first.setdefault(item.audio_sha256, item.id)
    return [item for item in items if first[item.audio_sha256] == item.id]


def _without_wrong_text(item: Item) -> Item:
    """Nobody reads 30 characters a second: such a text belongs to another recording."""
    wrong = item.text is not None and len(item.text) > MAX_CHARACTERS_PER_S * max(item.seconds, 0.5)
    return replace(item, text=None) if wrong else item


def prepare(
    folder: str | Path,
    packages_dir: str | Path = PACKAGES_DIR,
    *,
    kinds: Collection[str] = KINDS,
    only: Collection[str] | None = None,
    codec: str = "flac",
    allow_other_versions: bool = False,
    skip_missing: bool = False,
    workers: int = 2,
    packages: Mapping[str, Package] | None = None,
    on_progress: OnProgress | None = None,
) -> list[Item]:
    """Build the corpus in ``folder``, 16 kHz mono, and write its manifest. A finished package is not built again.

    ``only`` names packages of the table (all by default), ``kinds`` the kinds of item to take. ``codec``: ``"flac"``
    (16 bit, lossless) or ``"opus"``. Room and head responses are copied as they are.

    Raises:
        CorpusError: a package is sealed, unknown, missing, damaged, or has the wrong checksum.
    """
    folder, packages_dir = Path(folder).expanduser(), Path(packages_dir).expanduser()
    table = dict(known_packages() if packages is None else packages)
    for name in only or ():
        refuse_sealed(name)
    if unknown := sorted(set(only or ()) - set(table)):
        raise CorpusError(f"only={unknown[0]!r}: not in the table; known are {', '.join(sorted(table))}")
    if bad := sorted(set(kinds) - set(KINDS)):
        raise CorpusError(f"kinds={bad[0]!r}: wanted any of {', '.join(KINDS)}")
    if codec not in ("flac", "opus"):
        raise CorpusError(f"codec={codec!r}: wanted 'flac' or 'opus'")
    chosen = [table[name] for name in table if (only is None or name in only) and table[name].rules]
    items: list[Item] = []
    for done, package in enumerate(chosen):
        if on_progress:
            on_progress(Progress(done, len(chosen), "packages", package.name))
        source = table.get(package.texts_from or "")
        key = _build_key(package, source, codec, kinds, allow_other_versions)
        state = folder / _STATE / f"{package.name}.json"
        made = _finished(state, key)
        if made is None:
            try:
                deb = find_package(package, packages_dir, allow_other_versions)
                text_deb = find_package(source, packages_dir, allow_other_versions) if source else None
            except CorpusError as error:
                if not skip_missing:
                    raise
                log.warning("skipped: %s", error)
                continue
            made, left_out = build_package(package, deb, text_deb, folder, codec, kinds, workers)
            log.info("%s: %d items; left out: %s", package.name, len(made), dict(left_out) or "none")
            state.parent.mkdir(parents=True, exist_ok=True)
            part = state.with_name(state.name + ".tmp")
            part.write_text(
                json.dumps({"key": key, "left_out": left_out, "items": [item_to_dict(item) for item in made]})
            )
            os.replace(part, state)
        for item in made:
            if not (package.copies and re.search(package.copies, item.source_path)):
                items.append(replace(item, licence=package.licence))
    unique = [_without_wrong_text(item) for item in _drop_duplicates(items)]
    log.info("%d duplicates dropped", len(items) - len(unique))
    if leaks := check_splits(unique):
        raise CorpusError(f"the splits leak ({len(leaks)} in all): {leaks[0]}")
    write_manifest(folder, unique)
    if on_progress:
        on_progress(Progress(len(chosen), len(chosen), "packages", "done"))
    return unique


def _build_key(
    package: Package, source: Package | None, codec: str, kinds: Collection[str], allow_other_versions: bool
) -> str:
    """Hash of all that decides what is built from ``package``: another one means that it must be built again."""
    inputs = [_STATE_FORM, asdict(replace(package, licence="", copies=None)), source and source.sha256]
    inputs += [codec, sorted(kinds), allow_other_versions]
    if any(rule.kind == "sound" for rule in package.rules):
        inputs.append(TABLE_DIGEST)
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()


def _finished(state: Path, key: str) -> list[Item] | None:
    """The items of a package that was built before from the same rules, or ``None``."""
    if not state.is_file():
        return None
    saved = json.loads(state.read_text())
    return [item_from_dict(row) for row in saved["items"]] if saved.get("key") == key else None
