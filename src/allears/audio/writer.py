"""Writing sound files so that a file under its final name is always whole.

Shapes: C channels, n samples; samples are float32 (C, n), full scale is [-1, 1].
"""

import contextlib
import os
import secrets
import weakref
from pathlib import Path

import numpy as np
import soundfile

from allears.audio.formats import BITS, MAX_CHANNELS, OPUS_RATES_HZ, container_for, default_subtype, subtypes
from allears.core.errors import AudioFileError

WAV_LIMIT_BYTES = 2**32 - 2**20  # a RIFF header counts bytes in 32 bits; room is left for the other chunks
_WRITE_FRAMES = 16384  # the Vorbis encoder keeps a whole call on its stack


def _sample_bytes(subtype: str) -> int:
    return 1 if subtype in ("ULAW", "ALAW") else BITS.get(subtype, 16) // 8


def _reason(path: Path, error: BaseException) -> str:
    """Why a write to ``path`` failed. libsndfile says 'System error', so the system is asked by writing again."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    try:
        with open(path, "ab") as file:
            file.write(bytes(65536))
    except OSError as system:
        return system.strerror or str(system)
    return getattr(error, "error_string", None) or str(error)


class AudioWriter:
    """A sound file that appears, whole, under its name when it is closed without an error.

    Until then the samples go to a hidden file beside it. An exception inside ``with``, also an interruption,
    :meth:`abort`, or a failed write removes that file and leaves what stood under the name before.

    Args:
        path: the target; its suffix chooses the container.
        sample_rate_hz: of the samples that will be written.
        channels: C.
        subtype: the sample format; by default 16-bit, or the container's own compression. See ``matching_subtype``.
        expected_frames: how many samples per channel will come, if known: a WAV over 4 GB is written as RF64 then.

    Integer formats are rounded to the nearest step; values outside [-1, 1] are clipped there and kept in float formats.

    Raises:
        AudioFileError: the suffix, rate, channels or subtype cannot be written, the folder is missing or may not be
            written to, or the disk is full. The same while writing and closing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        sample_rate_hz: int,
        channels: int,
        subtype: str | None = None,
        expected_frames: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.sample_rate_hz, self.channels = int(sample_rate_hz), int(channels)
        self.frames = 0
        self._file: soundfile.SoundFile | None = None
        try:
            container = container_for(self.path.suffix)
            self.subtype = subtype or default_subtype(self.path.suffix)
        except ValueError as error:
            raise AudioFileError(f"{self.path}: {error}") from error
        self._frame_bytes = self.channels * _sample_bytes(self.subtype)
        if container == "WAV" and expected_frames and expected_frames * self._frame_bytes > WAV_LIMIT_BYTES:
            container = "RF64"
        self.container = container
        self._check()
        # A link's target is replaced, not the link.
        self._target = Path(os.path.realpath(self.path))
        self._temporary = self._target.with_name(f".{self._target.name[:40]}.{secrets.token_hex(6)}.part")
        try:
            os.close(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except OSError as error:
            raise AudioFileError(f"{self.path}: cannot write here: {error.strerror}") from error
        self._remove = weakref.finalize(self, self._temporary.unlink, missing_ok=True)
        try:
            self._file = soundfile.SoundFile(
                str(self._temporary), "w", self.sample_rate_hz, self.channels, self.subtype, format=container
            )
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            reason = _reason(self._temporary, error)
            self._remove()
            raise AudioFileError(
                f"{self.path}: cannot write {self.channels} channels at {self.sample_rate_hz} Hz as "
                f"{container}/{self.subtype} ({reason})"
            ) from error
        except BaseException:
            self._remove()
            raise

    def _check(self) -> None:
        folder = self.path.parent
        if self.path.is_dir():
            raise AudioFileError(f"{self.path}: is a folder; name a file in it")
        if self.path.exists() and not self.path.is_file():
            raise AudioFileError(f"{self.path}: exists and is no regular file")
        if not folder.is_dir():
            raise AudioFileError(f"{self.path}: the folder {folder} does not exist; make it first")
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise AudioFileError(f"{self.path}: cannot write here: the file is write-protected")
        if self.subtype not in (known := subtypes(self.container)):
            raise AudioFileError(
                f"{self.path}: {self.container} takes no subtype {self.subtype!r}; use one of {', '.join(known)}"
            )
        most = MAX_CHANNELS.get(self.container, 255)
        if not 1 <= self.channels <= most:
            raise AudioFileError(
                f"{self.path}: {self.container} holds 1 to {most} channels, not {self.channels}; use .wav"
            )
        if self.sample_rate_hz < 1:
            raise AudioFileError(f"{self.path}: sample_rate_hz is {self.sample_rate_hz}, wanted 1 or more")
        if self.subtype == "OPUS" and self.sample_rate_hz not in OPUS_RATES_HZ:
            rates = ", ".join(map(str, OPUS_RATES_HZ))
            raise AudioFileError(
                f"{self.path}: Opus holds only {rates} Hz, not {self.sample_rate_hz}; use .ogg (Vorbis) or .flac"
            )

    def write(self, x: np.ndarray) -> None:
        """Append ``x`` (C, n), n >= 0.

        Raises:
            ValueError: the shape is wrong, a sample is NaN or infinite, or the writer is closed.
            AudioFileError: the disk is full or cannot be written.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: this writer is closed")
        x = np.asarray(x)
        if x.ndim != 2 or x.shape[0] != self.channels:
            raise ValueError(f"x: got shape {x.shape}, wanted (C, n) with C = {self.channels}")
        if not np.isfinite(x).all():
            raise ValueError(f"x: holds NaN or infinite samples; nothing of this block was written to {self.path}")
        if self.container == "WAV" and (self.frames + x.shape[1]) * self._frame_bytes > WAV_LIMIT_BYTES:
            self.abort()
            raise AudioFileError(
                f"{self.path}: a WAV file ends at 4 GB; pass expected_frames (it is written as RF64 then), or use .w64"
            )
        try:
            for start in range(0, x.shape[1], _WRITE_FRAMES):
                self._file.write(self._encoded(x[:, start : start + _WRITE_FRAMES]))
        except (soundfile.SoundFileError, OSError, AssertionError) as error:
            self._fail(error)
        self.frames += x.shape[1]

    def _encoded(self, x: np.ndarray) -> np.ndarray:
        """(n, C) as libsndfile takes it. Integers are rounded here: libsndfile would round towards minus infinity."""
        if not self.subtype.startswith("PCM_"):
            return np.ascontiguousarray(x.T, dtype=np.float64 if self.subtype == "DOUBLE" else np.float32)
        bits = BITS[self.subtype]
        full = 2.0 ** (bits - 1)
        steps = np.clip(np.rint(x.T.astype(np.float64) * full), -full, full - 1)
        return np.ascontiguousarray(steps.astype(np.int64) << (32 - bits), dtype=np.int32)

    def close(self) -> None:
        """Finish the file and give it its name. A second call does nothing."""
        if self._file is None:
            return
        if self.frames == 0:
            self.abort()
            raise AudioFileError(f"{self.path}: no samples were written")
        try:
            self._file.close()
            self._file = None
            # A short write while closing is not always reported, so the file is looked at as a reader would.
            found = soundfile.info(str(self._temporary)).frames
            if found != self.frames:
                raise OSError(None, f"{found} of {self.frames} frames arrived")
            os.replace(self._temporary, self._target)
        except (soundfile.SoundFileError, OSError) as error:
            self._fail(error)
        except BaseException:
            self.abort()
            raise
        self._remove.detach()

    def abort(self) -> None:
        """Drop what was written. The name keeps what it had before. Does nothing on a closed writer."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(soundfile.SoundFileError, OSError):
                file.close()
        self._remove()

    def _fail(self, error: BaseException) -> None:
        reason = _reason(self._temporary, error)
        self.abort()
        raise AudioFileError(f"{self.path}: cannot be written: {reason}") from error

    def __enter__(self) -> "AudioWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def write(path: str | os.PathLike[str], x: np.ndarray, sample_rate_hz: int, subtype: str | None = None) -> None:
    """Write ``x`` (C, T) as a whole file; see :class:`AudioWriter`."""
    with AudioWriter(path, sample_rate_hz, len(x), subtype, expected_frames=x.shape[-1]) as writer:
        writer.write(x)
