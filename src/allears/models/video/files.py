"""Frames to files: MP4 through PyAV (extra [media]), or an animated PNG, which needs no package.

Shapes: T frames, H rows, W columns; frames are uint8 (T, H, W, 3).
"""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from allears.core.errors import require

SUFFIXES = (".mp4", ".png")
_QUALITY = "16"


def check_target(path: str | os.PathLike[str], size_px: int) -> Path:
    """The path, if a video of that width and height can be written to it.

    Raises:
        ValueError: the suffix is unknown, the folder is missing, or the size is odd or out of its range.
        MissingDependencyError: an .mp4 is asked for and PyAV is not installed.
    """
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"out: {str(target)!r} given; wanted a name that ends in .mp4, or in .png for an animated PNG, which every "
            "browser plays"
        )
    if not target.parent.is_dir():
        raise ValueError(f"out: the folder {str(target.parent)!r} does not exist; make it first")
    if not 16 <= size_px <= 2048 or size_px % 2:
        raise ValueError(f"size: {size_px} given; wanted an even number of pixels, 16 to 2048")
    if target.suffix.lower() == ".mp4":
        _av(target)
    return target


def enlarge(frames: np.ndarray, size_px: int) -> np.ndarray:
    """Frames at size_px x size_px, by bicubic interpolation."""
    if frames.shape[1:3] == (size_px, size_px):
        return frames
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    video = F.interpolate(video, (size_px, size_px), mode="bicubic", align_corners=False, antialias=True)
    return video.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def write_video(path: str | os.PathLike[str], frames: np.ndarray, fps: int, size_px: int | None = None) -> None:
    """Write frames under ``path``, whole or not at all; the same frames give the same bytes.

    Args:
        path: its suffix chooses the format: .mp4 (H.264) or .png (animated PNG, without loss).
        frames: uint8 (T, H, W, 3).
        fps: frames a second.
        size_px: width and height in the file, even; ``None`` keeps the frames'.

    Raises:
        ValueError: the frames are of another type or shape, or see :func:`check_target`.
        MissingDependencyError: PyAV is needed and not installed.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames: {frames.dtype} {frames.shape} given; wanted uint8 (T, H, W, 3), T at least 1")
    if size_px is None and frames.shape[1] != frames.shape[2]:
        raise ValueError(f"frames: {frames.shape[1]} x {frames.shape[2]} pixels given; wanted square frames")
    target = check_target(path, size_px or frames.shape[1])
    frames = enlarge(frames, size_px or frames.shape[1])
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    try:
        if target.suffix.lower() == ".mp4":
            _write_mp4(part, frames, fps)
        else:
            part.write_bytes(animated_png(frames, fps))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _av(path: Path):
    return require("av", "media", f"writing {path.name} (or choose a name that ends in .png, which needs no package)")


def _write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    av = _av(path)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": _QUALITY, "preset": "slow"} if codec == "libx264" else {"q:v": "2"}
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # as many threads, as many different files
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def animated_png(frames: np.ndarray, fps: int) -> bytes:
    """Frames uint8 (T, H, W, 3) as an animated PNG that repeats for ever (PNG, third edition, W3C 2025)."""
    count, height, width = frames.shape[:3]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = [
        b"\x89PNG\r\n\x1a\n",
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        chunk(b"acTL", struct.pack(">II", count, 0)),
    ]
    number = 0
    for index, frame in enumerate(frames):
        above = np.concatenate([np.zeros_like(frame[:1]), frame[:-1]])
        rows = np.concatenate([np.full((height, 1), 2, np.uint8), (frame - above).reshape(height, -1)], axis=1)
        data = zlib.compress(rows.tobytes(), 9)  # filter 2: the difference to the row above
        parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, fps, 0, 0)))
        number += 1
        if index == 0:
            parts.append(chunk(b"IDAT", data))
        else:
            parts.append(chunk(b"fdAT", struct.pack(">I", number) + data))
            number += 1
    return b"".join([*parts, chunk(b"IEND", b"")])
