"""Reading what libsndfile cannot (m4a, mp4, webm ...) through FFmpeg, with the extra ``[media]``."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from allears.audio.formats import AudioInfo
from allears.core.errors import AudioFileError, require

_LOSSLESS_CODECS = {"flac", "alac", "wavpack", "tta", "ape", "truehd", "mlp"}


def have_ffmpeg() -> bool:
    """Whether PyAV is installed. It is not imported."""
    return importlib.util.find_spec("av") is not None


def _subtype(stream: Any) -> str:
    """The sample format in libsndfile's words where the codec is lossless, else the codec's own name."""
    codec = stream.codec_context.name
    if codec.startswith("pcm_") or codec in _LOSSLESS_CODECS:
        if codec.startswith(("pcm_f32", "pcm_f64")):
            return "FLOAT" if "f32" in codec else "DOUBLE"
        if codec in ("pcm_alaw", "pcm_mulaw"):
            return "ALAW" if codec == "pcm_alaw" else "ULAW"
        sample_format = stream.format.name.rstrip("p")
        bits = (
            stream.codec_context.bits_per_coded_sample if hasattr(stream.codec_context, "bits_per_coded_sample") else 0
        )
        if bits == 24 or "24" in codec:
            return "PCM_24"
        return {"u8": "PCM_U8", "s16": "PCM_16", "s32": "PCM_32", "flt": "FLOAT", "dbl": "DOUBLE"}.get(
            sample_format, codec
        )
    return {"vorbis": "VORBIS", "libvorbis": "VORBIS", "opus": "OPUS", "libopus": "OPUS"}.get(codec, codec)


class MediaSource:
    """The first audio stream of a media file, decoded to float32 blocks.

    Raises:
        MissingDependencyError: PyAV is not installed.
        AudioFileError: FFmpeg cannot read the file, or it has no audio.
    """

    def __init__(self, path: Path) -> None:
        self._av = require("av", "media", f"reading {path.name}")
        self.path = path
        try:
            self._container = self._av.open(str(path), metadata_errors="replace")
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise AudioFileError(f"{path}: FFmpeg cannot read it ({error})") from error
        if not self._container.streams.audio:
            self.close()
            raise AudioFileError(f"{path}: holds no audio stream")
        self._stream = self._container.streams.audio[0]
        try:
            self.info = self._read_info()
        except BaseException:
            self.close()
            raise

    def _read_info(self) -> AudioInfo:
        stream, container = self._stream, self._container
        rate, channels = stream.rate, stream.codec_context.channels
        if not rate or not channels:
            raise AudioFileError(f"{self.path}: its audio stream states no sample rate or channels")
        frames = None
        if stream.duration is not None and stream.time_base is not None:
            frames = round(stream.duration * stream.time_base * rate)
        elif container.duration is not None:
            frames = round(container.duration * rate / 1_000_000)
        return AudioInfo(rate, channels, frames, _subtype(stream), container.format.name)

    def blocks(self, block_frames: int) -> Iterator[np.ndarray]:
        """The signal in order as float32 (C, n), n = ``block_frames`` but for the last."""
        waiting: list[np.ndarray] = []
        count = 0
        for part in self._decoded():
            waiting.append(part)
            count += part.shape[1]
            if count >= block_frames:
                joined = np.concatenate(waiting, axis=1)
                whole = count - count % block_frames
                for start in range(0, whole, block_frames):
                    yield joined[:, start : start + block_frames]
                waiting, count = [joined[:, whole:]], count - whole
        if count:
            yield np.concatenate(waiting, axis=1)

    def _decoded(self) -> Iterator[np.ndarray]:
        # The stream's own rate and layout are kept; only the sample format changes, and a mid-stream change is undone.
        to_planar = self._av.AudioResampler(format="fltp", layout=self._stream.layout, rate=self.info.sample_rate_hz)
        try:
            for frame in self._container.decode(self._stream):
                for part in to_planar.resample(frame):
                    yield part.to_ndarray()
            for part in to_planar.resample(None):
                yield part.to_ndarray()
        except (self._av.error.FFmpegError, ValueError) as error:
            raise AudioFileError(f"{self.path}: FFmpeg cannot decode its audio ({error})") from error

    def close(self) -> None:
        self._container.close()
