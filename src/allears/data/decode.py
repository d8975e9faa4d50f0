"""Bytes of an audio file to samples, and the measurements that the manifest keeps."""

import io
from pathlib import PurePosixPath

import numpy as np
import soundfile as sf
import soxr

from allears.core.errors import AudioFileError, require

SAMPLE_RATE_HZ = 16_000
AUDIO_SUFFIXES = {".wav", ".ogg", ".oga", ".flac", ".mp3", ".opus", ".aiff", ".au", ".g722", ".als", ".sb"}


def decode(name: str, data: bytes) -> tuple[np.ndarray, int]:
    """Samples ``(frames, channels)`` float32 and sample rate in Hz of an audio file in memory; ``name`` tells the
    format.

    ``.g722`` (64 kbit/s) needs PyAV; ``.als`` is raw unsigned 8-bit 11025 Hz with 32 bytes of padding at both ends;
    all else
    goes through libsndfile.

    Raises:
        AudioFileError: the bytes are not such a file.
        MissingDependencyError: PyAV is needed and not installed.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".g722":
        return _decode_g722(name, data)
    if suffix == ".als":
        raw = np.frombuffer(data[32:-32], np.uint8)
        return ((raw.astype(np.float32) - 128.0) / 128.0)[:, None], 11_025
    try:
        audio, rate = sf.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (sf.LibsndfileError, RuntimeError) as error:
        raise AudioFileError(f"{name}: not readable audio ({error})") from error
    if not np.isfinite(audio).all():
        raise AudioFileError(f"{name}: holds NaN or infinite samples")
    return audio, rate


def _decode_g722(name: str, data: bytes) -> tuple[np.ndarray, int]:
    av = require("av", "media", "decoding G.722")
    try:
        with av.open(io.BytesIO(data), format="g722") as container:
            blocks = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    except av.FFmpegError as error:
        raise AudioFileError(f"{name}: not G.722 ({error})") from error
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.int16)
    return (samples.astype(np.float32) / 32768.0)[:, None], 16_000


def to_mono(audio: np.ndarray) -> np.ndarray:
    """``(frames, channels)`` to ``(frames,)``: the first channel if all are the same, else their mean."""
    first = audio[:, 0]
    if audio.shape[1] == 1 or not (audio[:, 1:] != first[:, None]).any():
        return first
    return audio.mean(axis=1, dtype=np.float32)


def trim_silence(mono: np.ndarray, rate_hz: int, level: float = 1e-4, margin_ms: float = 20.0) -> np.ndarray:
    """Cut digital silence (``|x| <= level``) at both ends, leaving ``margin_ms``."""
    loud = np.flatnonzero(np.abs(mono) > level)
    if not len(loud):
        return mono[:0]
    margin = round(rate_hz * margin_ms / 1000)
    return mono[max(0, int(loud[0]) - margin) : int(loud[-1]) + 1 + margin]


def middle(mono: np.ndarray, frames: int) -> np.ndarray:
    """The middle ``frames`` samples, or all if there are fewer."""
    start = max(0, (len(mono) - frames) // 2)
    return mono[start : start + frames]


def bandwidth_hz(mono: np.ndarray, rate_hz: int, drop_db: float = 50.0) -> float:
    """Highest frequency at which the long-term power spectrum (Hann, 2048) is within ``drop_db`` of its peak."""
    size = 2048
    padded = np.pad(mono, (0, max(0, size - len(mono))))
    starts = np.arange(0, len(padded) - size + 1, size // 2)
    if len(starts) > 400:
        starts = starts[np.linspace(0, len(starts) - 1, 400).astype(int)]
    frames = padded[starts[:, None] + np.arange(size)] * np.hanning(size).astype(np.float32)
    power = (np.abs(np.fft.rfft(frames, axis=1)) ** 2).mean(axis=0)
    power[:2] = 0.0
    power = np.convolve(power, np.ones(5) / 5, mode="same")
    peak = power.max()
    if peak <= 0:
        return 0.0
    return float(np.flatnonzero(power > peak * 10 ** (-drop_db / 10))[-1] * rate_hz / size)


def noise_floor_db(mono: np.ndarray, rate_hz: int) -> float:
    """5th percentile of the level of 20 ms frames, dB of full scale, at least -120."""
    size = max(1, rate_hz // 50)
    count = max(1, len(mono) // size)
    frames = np.resize(mono, size * count) if len(mono) < size else mono[: size * count]
    power = np.square(frames.reshape(count, size), dtype=np.float64).mean(axis=1)
    return float(10 * np.log10(max(np.percentile(power, 5), 1e-12)))


def clipped_fraction(audio: np.ndarray) -> float:
    """Share of samples at or above 0.999 of full scale."""
    return float((np.abs(audio) >= 0.999).mean()) if audio.size else 0.0


def to_int16(mono: np.ndarray, rate_hz: int) -> np.ndarray:
    """Resample to 16 kHz (soxr VHQ) and round to 16 bit. Peaks above full scale lower the whole recording instead of
    clipping."""
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ, quality="VHQ")
    peak = float(np.abs(mono).max()) if len(mono) else 0.0
    scale = 32767.0 * min(1.0, 0.999 / peak if peak > 0.999 else 1.0)
    return np.round(mono * scale).astype(np.int16)
