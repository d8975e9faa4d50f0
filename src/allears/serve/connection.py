"""One WebSocket: its frames are read no faster than they can be used, worked on beside the event loop, and answered."""

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from allears.serve.limits import Pace
from allears.serve.live import LiveSession
from allears.serve.protocol import AUDIO, END, Code, Refusal, Reply, decode, encode_reply

if TYPE_CHECKING:
    from fastapi import WebSocket

    from allears.serve.hall import Hall

logger = logging.getLogger(__name__)

_GOODBYE_S = 1.0


class _Vanished(Exception):
    """The client is gone."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Connection:
    """A session from its first to its last byte.

    Two tasks run: one reads frames into the session, the other works on what waits and sends what comes of it. What
    ends either one ends both.

    Args:
        socket: accepted, or about to be.
        hall: where it belongs.
        stream: what the client asked for.
        rate_hz: of the client's signals.
    """

    def __init__(self, socket: "WebSocket", hall: "Hall", stream: str, rate_hz: int) -> None:
        self._socket, self._hall, self._stream = socket, hall, stream
        self._limits = hall.limits
        self._session = LiveSession(hall.engine, rate_hz, hall.limits)
        self._rate, self._pace = rate_hz, Pace(hall.limits.ahead_s)
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = self._heard = time.monotonic()
        self._arrivals: deque[tuple[int, int, float]] = (
            deque()
        )  # of a frame: samples up to its end, number, when it came
        self._worked, self._sequence = 0, 0
        self._sending: float | None = None
        self._reading, self._bytes = False, 0
        self._last = Refusal(Code.DONE, "done")

    async def run(self) -> None:
        """All of it; the connection is closed then.

        Raises:
            Refusal: there is no place; nothing has been said to the client yet.
        """
        self._hall.enter(self)
        try:
            self._hall.metrics.sessions[self._stream] += 1
            code = await self._live()
            self._hall.metrics.closed[code] += 1
        finally:
            self._hall.leave(self)

    def finish(self, refusal: Refusal) -> None:
        """Read no more, work on what waits, send the rest, and close with this."""
        if not self._tasks:
            return self.cut(refusal)
        self._last = refusal
        self._tasks[0].cancel()
        self._session.end()
        self._wake.set()

    def cut(self, refusal: Refusal) -> None:
        """Close with this now."""
        self._last = refusal
        for task in self._tasks:
            task.cancel()

    def check(self, now: float) -> None:
        """Called now and then: whoever is too slow, or here for too long, has to go."""
        limits = self._limits
        if self._sending is not None and now - self._sending > limits.idle_s:
            self.cut(Refusal(Code.NOT_READING, f"nothing was taken for {limits.idle_s:g} s of what was sent"))
        elif self._reading and now - self._heard > limits.idle_s:
            self.cut(Refusal(Code.IDLE, f"no frame for {limits.idle_s:g} s"))
        elif self._last.code is Code.DONE and now - self._begun > limits.session_s:
            self.finish(Refusal(Code.TIME_OVER, f"sessions end after {limits.session_s / 60:g} minutes: begin another"))

    async def _live(self) -> int:
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._work())]
        try:
            done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        errors = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        for error in errors:
            if isinstance(error, _Vanished):
                self._tally()
                return error.code
            if not isinstance(error, Refusal):
                logger.error("session: %s", error, exc_info=error)
                self._hall.metrics.errors += 1
                error = Refusal(Code.FAULT, "a fault of the server: begin a new session")
            self._last = error
        counts = self._tally()
        await say_goodbye(self._socket, self._last, counts)
        return self._last.code

    async def _read(self) -> None:
        limits, session = self._limits, self._session
        while True:
            self._reading, self._heard = True, time.monotonic()
            message = await self._socket.receive()
            self._reading, now = False, time.monotonic()
            if message["type"] == "websocket.disconnect":
                raise _Vanished(message.get("code") or 1005)
            data = message.get("bytes")
            if data is None:
                raise Refusal(Code.NOT_BINARY, "text came; binary frames are wanted")
            self._bytes += len(data)
            if self._bytes > limits.session_bytes:
                raise Refusal(Code.BYTES_OVER, f"more than {limits.session_bytes} bytes came: begin another session")
            frame = decode(data, int(limits.frame_s * self._rate))
            before = session.received
            if session.accept(frame):
                self._arrivals.append((session.received, frame.sequence, now))
            if frame.kind == END:
                session.end()
            self._wake.set()
            if frame.kind == END:
                return
            while session.waiting_s > limits.waiting_s:
                self._room.clear()
                await self._room.wait()
            taken_s = max(session.received - before, len(frame.reference)) / self._rate
            if (pause_s := self._pace.pause_s(time.monotonic(), taken_s)) > 0:
                await asyncio.sleep(pause_s)

    async def _work(self) -> None:
        session, metrics, hop_s = self._session, self._hall.metrics, self._hall.engine.config.hop_s
        await self._send_text(
            {
                "type": "ready",
                "stream": self._stream,
                "sample_rate_hz": self._rate,
                "latency_ms": round(session.latency_ms, 2),
                "engine": self._hall.engine.name,
                "model": self._hall.model,
                "frame_s_most": self._limits.frame_s,
                "session_s_most": self._limits.session_s,
            }
        )
        last = False
        while not last:
            self._wake.clear()
            piece = session.next_piece()
            if piece is None:
                await self._wake.wait()
                continue
            last = piece.last
            self._room.set()
            begun = time.monotonic()
            arrived = self._arrival(len(piece.mic), begun)
            near, delay_ms, voice = await self._hall.compute(session.work, piece)
            ended = time.monotonic()
            seconds = len(piece.mic) / self._rate
            if seconds >= hop_s:
                metrics.hop_ms.add(1000.0 * (ended - begun) * hop_s / seconds)
            metrics.audio_s += seconds
            took_ms = 1000.0 * (ended - arrived)
            if piece.mic.size:
                metrics.frame_ms.add(took_ms)
            if near.size or last:
                kind = END if last else AUDIO
                reply = Reply(kind, session.format, self._sequence, near, delay_ms, voice, took_ms)
                await self._send({"bytes": encode_reply(reply)})

    def _arrival(self, samples: int, now: float) -> float:
        """When the oldest of the next samples to be worked on came, ``now`` where there are none; notes up to which
        frame all is worked on then."""
        arrived = self._arrivals[0][2] if self._arrivals else now
        self._worked += samples
        while self._arrivals and self._arrivals[0][0] <= self._worked:
            self._sequence = self._arrivals.popleft()[1]
        return arrived

    async def _send_text(self, told: dict[str, Any]) -> None:
        await self._send({"text": json.dumps(told)})

    async def _send(self, message: dict[str, Any]) -> None:
        self._sending = time.monotonic()
        try:
            await self._socket.send({"type": "websocket.send", **message})
        except asyncio.CancelledError:
            raise
        except Exception as error:  # of the server's library: the connection is no more
            raise _Vanished(1006) from error
        self._sending = None

    def _tally(self) -> dict[str, int]:
        counts = {kind: n for kind, n in self._session.counts.items() if n}
        self._hall.metrics.faults.update(counts)
        return counts


async def say_goodbye(socket: "WebSocket", refusal: Refusal, counts: dict[str, int] | None = None) -> None:
    """Tell the client why, in words and as a code, and close; a client that does not take it is cut off."""
    told = {"type": "end" if refusal.code is Code.DONE else "error", "code": int(refusal.code)}
    told |= {"message": refusal.message, "frames": counts or {}}
    try:
        async with asyncio.timeout(_GOODBYE_S):
            await socket.send({"type": "websocket.send", "text": json.dumps(told)})
            await socket.send({"type": "websocket.close", "code": int(refusal.code), "reason": refusal.reason})
    except TimeoutError:
        abort = socket.scope.get("state", {}).get("abort")
        if abort is not None:
            abort()
    except Exception as error:  # it is gone already
        with contextlib.suppress(Exception):
            logger.debug("goodbye: %s", error)
