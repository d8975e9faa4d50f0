"""Launches whose preparation would take longer than their work.

Triton's ``kernel[grid](...)`` looks at every argument at every call, for 20 to 60 us; what it compiled is launched in a
tenth of that, if the caller knows that it fits.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """What calls of equal shapes need and may write into, kept from one call to the next. Two threads never hold the
    same one: a call takes one out, or makes it, and gives it back.

    Args:
        most: keys that are kept; with one more all are forgotten.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._idle: dict[Hashable, list[T]] = {}

    def take(self, key: Hashable, make: Callable[[], T]) -> T:
        """One that was given back for this key, else a new one."""
        try:
            return self._idle[key].pop()
        except (KeyError, IndexError):
            return make()

    def give(self, key: Hashable, it: T) -> None:
        """Back, for the next call with this key."""
        idle = self._idle.get(key)
        if idle is not None:
            idle.append(it)
            return
        if len(self._idle) >= self._most:
            self._idle.clear()
        self._idle[key] = [it]


class Known:
    """A Triton kernel with what was compiled of it, by what it was compiled for.

    Of its integers those that may be 1, or a multiple of 16 at one time only, must be in ``do_not_specialize`` or in
    the key that a launch gives.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        key: Hashable = None,
        **how: int,
    ) -> None:
        """Launch on the current stream of the current device, which must be that of the tensors.

        Args:
            arguments: those that are no constants, in the kernel's order.
            constants: the others, in that order.
            key: integers among the arguments that the kernel is specialised for.
            how: warps and stages.
        """
        tensors = tuple([_kind(x) for x in arguments if x is None or isinstance(x, Tensor)])
        known = (tensors, *constants.values(), *how.values(), key)
        compiled = self._compiled.get(known)
        if compiled is not None:
            compiled[grid](*arguments, *constants.values())
            return
        made = self._kernel[grid](*arguments, **constants, **how)
        if made is not None:  # the interpreter compiles nothing
            assert [*self._kernel.arg_names[len(arguments) :]] == [*constants]
            self._compiled[known] = made


def _kind(x: Tensor | None) -> Hashable:
    """What a kernel is compiled for of a pointer: its type, whether it is aligned, and its device."""
    return None if x is None else (x.dtype, x.data_ptr() % 16 == 0, x.device.index)
