"""Functions whose answer a compiled graph takes as a constant."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_in_graphs(function: F) -> F:
    """Mark ``function`` so that ``torch.compile`` runs it once and keeps its answer.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler: a second and 150 MB a start.
    """
    function._dynamo_marked_constant = True  # type: ignore
    return function
