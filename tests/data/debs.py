"""Tiny Debian packages and containers, made by hand."""

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import soundfile as sf


def wav_bytes(audio: np.ndarray, rate_hz: int = 16_000, form: str = "WAV", subtype: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    sf.write(out, audio, rate_hz, format=form, subtype=subtype)
    return out.getvalue()


def tone(seconds: float, hz: float = 440.0, rate_hz: int = 16_000, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def _tar(files: dict[str, bytes | str]) -> bytes:
    """Text instead of bytes is what a symbolic link leads to; what lies in a ``bin`` can be run."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
                continue
            info.size, info.mode = len(data), 0o755 if "/bin/" in name else 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def make_deb(
    folder: Path,
    name: str,
    files: dict[str, bytes | str],
    *,
    version: str = "1.0-1",
    suffix: str = "xz",
    file_name: str = "",
) -> Path:
    """Write NAME_VERSION_all.deb into ``folder``."""
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nDescription: a test\n more: of it\n".encode()
    compress = {"xz": lzma.compress, "gz": gzip.compress, "tar": bytes, "bz2": bytes, "zst": _zstd}[suffix]
    ending = "tar" if suffix == "tar" else f"tar.{suffix}"
    members = {
        "debian-binary": b"2.0\n",
        f"control.{ending}": compress(_tar({"control": control, "md5sums": b"x"})),
        f"data.{ending}": compress(_tar(files)),
    }
    out = bytearray(b"!<arch>\n")
    for member, data in members.items():
        out += (
            f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (file_name or f"{name}_{version}_all.deb")
    path.write_bytes(out)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def make_queen(files: dict[str, bytes]) -> bytes:
    head = b"QTBL" + b"CEM10\0" + b"\0\0\1" + struct.pack(">H", len(files))
    offset = len(head) + 21 * len(files)
    table, body = b"", b""
    for name, data in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, offset + len(body), len(data))
        body += data
    return head + table + body


def make_qt_resource(folder: str, files: dict[str, tuple[bytes, int]], version: int = 2) -> bytes:
    """One folder with files; each is (bytes as stored, flags)."""
    names, payload, nodes = b"", b"", b""

    def add_name(text: str) -> int:
        nonlocal names
        at = len(names)
        names += struct.pack(">HI", len(text), 0) + text.encode("utf-16-be")
        return at

    tail = b"" if version == 1 else b"\0" * 8
    nodes += struct.pack(">IHII", 0, 2, 1, 1) + tail
    nodes += struct.pack(">IHII", add_name(folder), 2, len(files), 2) + tail
    for name, (data, flags) in files.items():
        nodes += struct.pack(">IHHHI", add_name(name), flags, 0, 0, len(payload)) + tail
        payload += struct.pack(">I", len(data)) + data
    head = 20
    return (
        b"qres"
        + struct.pack(">IIII", version, head + len(payload) + len(names), head, head + len(payload))
        + payload
        + names
        + nodes
    )
