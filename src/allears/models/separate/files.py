"""The files of the talkers: all of them whole and under their names, or none.

Shapes: J talkers (outputs of the network), n samples.
"""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from allears.audio.formats import AudioInfo, matching_subtype
from allears.audio.naming import is_talker_file, talker_file
from allears.audio.writer import AudioWriter
from allears.core.errors import AudioFileError


class TalkerFiles:
    """Writes J mono files, of which some get a name in the end: NAME-talker-1.wav and so on.

    Until :meth:`put` they lie in a hidden folder, which is gone after the ``with``, whatever happened.

    Args:
        folder: where they go; made if it is missing.
        name: NAME.
        src: the recording; it is never replaced.
        info: its header; the files get its rate and, where WAV allows, its sample format.
        outputs: J.

    Raises:
        ValueError: the name is no file name.
        AudioFileError: the files cannot be written there.
    """

    def __init__(self, folder: Path, name: str, src: Path, info: AudioInfo, outputs: int) -> None:
        if not name or Path(name).name != name:
            raise ValueError(f"name: {name!r} given; the begin of a file name, without a folder, is wanted")
        self._folder, self._name, self._stack = folder, name, ExitStack()
        with self._stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    os.stat(folder / talker_file(name, outputs))  # a name may be too long
                hidden = tempfile.TemporaryDirectory(prefix=f".{name[:40]}.", suffix=".part", dir=folder)
            except OSError as error:
                raise AudioFileError(f"{folder}: cannot write here: {error.strerror}") from error
            self._hidden = Path(self._stack.enter_context(hidden))
            for taken in self._earlier():
                if taken.is_dir():
                    raise AudioFileError(f"{taken}: is a folder; a talker's file should go there")
                if taken.exists() and os.path.samefile(taken, src):
                    raise AudioFileError(f"{taken}: is the recording itself; choose another folder or name")
            subtype = matching_subtype(info, ".wav")
            self._writers = [
                self._stack.enter_context(AudioWriter(self._part(j), info.sample_rate_hz, 1, subtype, info.frames))
                for j in range(outputs)
            ]
            self._stack = self._stack.pop_all()

    @property
    def frames(self) -> int:
        """Samples written to each file so far."""
        return self._writers[0].frames

    def write(self, y: np.ndarray) -> None:
        """Append ``y`` (J, n)."""
        for writer, row in zip(self._writers, y, strict=True):
            writer.write(row[None])

    def put(self, order: Sequence[int]) -> tuple[Path, ...]:
        """Finish the files, and give those of ``order`` their names, in that order; none of an earlier run stays.

        The first file gets its name last: where it stands, the others do.
        """
        files = tuple(self._folder / talker_file(self._name, number) for number in range(1, len(order) + 1))
        for writer in self._writers:
            writer.close()
        try:
            for path in sorted(self._earlier()):
                if path == files[0] or path not in files:
                    path.unlink()
            for index, path in reversed(list(zip(order, files, strict=True))):
                os.replace(self._part(index), path)
        except OSError as error:
            raise AudioFileError(f"{error.filename or self._folder}: cannot be written: {error.strerror}") from error
        return files

    def __enter__(self) -> "TalkerFiles":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self._writers:
            writer.abort()
        self._stack.close()

    def _part(self, index: int) -> Path:
        return self._hidden / f"{index}.wav"

    def _earlier(self) -> list[Path]:
        """Files that a run on NAME wrote."""
        return [path for path in self._folder.iterdir() if is_talker_file(self._name, path.name)]
