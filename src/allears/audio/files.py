"""Reading sound files of any rate, depth and channel count, whole or in blocks.

Shapes: C channels, T or n samples per channel; samples are float32, full scale is [-1, 1], values outside are kept.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import soundfile

from allears.audio.formats import AudioInfo, matching_subtype
from allears.audio.listing import list_audio_files
from allears.audio.media import MediaSource, have_ffmpeg
from allears.audio.writer import AudioWriter, write
from allears.core.errors import AudioFileError

__all__ = [
    "AudioInfo",
    "AudioReader",
    "AudioWriter",
    "list_audio_files",
    "matching_subtype",
    "probe",
    "read",
    "write",
]

log = logging.getLogger(__name__)

OnNonfinite = Literal["error", "zero"]
_UNKNOWN_FRAMES = 2**62  # libsndfile reports a length near 2**63 where a header does not tell it


class _Source(Protocol):
    info: AudioInfo

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]: ...

    def close(self) -> None: ...


class _SndfileSource:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = soundfile.SoundFile(str(path))
        frames = None if self._file.frames >= _UNKNOWN_FRAMES else self._file.frames
        self.info = AudioInfo(self._file.samplerate, self._file.channels, frames, self._file.subtype, self._file.format)

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]:
        while True:
            try:
                block = self._file.read(block_frames, dtype="float32", always_2d=True)
            except soundfile.SoundFileError as error:
                raise AudioFileError(f"{self.path}: its audio data is damaged ({error})") from error
            if not len(block):
                return
            yield np.ascontiguousarray(block.T)

    def close(self) -> None:
        self._file.close()


def _open(path: Path) -> _Source:
    """The file opened by libsndfile, else by FFmpeg; every way to fail is told as it is."""
    if not path.exists():
        raise AudioFileError(f"{path}: there is no such file")
    if path.is_dir():
        raise AudioFileError(f"{path}: is a folder; name a file, or let list_audio_files find those inside")
    if not os.access(path, os.R_OK):
        raise AudioFileError(f"{path}: no permission to read it")
    if path.is_file() and path.stat().st_size == 0:
        raise AudioFileError(f"{path}: is empty (0 bytes)")
    try:
        source: _Source = _SndfileSource(path)
    except (soundfile.SoundFileError, TypeError, ValueError) as error:  # TypeError: a suffix that means headerless
        if not have_ffmpeg():
            raise AudioFileError(
                f"{path}: holds no audio that libsndfile reads; if it plays elsewhere, pip install 'allears[media]' "
                "reads it through FFmpeg"
            ) from error
        source = MediaSource(path)
    if source.info.frames == 0 and isinstance(source, _SndfileSource):
        source.close()
        raise AudioFileError(f"{path}: holds no samples (0 frames)")
    return source


def probe(path: str | os.PathLike[str]) -> AudioInfo:
    """The header of a sound file.

    Raises:
        AudioFileError: the file is missing, a folder, empty, without samples, without permission, or not audio.
    """
    source = _open(Path(path))
    source.close()
    return source.info


class AudioReader:
    """A sound file as blocks (C, n) of float32, in order, in bounded memory.

    ``with AudioReader(path) as reader: for block in reader: ...``. One reader gives the file once.

    Args:
        path: wav, flac, ogg, opus, mp3, aiff, au, caf, w64, rf64; with the extra ``[media]`` what FFmpeg reads.
        block_frames: n, the samples per channel in a block; the last block may be shorter.
        on_nonfinite: ``error`` refuses NaN and infinite samples, ``zero`` replaces them and logs how many.

    Raises:
        AudioFileError: as :func:`probe`; while iterating, where the data is damaged or not finite.
    """

    def __init__(
        self, path: str | os.PathLike[str], block_frames: int = 65536, on_nonfinite: OnNonfinite = "error"
    ) -> None:
        if block_frames < 1:
            raise ValueError(f"block_frames: got {block_frames}, wanted 1 or more")
        if on_nonfinite not in ("error", "zero"):
            raise ValueError(f"on_nonfinite: got {on_nonfinite!r}, wanted 'error' or 'zero'")
        self.path = Path(path)
        self.block_frames = block_frames
        self.on_nonfinite = on_nonfinite
        self._source = _open(self.path)
        self.info = self._source.info
        self._replaced = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        position = 0
        for block in self._source.blocks(self.block_frames):
            yield self._finite(block, position)
            position += block.shape[1]
        if position == 0:
            raise AudioFileError(f"{self.path}: holds no samples")
        if self._replaced:
            log.warning("%s: %d samples were NaN or infinite and are zero now", self.path, self._replaced)
        expected = self.info.frames
        if expected is not None and position < expected and isinstance(self._source, _SndfileSource):
            log.warning("%s: ends early, after %d of %d frames", self.path, position, expected)

    def _finite(self, block: np.ndarray, position: int) -> np.ndarray:
        good = np.isfinite(block)
        if good.all():
            return block
        bad = int(block.size - np.count_nonzero(good))
        if self.on_nonfinite == "error":
            first = position + int(np.flatnonzero(~good.all(axis=0))[0])
            raise AudioFileError(
                f"{self.path}: sample {first} is NaN or infinite ({bad} such in this block); "
                "repair the file, or read it in Python with on_nonfinite='zero'"
            )
        self._replaced += bad
        return np.where(good, block, np.float32(0))

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str], on_nonfinite: OnNonfinite = "error") -> tuple[np.ndarray, int]:
    """A whole sound file: float32 (C, T) and its sample rate in Hz.

    Raises:
        AudioFileError: as :class:`AudioReader`.
    """
    with AudioReader(path, on_nonfinite=on_nonfinite) as reader:
        blocks = list(reader)
        return (blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)), reader.info.sample_rate_hz
