"""Drawing the next step's examples while this one's are trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
