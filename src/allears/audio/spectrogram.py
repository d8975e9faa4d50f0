"""Spectrograms as PNG images, with numpy and zlib alone. Axes are left to whoever shows the image."""

import struct
import zlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

# Shape letters: C channels, T samples, F frequency rows, W columns (time), H rows of an image (top first)

WINDOW_S = 0.032
FLOOR_DB = -140.0
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Lightness, chroma and hue (degrees) in OKLCh at evenly spaced levels: lightness rises in a straight line, so that
# equal steps in decibels look equally large, in print and to the colour-blind too.
_LIGHTNESS_CHROMA_HUE = (
    (0.10, 0.035, 285.0),
    (0.27, 0.115, 290.0),
    (0.44, 0.160, 325.0),
    (0.61, 0.185, 15.0),
    (0.78, 0.150, 60.0),
    (0.95, 0.090, 100.0),
)


def spectrogram_db(
    samples: NDArray[np.floating], sample_rate_hz: int, columns: int = 900, max_rows: int = 256
) -> NDArray[np.float32]:
    """Power over time and frequency, in dB relative to a full-scale sine.

    Args:
        samples: (T,) or (C, T), in [-1, 1]; the power of the channels is averaged. NaN and infinity count as 0.
        sample_rate_hz: above 0.
        columns: columns of the result; each averages the power over its share of the time.
        max_rows: upper limit on frequency rows; more STFT bins than this are averaged in groups.

    Returns:
        (F, W): row 0 is 0 Hz and the last row ends at half the sample rate; never below ``FLOOR_DB``.

    Raises:
        ValueError: the samples are empty or not of shape (T,) or (C, T), or a number is not above 0.
    """
    x = as_channels(samples)
    if min(sample_rate_hz, columns, max_rows) < 1:
        raise ValueError("spectrogram_db: sample_rate_hz, columns and max_rows must be above 0")
    size = 1 << max(4, round(np.log2(sample_rate_hz * WINDOW_S)))
    window = np.hanning(size + 1)[:-1]
    length = x.shape[1]
    per_column = max(
        1, int(np.ceil(2 * length / (columns * size)))
    )  # frames a column, so that none of the time is missed
    centres = (np.arange(columns * per_column) + 0.5) * length / (columns * per_column)
    starts = centres.astype(np.int64)
    padded = np.pad(x, ((0, 0), (size // 2, size // 2)))
    bins = size // 2 + 1
    edges = np.unique(np.round(np.linspace(0, bins, min(bins, max_rows) + 1)).astype(np.int64))
    rows = np.empty((len(edges) - 1, columns), dtype=np.float32)
    block = max(1, 4096 // per_column)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        at = starts[first * per_column : last * per_column]
        frames = padded[:, at[:, None] + np.arange(size)] * window
        power = (np.abs(np.fft.rfft(frames, axis=-1)) ** 2).mean(axis=0) * (2.0 / window.sum()) ** 2
        power = power.reshape(last - first, per_column, bins).mean(axis=1)
        rows[:, first:last] = (np.add.reduceat(power, edges[:-1], axis=1) / np.diff(edges)).T
    return np.maximum(10 * np.log10(np.maximum(rows, 1e-30)), np.float32(FLOOR_DB))


def as_channels(samples: NDArray[np.floating]) -> NDArray[np.float64]:
    """(T,) or (C, T) as finite (C, T)."""
    x = np.asarray(samples, dtype=np.float64)
    x = x[None] if x.ndim == 1 else x
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"samples: expected (T,) or (C, T) with at least one sample, got shape {np.shape(samples)}")
    return np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def level_range_db(levels: list[NDArray[np.float32]], span_db: float = 80.0) -> tuple[float, float]:
    """One colour scale for several spectrograms: the loudest level, rounded up to 5 dB, and ``span_db`` below it."""
    top = max((float(np.quantile(level, 0.9995)) for level in levels), default=0.0)
    top = float(np.clip(5 * np.ceil(top / 5), FLOOR_DB + span_db, 20.0))
    return top - span_db, top


def spectrogram_png(levels_db: NDArray[np.floating], low_db: float, high_db: float) -> bytes:
    """(F, W) in dB as a PNG of F rows, high frequencies on top, coloured from ``low_db`` to ``high_db``."""
    if not high_db > low_db:
        raise ValueError(f"high_db: must be above low_db, got {low_db} to {high_db}")
    scaled = (np.asarray(levels_db, dtype=np.float64)[::-1] - low_db) / (high_db - low_db)
    return encode_png(np.round(np.clip(scaled, 0, 1) * 255).astype(np.uint8), colour_map())


@cache
def colour_map() -> NDArray[np.uint8]:
    """256 colours (256, 3) from dark to light, computed in OKLab (B. Ottosson, "A perceptual color space", 2020)."""
    stops = np.array(_LIGHTNESS_CHROMA_HUE)
    stops[:, 2] = np.rad2deg(np.unwrap(np.deg2rad(stops[:, 2])))
    at = np.linspace(0, len(stops) - 1, 256)
    light, chroma, hue = (np.interp(at, np.arange(len(stops)), column) for column in stops.T)
    a, b = chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue))
    cone = np.stack(
        [
            light + 0.3963377774 * a + 0.2158037573 * b,
            light - 0.1055613458 * a - 0.0638541728 * b,
            light - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ cone**3, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    table = np.round(255 * srgb.T).astype(np.uint8)
    table.setflags(write=False)
    return table


def encode_png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """Palette indices (H, W) with their colours (at most 256, 3) as a PNG (ISO/IEC 15948, colour type 3)."""
    if pixels.ndim != 2 or pixels.size == 0 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels: expected uint8 of shape (H, W), got {pixels.dtype} of shape {pixels.shape}")
    if palette.ndim != 2 or palette.shape[1] != 3 or not int(pixels.max()) < len(palette) <= 256:
        raise ValueError(f"palette: expected (at most 256, 3) with a colour for every index, got shape {palette.shape}")
    height, width = pixels.shape
    lines = np.zeros((height, width + 1), dtype=np.uint8)  # column 0 is the filter type of the line: none
    lines[:, 1:] = pixels
    return b"".join(
        [
            _PNG_SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _chunk(b"PLTE", palette.astype(np.uint8).tobytes()),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
