"""The pieces that described clips are made of, and JSON-lines files of such descriptions."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from allears.core.config import from_dict

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class Segment:
    """A stretch of a corpus item placed in a clip; positions in samples at 16 kHz.

    ``speed`` resamples the item (1.1 is faster and higher); ``start`` counts in the item, ``at`` and ``length`` in
    the clip.
    """

    item: str
    start: int
    at: int
    length: int
    gain_db: float = 0.0
    speed: float = 1.0


@dataclass(frozen=True)
class Synthetic:
    """Stationary noise made on the spot: white noise with a slope of ``slope_db`` per octave, plus hum at ``hum_hz``
    and its harmonics.
    """

    seed: int
    slope_db: float = -3.0
    hum_hz: float = 0.0
    gain_db: float = 0.0


def lean_dict(value: Any) -> Any:
    """A dataclass as JSON types, like ``core.config.to_dict`` but without fields that have their default."""
    if is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in fields(value))
        return {f.name: lean_dict(x) for f, x in pairs if f.default is MISSING or x != f.default}
    if isinstance(value, list | tuple):
        return [lean_dict(entry) for entry in value]
    return value


def write_lines(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: str | Path, kind: type[Spec]) -> list[Spec]:
    """The values of ``kind`` in a JSON-lines file.

    Raises:
        ValueError: a key is unknown, missing or of the wrong type; the message names file and line.
    """
    lines = Path(path).read_text().splitlines()
    return [from_dict(kind, json.loads(line), f"{path}:{number}") for number, line in enumerate(lines, 1) if line]
