"""Take the recordings of one package out of it: decode, measure, write, describe."""

import hashlib
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import soundfile as sf

from allears.core.errors import AudioFileError, CorpusError
from allears.data import decode as audio
from allears.data.archives import CONTAINERS, deb_control, deb_members
from allears.data.corpus import KINDS, Item
from allears.data.fetch import sha256_of
from allears.data.labels import CAPTIONS, find_label, is_ambience
from allears.data.packages import Package, Rule
from allears.data.transcripts import FORMS, find_text, is_text, read_texts

log = logging.getLogger(__name__)

MIN_SPEECH_S, MIN_SOUND_S, MAX_SOUND_S = 0.3, 0.05, 60.0


def _expand(package: Package, deb: Path) -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each text and each recording that a rule asks for; ``container!member`` inside containers."""
    into = any("!" in rule.match for rule in package.rules)

    def take(path: str) -> bool:
        known = PurePosixPath(path).suffix.lower() in audio.AUDIO_SUFFIXES | {".sofa"}
        return known and package.find_rule(path) is not None

    def wanted(path: str) -> bool:
        own_text = package.texts_from is None and is_text(package.texts, path)
        return own_text or (into and PurePosixPath(path).suffix in CONTAINERS) or take(path)

    for path, data in deb_members(deb, wanted):
        if reader := CONTAINERS.get(PurePosixPath(path).suffix):
            for inner, body in reader(data, lambda name, outer=path: take(f"{outer}!{name}")):
                yield f"{path}!{inner}", body
        else:
            yield path, data


def _slug(path: str) -> str:
    stem = "-".join(path.removeprefix("usr/share/").rpartition(".")[0].split("/")[-2:])
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', stem)[-60:]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def _write(path: Path, samples: np.ndarray, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    form, subtype = ("FLAC", "PCM_16") if codec == "flac" else ("OGG", "OPUS")
    sf.write(part, samples, audio.SAMPLE_RATE_HZ, format=form, subtype=subtype)
    os.replace(part, path)


def _copy_response(item: Item, rule: Rule, folder: Path, path: str, data: bytes) -> Item:
    """A room or head response, byte for byte."""
    suffix = PurePosixPath(path).suffix
    target = folder / f"{item.path}{suffix}"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".tmp")
    part.write_bytes(data)
    os.replace(part, target)
    rate, frames = rule.sample_rate_hz, rule.frames
    if suffix != ".sofa":
        info = sf.info(str(target))
        rate, frames = info.samplerate, info.frames
    digest = hashlib.sha256(data).hexdigest()
    return replace(item, path=f"{item.path}{suffix}", sample_rate_hz=rate, frames=frames, audio_sha256=digest)


def _make_item(base: Item, rule: Rule, folder: Path, path: str, data: bytes, codec: str) -> Item | str:
    """Decode, measure and write one recording; a word instead of an item says why it is left out."""
    if rule.kind in ("rir", "hrtf"):
        return _copy_response(base, rule, folder, path, data)
    try:
        samples, rate = audio.decode(path, data)
    except AudioFileError as error:
        log.info("left out: %s", error)
        return "unreadable"
    mono = audio.to_mono(samples)
    if rule.kind in ("speech", "babble"):
        mono = audio.trim_silence(mono, rate)
    longest = rule.excerpt_s or (MAX_SOUND_S if rule.kind == "sound" else 0.0)
    if longest:
        mono = audio.middle(mono, round(longest * rate))
    seconds = len(mono) / rate
    if seconds < (MIN_SPEECH_S if rule.kind in ("speech", "babble") else MIN_SOUND_S):
        return "too short"
    if abs(mono).max() < 1e-3:
        return "silent"
    kind, label = rule.kind, rule.label
    if kind == "sound":
        label = label or find_label(path)
        kind = rule.force or ("noise" if is_ambience(label, seconds) else "event")
    out = audio.to_int16(mono, rate)
    target = f"{kind}/{base.package}/{_slug(path)}.{'flac' if codec == 'flac' else 'opus'}"
    _write(folder / target, out, codec)
    return replace(
        base,
        kind=kind,
        path=target,
        frames=len(out),
        label=label,
        caption=CAPTIONS.get(label or ""),
        bandwidth_hz=round(audio.bandwidth_hz(mono, rate)),
        clipped_fraction=round(audio.clipped_fraction(samples), 6),
        noise_floor_db=round(audio.noise_floor_db(mono, rate), 1),
        audio_sha256=hashlib.sha256(out.tobytes()).hexdigest(),
        narrow_band=rate < audio.SAMPLE_RATE_HZ,
    )


def _base_item(package: Package, rule: Rule, groups: Mapping[str, str], path: str, version: str, digest: str) -> Item:
    names = {key: (value or "").lower().lstrip("_") for key, value in groups.items()}
    kind = "event" if rule.kind == "sound" else rule.kind
    return Item(
        id=f"{package.name}:{_slug(path)}",
        kind=kind,
        split=rule.split or package.split,
        path=f"{kind}/{package.name}/{_slug(path)}",
        sample_rate_hz=audio.SAMPLE_RATE_HZ,
        frames=0,
        package=package.name,
        version=version,
        package_sha256=digest,
        source_path=path,
        licence=package.licence,
        speaker=rule.speaker.format(**names) if rule.speaker else None,
        language=rule.language.format(**names) if rule.language else None,
        label=rule.label,
    )


def _thin(items: list[tuple[int, Item]], package: Package, folder: Path) -> list[Item]:
    """Keep at most ``max_minutes`` of each rule, chosen evenly (by a hash); the files of the others are removed."""
    kept: list[Item] = []
    for index, rule in enumerate(package.rules):
        mine = [item for number, item in items if number == index]
        if rule.max_minutes is not None:
            budget, chosen = rule.max_minutes * 60.0, set()
            for item in sorted(mine, key=lambda item: hashlib.sha256(item.id.encode()).digest()):
                if item.seconds <= budget:
                    chosen.add(item.id)
                    budget -= item.seconds
                else:
                    (folder / item.path).unlink(missing_ok=True)
            mine = [item for item in mine if item.id in chosen]
        kept += mine
    return kept


def build_package(
    package: Package, deb: Path, text_deb: Path | None, folder: Path, codec: str, kinds: Collection[str], workers: int
) -> tuple[list[Item], Counter[str]]:
    """Take all recordings of one package into ``folder``; returns the items and how many were left out, and why.

    What an earlier build of the package left there is removed first.
    """
    if package.texts is not None and package.texts not in FORMS:
        raise CorpusError(f"package {package.name!r}: texts {package.texts!r} is not one of {', '.join(sorted(FORMS))}")
    for kind in KINDS:
        shutil.rmtree(folder / kind / package.name, ignore_errors=True)
    version, digest = deb_control(deb).get("Version", package.version), sha256_of(deb)
    texts: dict[str, str] = {}
    if text_deb is not None and package.texts is not None:
        for path, data in deb_members(text_deb, lambda path: is_text(package.texts, path)):
            texts |= read_texts(package.texts, path, data)
    seen: Counter[int] = Counter()
    left_out: Counter[str] = Counter()
    items: list[tuple[int, Item]] = []
    pending: list[tuple[int, Future[Item | str]]] = []

    def collect(down_to: int) -> None:
        while len(pending) > down_to:
            index, future = pending.pop(0)
            result = future.result()
            if isinstance(result, str):
                left_out[result] += 1
            else:
                items.append((index, result))

    with ThreadPoolExecutor(workers) as pool:
        for path, data in _expand(package, deb):
            if package.texts_from is None and package.texts and is_text(package.texts, path):
                texts |= read_texts(package.texts, path, data)
                continue
            found = package.find_rule(path)
            if found is None:
                continue
            index, rule, groups = found
            wanted_kinds = {"noise", "event"} if rule.kind == "sound" else {rule.kind}
            seen[index] += 1
            if not wanted_kinds & set(kinds) or (seen[index] - 1) % rule.every:
                continue
            base = _base_item(package, rule, groups, path, version, digest)
            pending.append((index, pool.submit(_make_item, base, rule, folder, path, data, codec)))
            collect(4 * workers)
        collect(0)
    made = [
        replace(item, text=find_text(package.texts, texts, item.source_path)) for item in _thin(items, package, folder)
    ]
    return [item for item in made if item.kind in kinds], left_out
