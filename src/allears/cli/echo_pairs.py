"""Which reference belongs to which microphone: two files, two folders with the same names, or two patterns."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from allears.audio.files import list_audio_files
from allears.audio.formats import CONTAINERS, MEDIA_SUFFIXES
from allears.cli.targets import Target
from allears.core.errors import AudioFileError


def pair(mic: Path, reference: Path, targets: Sequence[Target]) -> dict[Path, Path]:
    """The reference of every target's source.

    Args:
        mic: what the user named as microphone: a file, a folder or a pattern.
        reference: what the user named as reference. A file goes with every microphone. Two folders pair files of the
            same place and name, suffix apart: ``mic/a/1.wav`` with ``ref/a/1.flac``. Two patterns pair files that put
            the same text in the place of the wildcards: ``rec/1_mic.wav`` with ``rec/1_ref.wav`` for
            ``'rec/*_mic.wav'`` and ``'rec/*_ref.wav'``.
        targets: the microphones' files, and where their outputs go.

    Raises:
        AudioFileError: a reference is missing, or nothing is found.
        ValueError: two files that cannot be told apart, or a file that is an input twice, or an output too.
    """
    mic, reference = mic.expanduser(), reference.expanduser()
    if reference.exists() and not reference.is_dir():
        references = {target.source: reference for target in targets}
    else:
        if mic.is_file():
            raise _unpaired(mic, reference)
        references = _by_name(mic, reference, targets)
    _check(references, targets)
    return references


def _unpaired(mic: Path, reference: Path) -> ValueError:
    if not reference.exists() and not glob.has_magic(str(reference)):
        return AudioFileError(f"{reference}: there is no such file or folder")
    what = "a folder" if reference.is_dir() else "a pattern"
    return ValueError(f"reference: {str(reference)!r} is {what}, but the microphone {str(mic)!r} is one file")


def _by_name(mic: Path, reference: Path, targets: Sequence[Target]) -> dict[Path, Path]:
    found: dict[str, Path] = {}
    for file in list_audio_files([reference]):
        other = found.setdefault(_key(file, reference), file)
        if other != file:
            raise ValueError(f"reference: {str(other)!r} and {str(file)!r} would belong to the same microphone")
    keys = {target.source: _key(target.source, mic) for target in targets}
    alone = [source for source, key in keys.items() if key not in found]
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        raise AudioFileError(
            f"reference: nothing in {str(reference)!r} goes with the microphone {str(alone[0])!r}{more}; two folders "
            "must hold the same names, two patterns the same text in the place of their wildcards"
        )
    return {source: found[key] for source, key in keys.items()}


def _key(file: Path, given: Path) -> str:
    """What is the same in the two files of a pair: the place below a folder, or what stands for the wildcards."""
    if given.is_dir():
        return _bare(file.relative_to(given).as_posix())
    pattern, name = given.as_posix(), file.as_posix()
    first = min(pattern.find(sign) for sign in "*?[" if sign in pattern)
    last = max(pattern.rfind(sign) for sign in "*?]")
    name, tail = name.removeprefix(pattern[:first]), pattern[last + 1 :]
    return name[: -len(tail)] if tail and name.endswith(tail) else _bare(name)


def _bare(name: str) -> str:
    """Without the suffix of a sound file."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in CONTAINERS.keys() | MEDIA_SUFFIXES else name


def _check(references: dict[Path, Path], targets: Sequence[Target]) -> None:
    written = {target.destination.resolve() for target in targets}
    for source, reference in references.items():
        if os.path.samefile(source, reference):
            raise ValueError(
                f"reference: {str(reference)!r} is the microphone's file too; name what the loudspeaker played, or "
                "pass --stereo for one file with both"
            )
        if reference.resolve() in written:
            raise ValueError(f"out: {str(reference)!r} is an input; outputs never overwrite inputs")
