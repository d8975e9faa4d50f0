"""Turning what a user names (files, folders, patterns) into a list of sound files."""

import glob
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from allears.audio.formats import CONTAINERS, MEDIA_SUFFIXES
from allears.audio.media import have_ffmpeg
from allears.core.errors import AudioFileError

log = logging.getLogger(__name__)


def _audio_below(folder: Path) -> list[Path]:
    """Sound files in ``folder`` and below it by suffix, sorted; hidden names are passed over, links not followed."""
    found: list[Path] = []
    unreadable = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in CONTAINERS or (suffix in MEDIA_SUFFIXES and have_ffmpeg()):
                found.append(Path(root, name))
            elif suffix in MEDIA_SUFFIXES:
                unreadable += 1
    if unreadable:
        log.warning("%s: %d media files passed over; pip install 'allears[media]' reads them", folder, unreadable)
    return found


def list_audio_files(paths: Sequence[Path | str]) -> list[Path]:
    """Every sound file named by ``paths``, in that order, each once.

    A file is taken whatever its suffix; a folder gives the sound files in it and below, sorted; a pattern (``*``,
    ``?``, ``[]``, ``**``) gives the sound files and folders that it matches.

    Raises:
        AudioFileError: a path does not exist, a pattern matches nothing, or a folder holds no audio.
    """
    if isinstance(paths, str | Path):
        raise ValueError(f"paths: got the single path {str(paths)!r}, wanted a list of paths")
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = _audio_below(path)
            if not inside:
                raise AudioFileError(f"{path}: no sound file in this folder or below it")
            found |= dict.fromkeys(inside)
        elif path.exists():
            found[path] = None
        elif glob.has_magic(str(given)):
            found |= dict.fromkeys(_matches(str(given)))
        else:
            raise AudioFileError(f"{path}: there is no such file or folder")
    return list(found)


def _matches(pattern: str) -> list[Path]:
    found: list[Path] = []
    for name in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        path = Path(name)
        if path.is_dir():
            found += _audio_below(path)
        elif path.suffix.lower() in CONTAINERS or path.suffix.lower() in MEDIA_SUFFIXES:
            found.append(path)
    if not found:
        raise AudioFileError(f"{pattern}: no sound file matches this pattern")
    return found
