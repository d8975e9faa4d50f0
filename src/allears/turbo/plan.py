"""What was replaced, by what, and why the rest was not: a value that reads as a table."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from allears.turbo.memory import MemoryEstimate

Kind = Literal["attention", "linear", "norms", "steps", "graphs"]
KINDS: tuple[Kind, ...] = ("attention", "linear", "norms", "steps", "graphs")


@dataclass(frozen=True)
class Item:
    """One layer.

    Args:
        part: of the pipeline: ``"transformer"``, ``"transformer_2"``, or ``""`` of a model given alone.
        name: of the layer in the part.
        kind: which of the changes.
        before: what stood there.
        after: what stands there now; ``None``: it stays, and ``reason`` says why.
        reason: why it stays, or what should be known about the change.
    """

    part: str
    name: str
    kind: Kind
    before: str
    after: str | None
    reason: str = ""


@dataclass(frozen=True)
class LayerError:
    """What a replacement adds, on the input that its layer has with the kinds of change before it in place.

    Args:
        part, name, kind: as in :class:`Item`; the name is empty for the whole model, with this kind of change and those
            before it, against the model as it was.
        error: relative L2 error of the output.
    """

    part: str
    name: str
    kind: Kind
    error: float


@dataclass(frozen=True)
class Plan:
    """What :func:`allears.turbo.accelerate` did.

    Args:
        title: the pipeline or model, and its size.
        items: every layer that was looked at.
        errors: of the replacements; empty where no inputs were given.
        memory: estimated peak; ``None`` where no size of video was given.
        notes: what else should be known.
        call: arguments that the pipeline must be called with from now on.
    """

    title: str
    items: tuple[Item, ...]
    errors: tuple[LayerError, ...] = ()
    memory: MemoryEstimate | None = None
    notes: tuple[str, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)

    def replaced(self, kind: Kind | None = None) -> list[Item]:
        """Items that were replaced, of one kind or of all."""
        return [item for item in self.items if item.after is not None and kind in (None, item.kind)]

    def worst(self, kind: Kind) -> LayerError | None:
        """The layer with the largest error among those of ``kind``."""
        found = [error for error in self.errors if error.kind == kind and error.name]
        return max(found, key=lambda error: error.error, default=None)

    def __str__(self) -> str:
        lines = [self.title]
        for kind in KINDS:
            items = [item for item in self.items if item.kind == kind]
            if items:
                lines += [
                    f"{kind}: {sum(i.after is not None for i in items)} of {len(items)} replaced",
                    *_grouped(items),
                ]
            lines += self._errors_of(kind)
        if self.memory is not None:
            lines.append(f"memory: {self.memory}")
        if self.call:
            lines.append("call: pipe(..., " + ", ".join(f"{name}={value!r}" for name, value in self.call.items()) + ")")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _errors_of(self, kind: Kind) -> list[str]:
        whole = [error for error in self.errors if error.kind == kind and not error.name]
        layers = [error.error for error in self.errors if error.kind == kind and error.name]
        lines = []
        if layers:
            worst = self.worst(kind)
            assert worst is not None
            middle = sorted(layers)[len(layers) // 2]
            lines.append(f"  error a layer: median {middle:.2%}, largest {worst.error:.2%} ({_full(worst)})")
        for error in whole:
            lines.append(f"  error of the whole {error.part or 'model'} with all so far: {error.error:.2%}")
        return lines


def _full(named: Item | LayerError) -> str:
    return f"{named.part}.{named.name}" if named.part else named.name


def _grouped(items: Iterable[Item]) -> list[str]:
    """A line for all layers that differ in their numbers alone."""
    groups: dict[tuple[str, str, str | None, str], int] = {}
    for item in items:
        key = (re.sub(r"\b\d+\b", "*", _full(item), count=1), item.before, item.after, item.reason)
        groups[key] = groups.get(key, 0) + 1
    lines = []
    for (name, before, after, reason), count in groups.items():
        what = f"{before} stays" if after is None else f"{before} -> {after}"
        lines.append(f"  {name} ({count}): {what}" + (f" ({reason})" if reason else ""))
    return lines
