"""Drawing the next step's examples while this one's are trained on."""

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[int, int]
"""A step, and how many times this step has drawn before."""


class Ahead(Generic[T]):
    """What each step draws; the next step's is drawn in a thread meanwhile. One draws at a time.

    Args:
        draw: what a key stands for, the same for the same key.
    """

    def __init__(self, draw: Callable[[Key], T]) -> None:
        self._draw, self._pool = draw, ThreadPoolExecutor(1)
        self._waiting: tuple[Key, Future[T]] | None = None
        self._last = (-1, 0)

    def take(self, step: int) -> T:
        """The draw of ``step``; a second call for the same step gives another."""
        key = (step, self._last[1] + 1 if step == self._last[0] else 0)
        self._last = key
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            drawn = self._draw(key)
        else:
            drawn = waiting[1].result()  # waited for also where it is of no use
            drawn = drawn if waiting[0] == key else self._draw(key)
        following = (step + 1, 0)
        self._waiting = following, self._pool.submit(self._draw, following)
        return drawn


class AheadInProcesses(Generic[T]):
    """The same drawn by processes, several steps ahead: a draw that is Python's own work takes the interpreter from the
    step that it should hide behind, if it is a thread's.

    Args:
        draw: what a key stands for; a function of a module, or a partial of one, that gives arrays (tensors would be
            shared as open files).
        pool: of processes.
        depth: steps drawn ahead.
    """

    def __init__(self, draw: Callable[[Key], T], pool: Executor, depth: int) -> None:
        self._draw, self._pool, self._depth = draw, pool, depth
        self._waiting: dict[Key, Future[T]] = {}
        self._last = (-1, 0)

    def take(self, step: int) -> T:
        """See :meth:`Ahead.take`."""
        key = (step, self._last[1] + 1 if step == self._last[0] else 0)
        self._last = key
        wanted = [key, *((step + 1 + n, 0) for n in range(self._depth))]
        for old in [old for old in self._waiting if old not in wanted]:
            self._waiting.pop(old).cancel()
        for new in wanted:
            if new not in self._waiting:
                self._waiting[new] = self._pool.submit(self._draw, new)
        return self._waiting.pop(key).result()
