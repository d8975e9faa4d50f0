"""Which files a verb reads and where each result goes: folders are mirrored, and no input is ever overwritten."""

import glob
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from allears.audio.files import list_audio_files
from allears.audio.formats import CONTAINERS, MEDIA_SUFFIXES
from allears.core.errors import AudioFileError


@dataclass(frozen=True)
class Target:
    """One input file and the file that its result goes to; ``others`` may be written beside it."""

    source: Path
    destination: Path
    others: tuple[Path, ...] = ()


def plan(inputs: Sequence[Path], out: Path, results: Callable[[Path], Sequence[Path]] | None = None) -> list[Target]:
    """Pair every input file with its output file, in a stable order and without duplicates.

    Args:
        inputs: files, folders, or patterns (expanded here where the shell did not).
        out: a file when one input file was given and ``out`` has an audio suffix; otherwise a folder. It mirrors the
            tree below an input folder, or below the fixed part of a pattern; with several input folders each one's
            name comes first. Files that lie in this folder already are earlier results, and no inputs. The suffix
            stays, save that what cannot be written (``.m4a``, no suffix) becomes ``.wav``.
        results: from an input's place below OUT to those of all files that may come out of it, for a verb that writes
            several; the first one is there whenever the input is finished. OUT is a folder then.

    Raises:
        AudioFileError: a path does not exist, or nothing was found in a folder or by a pattern.
        ValueError: no input, two inputs that would share an output, or an output that would overwrite an input.
    """
    if not inputs:
        raise ValueError("inputs: none given; name files, folders or patterns such as 'noisy/*.wav'")
    folders = [path for path in inputs if path.is_dir()]
    found: dict[Path, tuple[Path, Path]] = {}  # resolved file -> the file as named, and its place below OUT
    for given in inputs:
        for file, place in _files(given.expanduser(), several_folders=len(folders) > 1):
            if not _is_earlier_result(file, given, out):
                found.setdefault(file.resolve(), (file, place))
    if not found:
        raise AudioFileError(f"inputs: every audio file in {str(inputs[0])!r} lies in the output folder {str(out)!r}")
    targets = _pair(list(found.values()), out, len(found) == 1 and not folders, results)
    _check(targets)
    return targets


def _files(given: Path, several_folders: bool) -> list[tuple[Path, Path]]:
    """The sound files that one argument names, each with its place below OUT."""
    files = list_audio_files([given])
    if given.is_dir():
        prefix = Path(given.resolve().name) if several_folders else Path()
        return [(file, prefix / file.relative_to(given)) for file in files]
    if given.exists():
        return [(file, Path(file.name)) for file in files]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
    return [(file, Path(*file.parts[len(fixed) :])) for file in files]


def _is_earlier_result(file: Path, given: Path, out: Path) -> bool:
    """Whether ``given`` is a folder or a pattern and ``file`` lies in ``out``, itself inside that folder."""
    if given == file or not out.is_dir():
        return False
    out, folder = out.resolve(), given.resolve() if given.is_dir() else None
    return out != folder and file.resolve().is_relative_to(out)


def _pair(
    found: list[tuple[Path, Path]], out: Path, one_file: bool, results: Callable[[Path], Sequence[Path]] | None
) -> list[Target]:
    if out.suffix.lower() in CONTAINERS.keys() | MEDIA_SUFFIXES and not out.is_dir():
        if results is not None:
            raise ValueError(f"out: {str(out)!r} is named like one file, but several are written; name a folder")
        if not one_file:
            raise ValueError(f"out: {str(out)!r} is one file, but the input is more than one; name a folder")
        return [Target(found[0][0], out)]
    if out.exists() and not out.is_dir():
        hint = ", or a file such as clean.wav" if results is None else ""
        raise ValueError(f"out: {str(out)!r} exists and is no folder; name a folder{hint}")
    if results is not None:
        return [_several(file, [out / name for name in results(place)]) for file, place in found]
    keep = [(file, place if place.suffix.lower() in CONTAINERS else place.with_suffix(".wav")) for file, place in found]
    return [Target(file, out / place) for file, place in keep]


def _several(file: Path, written: Sequence[Path]) -> Target:
    return Target(file, written[0], tuple(written[1:]))


def _check(targets: list[Target]) -> None:
    sources = {target.source.resolve() for target in targets}
    taken: dict[str, Target] = {}
    for target in targets:
        for written in (target.destination, *target.others):
            destination = written.resolve()
            if destination in sources or (destination.exists() and os.path.samefile(destination, target.source)):
                raise ValueError(f"out: {str(written)!r} is an input; outputs never overwrite inputs")
            other = taken.setdefault(os.path.normcase(destination), target)
            if other is not target:
                raise ValueError(
                    f"inputs: {str(other.source)!r} and {str(target.source)!r} would both be written to "
                    f"{str(written)!r}; take two runs, or name their common folder"
                )
