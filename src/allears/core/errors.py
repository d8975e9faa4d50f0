"""Errors that a user can act on. The command line prints each as one line and exits with status 2."""

from importlib import import_module
from types import ModuleType


class AudioFileError(ValueError):
    """A file that should hold audio cannot be read or written."""


class WeightsError(ValueError):
    """A checkpoint is missing, corrupt, or does not fit the model."""


class CorpusError(ValueError):
    """A corpus, package or manifest is missing, incomplete, or not allowed."""


class MissingDependencyError(ImportError):
    """An optional package is needed for what was asked."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional ``module``, or raise :class:`MissingDependencyError` that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        raise MissingDependencyError(
            f"{purpose} needs the package {root!r} ({error}): install it with pip install 'allears[{extra}]'"
        ) from error
