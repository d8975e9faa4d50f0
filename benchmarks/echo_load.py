"""Clients of the echo server that cost little themselves: many live streams in one process, each in real time.

A stream sends a frame every 10 ms at 16 kHz and notes when the reply to it comes.
"""

import asyncio
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from allears.serve.protocol import END, REPLY, encode

RATE_HZ, FRAME = 16_000, 160
HOP_S = FRAME / RATE_HZ
_TEXT, _BINARY, _CLOSE = 1, 2, 8
_CONNECT_S = 20.0


@dataclass
class Heard:
    """What a stream got: milliseconds from each frame's sending to its reply, and the code it was closed with."""

    times_ms: list[float] = field(default_factory=list)
    sent: int = 0
    code: int = 1006
    message: str = ""


class Socket:
    """A WebSocket as plain as can be: no extensions, frames masked with zeros."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, host: str, port: int) -> "Socket":
        reader, writer = await asyncio.open_connection(host, port)
        asked = (
            f"GET /v1/echo?sample_rate_hz={RATE_HZ} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        writer.write(asked.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101"):
            raise ConnectionError(head.split(b"\r\n")[0].decode())
        return cls(reader, writer)

    def send(self, data: bytes, opcode: int = _BINARY) -> None:
        """A message of 126 to 65,535 bytes, or a short one."""
        size = struct.pack(">B", 0x80 | len(data)) if len(data) < 126 else struct.pack(">BH", 0xFE, len(data))
        self.writer.write(bytes([0x80 | opcode]) + size + bytes(4) + data)

    async def receive(self) -> tuple[int, bytes]:
        """The opcode and the data of the next message."""
        first, size = await self.reader.readexactly(2)
        if size >= 126:
            count, form = (2, ">H") if size == 126 else (8, ">Q")
            (size,) = struct.unpack(form, await self.reader.readexactly(count))
        return first & 15, await self.reader.readexactly(size)

    def close(self) -> None:
        self.writer.transport.abort()


def frames(seconds: float, seed: int) -> list[bytes]:
    """Noise as microphone and reference, frame by frame."""
    rng = np.random.default_rng(seed)
    signals = (0.1 * rng.standard_normal((round(seconds / HOP_S), 2, FRAME))).astype(np.float32)
    return [encode(number, mic, reference) for number, (mic, reference) in enumerate(signals)]


async def stream(host: str, port: int, data: list[bytes], begin: float, heard: Heard) -> Heard:
    """One live stream; its first frame is sent at the time ``begin`` (``time.perf_counter``)."""
    socket = await asyncio.wait_for(Socket.open(host, port), _CONNECT_S)
    sent_at: list[float] = []
    answers = asyncio.create_task(_answers(socket, sent_at, heard))
    try:
        for number, frame in enumerate(data):
            due = begin + number * HOP_S
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if answers.done():
                break
            sent_at.append(time.perf_counter())
            socket.send(frame)
            heard.sent += 1
        if not answers.done():
            socket.send(encode(len(data), np.zeros(0, np.float32), np.zeros(0, np.float32), END))
        await asyncio.wait_for(answers, _CONNECT_S)
    except (ConnectionError, TimeoutError, asyncio.IncompleteReadError):
        heard.code = 1006
    finally:
        answers.cancel()
        socket.close()
    return heard


async def _answers(socket: Socket, sent_at: list[float], heard: Heard) -> None:
    done = 0
    while True:
        opcode, data = await socket.receive()
        if opcode == _BINARY:
            now, sequence = time.perf_counter(), REPLY.unpack_from(data)[4]
            upto = min(sequence + 1, len(sent_at))
            heard.times_ms.extend(1000.0 * (now - sent_at[number]) for number in range(max(done, 1), upto))
            done = upto
        elif opcode == _CLOSE:
            (heard.code,), heard.message = struct.unpack(">H", data[:2]), data[2:].decode()
            return


async def live(
    host: str, port: int, sessions: int, seconds: float, meanwhile: Callable[[], "asyncio.Future"] | None = None
) -> list[Heard]:
    """So many streams at once, begun evenly over a hop; ``meanwhile`` is begun in the middle."""
    data = frames(seconds, seed=0)
    begin, heard = time.perf_counter() + 0.5, [Heard() for _ in range(sessions)]
    jobs = [stream(host, port, data, begin + random.random() * HOP_S, one) for one in heard]

    async def later() -> None:
        await asyncio.sleep(0.5 + seconds / 2)
        if meanwhile is not None:
            await meanwhile()

    await asyncio.gather(*jobs, later(), return_exceptions=True)
    return heard


async def one_more(host: str, port: int) -> Heard:
    """A stream where there is no place: what it is told, and (``times_ms``) how soon."""
    begun, heard = time.perf_counter(), Heard()
    await stream(host, port, frames(0.05, seed=1), begun, heard)
    heard.times_ms = [1000.0 * (time.perf_counter() - begun)]
    return heard


async def come_and_go(host: str, port: int, sessions: int, at_once: int = 8) -> dict[str, int]:
    """So many short sessions that end in each of five ways in turn; how many ended how."""
    data, ended = frames(0.05, seed=2), dict.fromkeys(_WAYS, 0)
    numbers = iter(range(sessions))

    async def work() -> None:
        for number in numbers:
            way = _WAYS[number % len(_WAYS)]
            socket = await asyncio.wait_for(Socket.open(host, port), _CONNECT_S)
            try:
                await asyncio.wait_for(_leave(socket, data, way), _CONNECT_S)
                ended[way] += 1
            finally:
                socket.close()

    await asyncio.gather(*(work() for _ in range(at_once)))
    return ended


_WAYS = ("end", "close", "vanish", "nonsense", "text")


async def _leave(socket: Socket, data: list[bytes], way: str) -> None:
    for frame in data:
        socket.send(frame)
    if way == "vanish":
        await socket.receive()
        return
    if way == "end":
        socket.send(encode(len(data), np.zeros(0, np.float32), np.zeros(0, np.float32), END))
    elif way == "close":
        socket.send(struct.pack(">H", 1000), _CLOSE)
    elif way == "nonsense":
        socket.send(b"nonsense")
    else:
        socket.send(b"text", _TEXT)
    while (await socket.receive())[0] != _CLOSE:
        pass
