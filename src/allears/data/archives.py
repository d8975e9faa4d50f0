"""Read Debian packages and the containers inside them, member by member, without unpacking and without other programs.

A ``.deb`` is an ``ar`` archive of ``control.tar.*`` and ``data.tar.*`` (deb(5)). Sealed material is refused here, at
the
lowest place: a sealed package raises, and a sealed member is passed over without being read.
"""

import io
import lzma
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import IO

from allears.core.errors import CorpusError

SEALED_PACKAGES = re.compile(
    r"(torcs-data.*|ufoai-sound|unknown-horizons|searchandrescue-data|(python3-)?moonshine-voice"
    r"|pocketsphinx-testdata|codec2-examples|asterisk-prompt-.+)"
)
"""Packages kept for the final examination. The project never opens them."""

SEALED_MEMBERS = re.compile(
    r"(^|/)tuxpaint/stamps/.*_(el|fr)(_[A-Z]{2})?(\.\w+)+$|(^|/)street2\b[^/]*$|(^|/)impulse_big_hall\b[^/]*$"
)
"""Files kept for the final examination inside packages that may be opened."""

Wanted = Callable[[str], bool]


def refuse_sealed(package: str) -> None:
    """Raise :class:`CorpusError` if ``package`` is one that the project must never open."""
    if SEALED_PACKAGES.fullmatch(package):
        raise CorpusError(f"package {package!r} is sealed: it is kept for the final examination and is never opened")


def _ar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each member of an ``ar`` archive."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise CorpusError(f"{path}: not a Debian package (no ar signature); delete it and download it again")
        while len(header := file.read(60)) == 60:
            if header[58:] != b"`\n":
                raise CorpusError(f"{path}: broken ar header; delete it and download it again")
            name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
            start = file.tell()
            yield name, start, size
            file.seek(start + size + size % 2)


class _Window(io.RawIOBase):
    """A read-only view of ``size`` bytes of an open file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._left = file, size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def, override]
        block = self._file.read(min(len(buffer), self._left))
        self._left -= len(block)
        buffer[: len(block)] = block
        return len(block)


def _decompressor(name: str, raw: io.BufferedReader) -> IO[bytes]:
    suffix = name.rpartition(".")[2]
    if suffix == "xz":
        return lzma.open(raw)  # type: ignore[return-value]
    if suffix == "gz":
        import gzip

        return gzip.open(raw)  # type: ignore[return-value]
    if suffix == "tar":
        return raw
    if suffix == "zst":
        try:
            zstandard = import_module("zstandard")
        except ImportError as error:
            raise CorpusError(f"{name}: packed with zstd; reading it needs: pip install zstandard") from error
        return zstandard.ZstdDecompressor().stream_reader(raw)
    raise CorpusError(f"{name}: unknown compression {suffix!r}; xz, gz, zst and none are known")


@contextmanager
def _open_tar(path: Path, which: str) -> Iterator[tarfile.TarFile]:
    """The tar ``which`` (``"control.tar"`` or ``"data.tar"``) of a package, to be read in order."""
    found = [entry for entry in _ar_members(path) if entry[0].startswith(which)]
    if not found:
        raise CorpusError(f"{path}: holds no {which}*; delete it and download it again")
    name, start, size = found[0]
    with path.open("rb") as file:
        stream = _decompressor(name, io.BufferedReader(_Window(file, start, size), 1 << 20))
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                yield tar
        except (lzma.LZMAError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise CorpusError(f"{path}: {name} is damaged ({error}); delete it and download it again") from error


def _tar_files(path: Path, which: str, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with _open_tar(path, which) as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isreg() and not SEALED_MEMBERS.search(name) and wanted(name):
                yield name, tar.extractfile(member).read()  # type: ignore[union-attr]


def deb_control(path: Path) -> dict[str, str]:
    """The fields of the package's control file (``Package``, ``Version``, ...).

    Raises:
        CorpusError: the file is damaged or is not a Debian package.
    """
    for _, text in _tar_files(path, "control.tar", lambda name: name == "control"):
        pairs = (line.split(":", 1) for line in text.decode("utf-8", "replace").splitlines() if ":" in line)
        return {key: value.strip() for key, value in pairs if not key.startswith(" ")}
    raise CorpusError(f"{path}: holds no control file; delete it and download it again")


def deb_members(path: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Name (without leading ``./``) and bytes of each regular file that ``wanted`` asks for, in package order.

    Sealed members are never read. Raises :class:`CorpusError` for a damaged or a sealed package, whatever its file
    name.
    """
    refuse_sealed(path.name.partition("_")[0])
    refuse_sealed(deb_control(path).get("Package", ""))
    return _tar_files(path, "data.tar", wanted)


def unpack_deb(path: Path, root: Path) -> None:
    """Put all files of a package under ``root``, as its installation would under ``/``, but run nothing of it.

    Links that lead out of ``root`` are refused; those to an absolute path lead to its place under ``root``. Sealed
    members are left out.

    Raises:
        CorpusError: the package is sealed or damaged, or has members that lie outside ``root``.
    """
    refuse_sealed(path.name.partition("_")[0])
    refuse_sealed(deb_control(path).get("Package", ""))
    root.mkdir(parents=True, exist_ok=True)
    with _open_tar(path, "data.tar") as tar:
        for member in tar:
            if SEALED_MEMBERS.search(member.name.removeprefix("./")):
                continue
            if member.issym() and member.linkname.startswith("/"):
                up = "../" * (len(PurePosixPath(member.name).parts) - 1)
                member = member.replace(linkname=up + member.linkname.lstrip("/"), deep=False)
            tar.extract(member, root, filter="data")


def zip_members(data: bytes, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Members of a zip (``.pk3``, ``.wz``)."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if not info.is_dir() and not SEALED_MEMBERS.search(info.filename) and wanted(info.filename):
                yield info.filename, archive.read(info)


def queen_members(data: bytes, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Members of ``queen.1c``: a count at byte 13, then 21-byte entries of name, bundle, offset and size."""
    if data[:4] != b"QTBL":
        raise CorpusError("queen.1c: no QTBL signature")
    (count,) = struct.unpack_from(">H", data, 13)
    for index in range(count):
        name, _, offset, size = struct.unpack_from(">12sBII", data, 15 + 21 * index)
        text = name.split(b"\0")[0].decode("latin-1")
        if wanted(text):
            yield text, data[offset : offset + size]


def qt_resource_members(data: bytes, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Members of a Qt binary resource (``.rcc``): a tree of nodes with names and, for files, data (zlib where
    flagged)."""
    if data[:4] != b"qres":
        raise CorpusError("not a Qt resource: no qres signature")
    version, tree, payload, names = struct.unpack_from(">IIII", data, 4)
    node_size = 14 if version == 1 else 22

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        name_offset, flags = struct.unpack_from(">IH", data, tree + node * node_size)
        name = folder
        if node:
            (length,) = struct.unpack_from(">H", data, names + name_offset)
            start = names + name_offset + 6
            name = f"{folder}/{data[start : start + 2 * length].decode('utf-16-be')}".lstrip("/")
        if flags & 2:
            count, first = struct.unpack_from(">II", data, tree + node * node_size + 6)
            for child in range(first, first + count):
                yield from walk(child, name)
        elif not SEALED_MEMBERS.search(name) and wanted(name):
            (offset,) = struct.unpack_from(">I", data, tree + node * node_size + 10)
            (size,) = struct.unpack_from(">I", data, payload + offset)
            body = data[payload + offset + 4 : payload + offset + 4 + size]
            if flags & 1:
                body = zlib.decompress(body[4:])
            elif flags & 4:
                return  # zstd inside Qt resources: no audio of the table is stored so
            yield name, body

    return walk(0, "")


CONTAINERS: dict[str, Callable[[bytes, Wanted], Iterator[tuple[str, bytes]]]] = {
    ".pk3": zip_members,
    ".wz": zip_members,
    ".rcc": qt_resource_members,
    ".1c": queen_members,
}
"""File suffix to the reader of that container."""
