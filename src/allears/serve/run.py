"""Runs the application under uvicorn until it is told to stop, and then lets every session finish."""

import logging
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from allears.core.errors import require
from allears.serve.app import make_app
from allears.serve.hall import Hall

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)


def make_server(
    hall: Hall,
    *,
    drain_s: float = 10.0,
    any_origin: bool = False,
    certificate: str | None = None,
    key: str | None = None,
) -> "uvicorn.Server":
    """A server, to be started by :func:`serve`.

    Args:
        hall: of its sessions.
        drain_s: time that sessions get to finish when it stops.
        any_origin: as of :func:`~allears.serve.app.make_app`.
        certificate, key: files, for https.

    Raises:
        MissingDependencyError: uvicorn, websockets or fastapi is not installed.
    """
    for module in ("uvicorn", "websockets"):
        require(module, "serve", "the server")
    import uvicorn
    from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

    class Protocol(WebSocketsSansIOProtocol):
        """Lets a session cut off a client that takes nothing."""

        def handle_connect(self, event: Any) -> None:
            super().handle_connect(event)
            if hasattr(self, "scope"):
                self.scope["state"]["abort"] = self.transport.abort

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            await hall.drain(drain_s, lambda: self.force_exit)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(hall, any_origin),
        ws=Protocol,
        ws_max_size=hall.limits.message_bytes,
        ws_ping_interval=None,  # idle time tells: a client that is slowed has its pong behind its frames
        ws_per_message_deflate=False,
        limit_concurrency=4 * hall.most + 64,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=5,
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket for :func:`serve`; port 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = socket.create_server((host, port), family=family, backlog=128)
    # asyncio turns off the delay of small packets (Nagle) only where a socket says that it is TCP.
    return socket.socket(plain.family, plain.type, socket.IPPROTO_TCP, fileno=plain.detach())


def serve(server: "uvicorn.Server", listening: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, or until ``server.should_exit`` is set; the sessions finish, and this returns. A
    second SIGINT does not wait for them."""
    with listening, _stopped_in_order():
        server.run([listening])


@contextmanager
def _stopped_in_order() -> Generator[None]:
    """uvicorn raises the signal that stopped it once more at its end: here, that is no error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
