"""Frozen dataclasses to JSON and back, strictly: an unknown or missing key is an error that names it."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass (nested ones too) as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _build(annotation: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(annotation)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return from_dict(annotation, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return _build(options[0], value, where) if len(options) == 1 else value
    if origin is tuple:
        inner = typing.get_args(annotation)
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_build(inner[0], item, where) for item in value)
        return tuple(_build(kind, item, where) for kind, item in zip(inner, value, strict=True))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation in (int, float, str, bool) and type(value) is not annotation:
        raise ValueError(f"{where}: expected {annotation.__name__}, got {value!r}")
    return value


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """Build the dataclass ``kind`` from JSON types.

    Raises:
        ValueError: a key is unknown, missing or of the wrong type.
    """
    where = where or kind.__name__
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(kind)
    built = {name: _build(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**built)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def overridden(base: T, given: T | Mapping[str, Any] | None, where: str) -> T:
    """``given``; ``base`` where that is ``None``; or ``base`` with the fields that the mapping ``given`` names.

    Raises:
        ValueError: a key is unknown or of the wrong type.
    """
    if isinstance(given, Mapping):
        return from_dict(type(base), {**to_dict(base), **given}, where)
    return base if given is None else given


def to_json(config: Any) -> str:
    return json.dumps(to_dict(config), indent=2)


def from_json(kind: type[T], text: str) -> T:
    return from_dict(kind, json.loads(text))
