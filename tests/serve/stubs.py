"""A canceller that is easy to foretell, servers that run in a thread, and clients that do not wait for ever."""

import json
import socket
import struct
import threading
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from tests.models.echo_nets import SMALL

from allears.serve.engines import Engine, Made

pytest.importorskip("fastapi", reason="the server needs fastapi: pip install 'allears[serve]'")
pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'allears[serve]'")
pytest.importorskip("websockets", reason="the server needs websockets: pip install 'allears[serve]'")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from allears.serve.hall import Hall
from allears.serve.limits import Limits
from allears.serve.protocol import AUDIO, END, decode_reply, encode
from allears.serve.run import listen, make_server, serve

HOP = SMALL.hop
RATE = SMALL.sample_rate_hz
NONE = np.zeros(0, np.float32)
WINDOW_SUM = 1 / np.tan(np.pi / (4 * HOP))  # of a root of a Hann window: the first bin of a frame of ones


class Subtract:
    """Near end = microphone - reference; the state counts the hops. ``slow_s`` a hop; a hop whose frame of the
    microphone is ``fault`` throughout fails."""

    name, config, most = "subtract", SMALL, 4

    def __init__(self, slow_s: float = 0.0, fault: float = 0.75) -> None:
        self.slow_s, self.fault, self.groups = slow_s, fault, []

    def initial(self):
        return 0

    def run(self, hops):
        self.groups.append(len(hops))
        if self.slow_s:
            time.sleep(self.slow_s)
        if any(abs(hop.spectra[0, 0, 0] - self.fault * WINDOW_SUM) < 1e-3 for hop in hops):
            raise RuntimeError("a fault on purpose")
        found = np.eye(SMALL.align_frames, dtype=np.float32)[3]
        return [Made(hop.spectra[0] - hop.spectra[1], found, 9.0, hop.state + 1) for hop in hops]


def make_hall(most=4, limits=None, workers=2, steps=None, engine=None):
    engine = Engine(Subtract() if steps is None else steps, workers) if engine is None else engine
    return Hall(engine, most, limits or Limits(), "stub")


@contextmanager
def running(hall, send_buffer=None, **options):
    """The address of a server of ``hall``; it is stopped at the end, and must stop."""
    server, listening = make_server(hall, **{"drain_s": 2.0, **options}), listen("127.0.0.1", 0)
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    port = listening.getsockname()[1]
    thread = threading.Thread(target=serve, args=(server, listening), daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, within_s=8.0):
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def get(address, path):
    """Status and body; also of an error."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=8) as answer:
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), dict(error.headers)


class DeafClient:
    """Sends frames, and never takes what comes back; no thread is at its socket, which may go in any way."""

    def __init__(self, address):
        host, port = address.split(":")
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(8)
        self.socket.connect((host, int(port)))
        asked = f"GET /v1/echo HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        asked += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        self.socket.sendall(asked.encode())

    def send(self, data):
        """Masked with zeros, which changes nothing."""
        self.socket.sendall(struct.pack(">BBH4x", 0x82, 0xFE, len(data)) + data)


class Client:
    """One stream of an orderly client."""

    def __init__(self, address, rate=RATE, path="v1/echo", **options):
        asked = f"ws://{address}/{path}?sample_rate_hz={rate}"
        # Without pings, whose numbers a thread draws from Python's ``random``, which is everybody's.
        options = {"compression": None, "close_timeout": 2, "max_size": None, "ping_interval": None, **options}
        self.socket = connect(asked, **options)
        self.sequence, self.near, self.replies, self.told, self.code = 0, [], [], {}, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def begin(self):
        """Wait until the session has begun."""
        self.ready = json.loads(self.socket.recv(timeout=8))
        assert self.ready["type"] == "ready", self.ready
        return self

    def send(self, mic, reference=NONE, sequence=None, kind=AUDIO, sample_format="float32"):
        number = self.sequence if sequence is None else sequence
        self.socket.send(encode(number, mic, reference, kind, sample_format))
        self.sequence = number + 1

    def finish(self):
        """End the stream, and take everything that is still to come."""
        self.send(NONE, NONE, kind=END)
        return self.drain()

    def drain(self):
        """Take everything until the server closes: the near end, its samples in order."""
        try:
            while True:
                message = self.socket.recv(timeout=8)
                if isinstance(message, str):
                    self.told = json.loads(message)
                else:
                    self.replies.append(decode_reply(message))
                    self.near.append(self.replies[-1].near)
        except ConnectionClosed as closed:
            self.code, self.reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        return np.concatenate([NONE, *self.near])
