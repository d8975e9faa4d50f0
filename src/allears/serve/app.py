"""The application: streams, the page, health and metrics."""

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from allears import __version__
from allears.core.errors import require
from allears.models.echo.stream import resampling_ms
from allears.models.enhance.chunks import SHIFT_S, WINDOW_S
from allears.serve.connection import Connection, say_goodbye
from allears.serve.hall import Hall
from allears.serve.protocol import Code, Refusal

if TYPE_CHECKING:
    from fastapi import FastAPI, WebSocket

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"

NOT_LIVE = (
    f"enhance hears {WINDOW_S:g} s at a time, both ways, and would answer {WINDOW_S:g} to {WINDOW_S + SHIFT_S:g} s "
    "late: not live. Use allears enhance"
)
"""Why the enhancer is refused: its network looks at a whole window, and a window begins every ``SHIFT_S``."""

_SAFE = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_RATES = "4000 to 384000"


def make_app(hall: Hall, any_origin: bool = False) -> "FastAPI":
    """A FastAPI application around a hall.

    Args:
        hall: opened and closed with the application.
        any_origin: take streams also from pages of other servers.

    Raises:
        MissingDependencyError: fastapi is not installed.
    """
    require("fastapi", "serve", "the server")
    from fastapi import FastAPI, WebSocket
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from fastapi.staticfiles import StaticFiles

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        hall.open()
        try:
            yield
        finally:
            await hall.close()

    app = FastAPI(title="allears", version=__version__, lifespan=life, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def safe(request: Any, call_next: Any) -> Response:
        response = await call_next(request)
        response.headers.update(_SAFE)
        return response

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Whether sessions are taken, and what computes."""
        return JSONResponse(health(hall), status_code=503 if hall.stopping else 200)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """For Prometheus."""
        text = hall.metrics.text(hall.running, hall.most, hall.engine.name)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.websocket("/{path:path}")
    async def stream(socket: WebSocket, path: str) -> None:
        await socket.accept()
        try:
            connection = _admitted(socket, path, hall, any_origin)
            await connection.run()
        except Refusal as refusal:
            hall.metrics.refused[int(refusal.code)] += 1
            await say_goodbye(socket, refusal)

    app.mount("/", StaticFiles(directory=PAGE, html=True), name="page")
    return app


def health(hall: Hall) -> dict[str, Any]:
    """What ``/healthz`` tells."""
    config = hall.engine.config
    return {
        "status": "stopping" if hall.stopping else "full" if hall.running >= hall.most else "ok",
        "version": __version__,
        "model": hall.model,
        "engine": hall.engine.name,
        "workers": hall.engine.workers,
        "sessions": hall.running,
        "sessions_most": hall.most,
        "streams": {
            "echo": {
                "live": True,
                "latency_ms": {
                    str(rate): round(config.latency_ms + resampling_ms(rate, config), 2)
                    for rate in (16_000, 44_100, 48_000)
                },
            },
            "enhance": {"live": False, "latency_ms": 1000 * (WINDOW_S + SHIFT_S), "reason": NOT_LIVE},
        },
    }


def _admitted(socket: "WebSocket", path: str, hall: Hall, any_origin: bool) -> Connection:
    """A connection whose request makes sense."""
    origin, host = socket.headers.get("origin"), socket.headers.get("host")
    if not any_origin and origin is not None and urlsplit(origin).netloc != host:
        raise Refusal(Code.ORIGIN, f"a page of {origin} may not stream to {host}: see --any-origin")
    if path == "v1/enhance":
        raise Refusal(Code.NOT_LIVE, NOT_LIVE)
    if path != "v1/echo":
        raise Refusal(Code.BAD_REQUEST, f"no stream at {'/' + path[:30]!r}; there is one at /v1/echo")
    given = socket.query_params.get("sample_rate_hz", "16000")
    try:
        return Connection(socket, hall, "echo", int(given))
    except ValueError:
        raise Refusal(Code.BAD_REQUEST, f"sample_rate_hz: {given[:12]!r} given; {_RATES} is wanted") from None
