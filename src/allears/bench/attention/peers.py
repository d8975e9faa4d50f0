"""Importing other attention packages: from the environment, or from folders made with ``pip install --target``.

Two versions of one package can be loaded in one process: each is imported with its folder first on the path, and then
taken out of ``sys.modules`` again. Its functions go on working, since they hold their modules themselves.
"""

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


def _take_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}
