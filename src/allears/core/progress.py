"""Progress events: long jobs report them, the command line draws them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` (``None`` while unknown) in ``unit``; ``message`` names the thing worked on."""

    done: float
    total: float | None
    unit: str = "s"
    message: str = ""


OnProgress = Callable[[Progress], None]
