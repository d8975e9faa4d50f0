"""Exchange parts of a model so that every exchange can be taken back, in the reverse order."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "_allears_turbo"


class Ledger:
    """The changes made to an object, each with the call that takes it back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.final = ""

    def __len__(self) -> int:
        return len(self._undo)

    def note(self, undo: Callable[[], object]) -> None:
        """Remember how to take back what was just done."""
        self._undo.append(undo)

    def exchange(self, root: nn.Module, name: str, new: nn.Module) -> None:
        """Put ``new`` in the place of the submodule ``name`` of ``root``."""
        parent, _, leaf = name.rpartition(".")
        holder = root.get_submodule(parent)
        before = holder._modules[leaf]
        setattr(holder, leaf, new)
        self.note(lambda: setattr(holder, leaf, before))

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; taking it back deletes one that the object itself did not have."""
        had, before = name in vars(owner), getattr(owner, name, None)
        setattr(owner, name, value)
        self.note(lambda: setattr(owner, name, before) if had else delattr(owner, name))

    def add_module(self, owner: nn.Module, name: str, module: nn.Module) -> None:
        """Add a submodule; taking it back deletes it."""
        owner.add_module(name, module)
        self.note(lambda: delattr(owner, name))

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Move the data of parameters or buffers to the CPU until they are taken back; their values do not change."""
        for tensor in tensors:
            place = tensor.device
            if place.type not in ("cpu", "meta"):
                tensor.data = tensor.data.to("cpu")
                self.note(lambda tensor=tensor, place=place: setattr(tensor, "data", tensor.data.to(place)))

    def drop(self, tensors: Iterable[Tensor], why: str) -> None:
        """Free the data of parameters; nothing can be taken back from then on."""
        self.final = why
        for tensor in tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def undo(self) -> None:
        """Take all changes back, the last one first. A second call does nothing.

        Raises:
            ValueError: a change was final.
        """
        if self.final:
            raise ValueError(f"restore: {self.final}")
        while self._undo:
            self._undo.pop()()


def attach(owner: Any, ledger: Ledger) -> None:
    """Tie a ledger to the object that it is of.

    Raises:
        ValueError: there is one already.
    """
    if ledger_of(owner) is not None:
        raise ValueError(
            f"{type(owner).__name__}: accelerated already; call turbo.restore, or give all changes in one TurboSpec"
        )
    vars(owner)[_MARK] = ledger


def ledger_of(owner: Any) -> Ledger | None:
    """The ledger that is tied to an object."""
    return vars(owner).get(_MARK)


def detach(owner: Any) -> None:
    """Untie it."""
    vars(owner).pop(_MARK, None)
