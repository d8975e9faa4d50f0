"""A corpus of synthetic talkers: text-to-speech programs, each voice with sentences of its own. For training alone.

The programs are Debian packages, fetched and unpacked but not installed, or Python packages where they are installed.
What cannot be had is named and left out. A voice that is done is not spoken again.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import soundfile as sf

from allears.core.errors import CorpusError
from allears.core.progress import OnProgress, Progress
from allears.data import decode as audio
from allears.data.archives import deb_control, unpack_deb
from allears.data.corpus import MANIFEST, Item, item_from_dict, item_to_dict, read_manifest, write_manifest
from allears.data.fetch import PACKAGES_DIR, find_package, sha256_of
from allears.data.synthetic_audio import polish
from allears.data.synthetic_engines import ENGINES
from allears.data.synthetic_texts import known_languages, sentences
from allears.data.synthetic_voices import SyntheticVoice, VoiceTable, known_synthetic_voices

log = logging.getLogger(__name__)

_STATE, _STATE_FORM, _ROOT = ".state", 1, ".programs"
_BATCH = 20
_MOST_SAID = 4.0
"""A voice says at most this many times what is wanted; the rest was too long, too short or broken."""
_LEAST_SHARE = 0.5
"""A voice that gives less than this share of what is wanted is left out."""
_PATH_PREFIX = "speech/synthetic-"


@dataclass(frozen=True)
class _Source:
    """Where a voice comes from; ``debs`` are unpacked to run it."""

    package: str
    version: str
    sha256: str
    licence: str
    debs: tuple[Path, ...] = ()


def build_synthetic(
    folder: str | Path,
    packages_dir: str | Path = PACKAGES_DIR,
    *,
    only: Collection[str] | None = None,
    minutes: float = 4.0,
    seed: int = 0,
    allow_other_versions: bool = False,
    on_progress: OnProgress | None = None,
    table: VoiceTable | None = None,
) -> list[Item]:
    """Build the corpus of synthetic voices in ``folder``: kind speech, split train, 16 kHz mono, a speaker a voice.

    Args:
        folder: of its own, not that of another corpus.
        packages_dir: holds the ``.deb`` files; those missing are fetched with ``apt-get download``.
        only: names of voices, all by default.
        minutes: of each voice, in utterances of 2 to 6 s.
        seed: another one gives other sentences.
        allow_other_versions: take packages whose checksum is not the one of the table.

    Raises:
        CorpusError: ``folder`` holds another corpus, a voice is unknown, ``minutes`` is not above 0, or no voice at all
            can be had.
    """
    folder, packages_dir = Path(folder).expanduser(), Path(packages_dir).expanduser()
    table = table or known_synthetic_voices()
    voices = table.choose(only)
    if not 0 < minutes <= 600:
        raise CorpusError(f"minutes={minutes:g}: wanted more than 0, at most 600")
    if (folder / MANIFEST).is_file() and not all(i.path.startswith(_PATH_PREFIX) for i in read_manifest(folder)):
        raise CorpusError(f"{folder}: holds another corpus, which this would replace; name a folder of its own")
    items: list[Item] = []
    for done, voice in enumerate(voices):
        if on_progress:
            on_progress(Progress(done, len(voices), "voices", voice.name))
        try:
            source = _find(voice, table, packages_dir, allow_other_versions)
            items += _voice_items(voice, source, folder, minutes, seed)
        except CorpusError as error:
            log.warning("left out %s: %s", voice.name, error)
    if not items:
        raise CorpusError(f"{folder}: none of the {len(voices)} voices can be had; the warnings say why")
    write_manifest(folder, items)
    shutil.rmtree(folder / _ROOT, ignore_errors=True)
    if on_progress:
        on_progress(Progress(len(voices), len(voices), "voices"))
    return items


def _find(voice: SyntheticVoice, table: VoiceTable, packages_dir: Path, allow_other_versions: bool) -> _Source:
    if voice.engine not in ENGINES:
        raise CorpusError(f"engine {voice.engine!r}: wanted one of {', '.join(ENGINES)}")
    engine = ENGINES[voice.engine]
    installed = engine.installed() if engine.module else None
    debs = []
    for name in dict.fromkeys((*voice.packages, *engine.packages)):
        if name not in table.packages:
            raise CorpusError(f"package {name!r} is not in the table")
        debs.append(find_package(table.packages[name], packages_dir, allow_other_versions))
    if installed:
        return _Source(*installed, voice.licence or "", tuple(debs))
    package = table.packages[(*voice.packages, *engine.packages)[0]]
    version = deb_control(debs[0]).get("Version", package.version)
    return _Source(package.name, version, sha256_of(debs[0]), voice.licence or package.licence, tuple(debs))


def _unpacked(source: _Source, folder: Path) -> Path:
    """The folder that the packages are unpacked to, all of them together."""
    root = folder / _ROOT
    for deb in source.debs:
        stamp = root / ".unpacked" / deb.name
        if not stamp.is_file():
            unpack_deb(deb, root)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
    return root


def _voice_items(voice: SyntheticVoice, source: _Source, folder: Path, minutes: float, seed: int) -> list[Item]:
    """What the voice says, spoken now or by an earlier build.

    Raises:
        CorpusError: its program fails, or too little of it is fit to use.
    """
    state, key = folder / _STATE / f"{voice.name}.json", _key(voice, source, minutes, seed)
    if state.is_file():
        saved = json.loads(state.read_text(encoding="utf-8"))
        if saved["key"] == key:
            return [item_from_dict(row) for row in saved["items"]]
    target = folder / f"{_PATH_PREFIX}{voice.engine}" / voice.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    left_out: Counter[str] = Counter()
    items: list[Item] = []
    wanted_s, used_s = 60.0 * minutes, 0.0
    for item in _speak(voice, source, _unpacked(source, folder), folder, target, seed, wanted_s, left_out):
        items.append(item)
        used_s += item.seconds
        if used_s >= wanted_s:
            break
    log.info("%s: %.1f minutes; left out: %s", voice.name, used_s / 60, dict(left_out) or "none")
    if used_s < _LEAST_SHARE * wanted_s:
        shutil.rmtree(target)
        raise CorpusError(f"only {used_s:.0f} of {wanted_s:.0f} s are fit to use; the others: {dict(left_out)}")
    state.parent.mkdir(parents=True, exist_ok=True)
    part = state.with_name(state.name + ".tmp")
    part.write_text(json.dumps({"key": key, "left_out": left_out, "items": [item_to_dict(item) for item in items]}))
    os.replace(part, state)
    return items


def _speak(
    voice: SyntheticVoice,
    source: _Source,
    root: Path,
    folder: Path,
    target: Path,
    seed: int,
    wanted_s: float,
    left_out: Counter[str],
) -> Iterator[Item]:
    """Utterances that are fit to use, as they are written; ``left_out`` counts the others."""
    texts = sentences(voice.language, f"{seed}/{voice.name}")
    said_s = 0.0
    number = 0
    while said_s < _MOST_SAID * wanted_s and sum(left_out.values()) < _MOST_SAID * (_BATCH + number):
        batch = list(islice(texts, _BATCH))
        for text, spoken in zip(batch, ENGINES[voice.engine].speak(voice, root, batch), strict=True):
            polished = "broken" if spoken is None else polish(*spoken)
            if isinstance(polished, str) or spoken is None:
                left_out[str(polished)] += 1
                said_s += 0.0 if spoken is None else len(spoken[0]) / spoken[1]
                continue
            rate = spoken[1]
            samples = audio.to_int16(polished, rate)
            path = target / f"{number:04d}.flac"
            sf.write(path, samples, audio.SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
            number += 1
            said_s += len(samples) / audio.SAMPLE_RATE_HZ
            yield Item(
                id=f"{source.package}:{voice.name}-{path.stem}",
                kind="speech",
                split="train",
                path=path.relative_to(folder).as_posix(),
                sample_rate_hz=audio.SAMPLE_RATE_HZ,
                frames=len(samples),
                package=source.package,
                version=source.version,
                package_sha256=source.sha256,
                source_path=f"{voice.engine}:{voice.voice}/{path.stem}",
                licence=source.licence,
                speaker=voice.name,
                language=voice.language,
                text=text,
                bandwidth_hz=round(audio.bandwidth_hz(polished, rate)),
                clipped_fraction=round(audio.clipped_fraction(spoken[0]), 6),
                noise_floor_db=round(audio.noise_floor_db(polished, rate), 1),
                audio_sha256=hashlib.sha256(samples.tobytes()).hexdigest(),
                narrow_band=rate < audio.SAMPLE_RATE_HZ,
            )


def _key(voice: SyntheticVoice, source: _Source, minutes: float, seed: int) -> str:
    """What the voice's part of the corpus depends on."""
    parts = {
        "form": _STATE_FORM,
        "voice": asdict(voice),
        "language": asdict(known_languages()[voice.language]),
        "source": asdict(replace(source, debs=())),
        "minutes": minutes,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
