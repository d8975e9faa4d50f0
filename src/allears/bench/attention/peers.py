"""Importing other attention packages: from the environment, or from folders made with ``pip install --target``.

Two versions of one package can be loaded in one process: each is imported with its folder first on the path, and then
taken out of ``sys.modules`` again. Its functions go on working, since they hold their modules themselves.
"""

import hashlib
import importlib
import site
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType


class UnavailableError(Exception):
    """A system cannot run here; the message says why."""


def add_folders(folders: Sequence[Path]) -> None:
    """Put folders on the import path, their ``.pth`` files included.

    Raises:
        ValueError: one is no folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"peer_folders: {str(folder)!r} is no folder; make it with pip install --target FOLDER")
        site.addsitedir(str(folder))


def find(package: str, major: str, folders: Sequence[Path] = ()) -> tuple[str, str]:
    """Version and place of ``package`` whose version begins with ``major``: folders first, then the environment.

    Raises:
        UnavailableError: there is none.
    """
    seen = []
    for place in (*map(str, folders), *sys.path):
        for found in metadata.distributions(name=package, path=[place]):
            if found.version.split(".")[0] == major:
                return found.version, place
            seen.append(found.version)
    other = f" (found {', '.join(dict.fromkeys(seen))})" if seen else ""
    raise UnavailableError(f"{package} {major}.x is not installed{other}")


def load(package: str, major: str, folders: Sequence[Path] = ()) -> tuple[ModuleType, str]:
    """The package of that major version as a module of its own, and its version.

    Raises:
        UnavailableError: it is not installed, or does not import.
    """
    found, place = find(package, major, folders)
    before = _take_out(package)
    sys.path.insert(0, place)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a peer's broken build is a note, not the end of the run
        raise UnavailableError(f"{package} {found} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(place)
        _take_out(package)
        sys.modules.update(before)
    return module, found


def sources(package: ModuleType) -> str:
    """A hash of the names and contents of a package's Python files, where versions do not tell one from another."""
    if package.__file__ is None:
        return "no Python files"
    folder = Path(package.__file__).parent
    digest, files = hashlib.sha256(), sorted(folder.rglob("*.py"))
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return f"{len(files)} Python files of sha256 {digest.hexdigest()[:12]}"


def _take_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}
