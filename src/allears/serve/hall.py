"""All sessions of a server: who may come in, who has to go, and how everybody leaves when it stops."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from allears.serve.engines import Engine, hops_per_s
from allears.serve.limits import Limits
from allears.serve.metrics import Metrics
from allears.serve.protocol import Code, Refusal

if TYPE_CHECKING:
    from allears.serve.connection import Connection

logger = logging.getLogger(__name__)
T = TypeVar("T")

SHARE = 0.6
"""Of what the cores can do: the network, the rates' conversion and the rest of the machine take the other part."""

_WATCH_S = 0.25


def fitting(engine: Engine, share: float = SHARE, seconds: float = 1.0) -> int:
    """Sessions that this machine keeps up with, at least 1, measured."""
    return max(1, math.floor(share * hops_per_s(engine, seconds) * engine.config.hop_s))


class Hall:
    """Where sessions are.

    Args:
        engine: what computes.
        most: sessions at once.
        limits: of each session.
        model: name of the weights.
    """

    def __init__(self, engine: Engine, most: int, limits: Limits | None = None, model: str = "custom") -> None:
        if most < 1:
            raise ValueError(f"most: {most} given; at least 1 session is wanted")
        self.engine, self.most, self.model = engine, most, model
        self.limits = Limits() if limits is None else limits
        self.metrics = Metrics()
        self.stopping = False
        self._inside: set[Connection] = set()
        self._workers = ThreadPoolExecutor(engine.threads, thread_name_prefix="step")
        self._watch: asyncio.Task[None] | None = None

    @property
    def running(self) -> int:
        return len(self._inside)

    def enter(self, connection: "Connection") -> None:
        """Let a session begin.

        Raises:
            Refusal: the server is full, or stopping.
        """
        if self.stopping:
            raise Refusal(Code.STOPPING, "the server is stopping: connect to another, or try again later")
        if self.running >= self.most:
            raise Refusal(Code.FULL, f"all {self.most} places are taken: try again later")
        self._inside.add(connection)

    def leave(self, connection: "Connection") -> None:
        """Its place is free again."""
        self._inside.discard(connection)

    async def compute(self, work: Callable[..., T], *arguments: Any) -> T:
        """Run ``work`` on a worker; a session has one piece of work at a time."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)

    def open(self) -> None:
        """Begin to watch the sessions; on the event loop."""
        self._watch = asyncio.get_running_loop().create_task(self._look())

    async def drain(self, within_s: float = 10.0, hurry: Callable[[], bool] = lambda: False) -> None:
        """Take nobody else, and let everybody finish what waits; who has not gone by then, or when there is a hurry,
        is cut off."""
        self.stopping = True
        refusal = Refusal(Code.STOPPING, "the server is stopping")
        for connection in list(self._inside):
            connection.finish(refusal)
        await self._gone(within_s, hurry)
        for connection in list(self._inside):
            connection.cut(refusal)
        await self._gone(2.0)

    async def close(self) -> None:
        """Stop watching, and let the workers go."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        self._workers.shutdown(wait=True, cancel_futures=True)

    async def _gone(self, within_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        end = time.monotonic() + within_s
        while self._inside and time.monotonic() < end and not hurry():
            await asyncio.sleep(0.02)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            self._check()

    def _check(self) -> None:
        now = time.monotonic()
        for connection in list(self._inside):
            connection.check(now)
