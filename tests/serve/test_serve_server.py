"""The server over real sockets: streams, admission, limits, back-pressure, health, metrics, shutdown."""

import asyncio
import json
import socket
import threading
import time

import numpy as np
import pytest
from tests.serve.stubs import HOP, NONE, RATE, Client, DeafClient, Subtract, get, make_hall, running, wait_for
from websockets.exceptions import ConnectionClosed

from allears.serve.limits import Limits
from allears.serve.metrics import Metrics, Times
from allears.serve.protocol import END, INT16, Code, encode
from allears.serve.run import listen

RNG = np.random.default_rng(0)


def noise(n):
    return (0.1 * RNG.standard_normal(n)).astype(np.float32)


@pytest.fixture(scope="module")
def hall():
    return make_hall(most=3)


@pytest.fixture(scope="module")
def address(hall):
    with running(hall) as address:
        yield address


def stream_through(client, mic, reference, size=200):
    for begin in range(0, len(mic), size):
        client.send(mic[begin : begin + size], reference[begin : begin + size])
    return client.finish()


def test_a_stream_comes_back_clean(address):
    mic, reference = noise(1703), noise(1703)
    with Client(address) as client:
        assert client.begin().ready["latency_ms"] == 4.0 and client.ready["engine"] == "subtract"
        near = stream_through(client, mic, reference)
    np.testing.assert_allclose(near, mic - reference, atol=1e-6)
    assert client.code == Code.DONE and client.told == {"type": "end", "code": 1000, "message": "done", "frames": {}}
    last = client.replies[-1]
    assert last.kind == END and last.delay_ms == pytest.approx(3 * 1000 * HOP / RATE)
    assert last.voice == pytest.approx(1 / (1 + np.exp(-9)), abs=1e-5) and 0 < last.took_ms < 2000


def test_replies_tell_how_far_they_are_and_how_long_it_took():
    """Ten frames at once, each two hops of 10 ms: one after another they are done, the last after 200 ms."""
    hall = make_hall(steps=Subtract(slow_s=0.01), limits=Limits(piece_s=2 * HOP / RATE))
    with running(hall) as address, Client(address) as client:
        client.begin()
        for number in range(10):
            client.send(noise(2 * HOP), noise(2 * HOP), sequence=1000 + number)
        client.finish()
    sequences = [reply.sequence for reply in client.replies]
    assert sequences[:9] == [*range(1000, 1009)] and sequences[-1] == 1010
    took = [reply.took_ms for reply in client.replies]
    assert 20 <= took[0] < took[8] and 175 <= took[8] < 2000


def test_sixteen_bits_and_other_rates(address):
    mic, reference = noise(9600), noise(9600)
    with Client(address, rate=48_000) as client:
        assert client.begin().ready["latency_ms"] == 4.0  # nothing is converted
        for begin in range(0, 9600, 960):
            client.send(mic[begin : begin + 960], reference[begin : begin + 960], sample_format="int16")
        near = client.finish()
    assert near.shape == mic.shape and client.replies[-1].format == INT16
    wanted = mic - reference
    spectrum = np.abs(np.fft.rfft((near - wanted)[500:-500])) / np.abs(np.fft.rfft(wanted[500:-500])).mean()
    assert spectrum[: len(spectrum) // 4].mean() < 0.05  # what 16 kHz holds comes back; the rest cannot


def test_sessions_at_once_keep_apart(address):
    signals = [(noise(3200), noise(3200)) for _ in range(3)]
    found = [None] * 3

    def work(index):
        with Client(address) as client:
            client.begin()
            found[index] = stream_through(client, *signals[index], size=100 + 37 * index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for near, (mic, reference) in zip(found, signals, strict=True):
        np.testing.assert_allclose(near, mic - reference, atol=1e-6)


def test_one_more_is_refused_and_harms_no_other(address, hall):
    clients = [Client(address).begin() for _ in range(3)]
    try:
        assert json.loads(get(address, "/healthz")[1])["status"] == "full"
        with Client(address) as fourth:
            fourth.drain()
        assert fourth.code == Code.FULL and fourth.reason == "all 3 places are taken: try again later"
        assert fourth.told["message"] == fourth.reason and fourth.told["type"] == "error"
        for client in clients:
            mic, reference = noise(800), noise(800)
            np.testing.assert_allclose(stream_through(client, mic, reference), mic - reference, atol=1e-6)
    finally:
        for client in clients:
            client.socket.close()
    wait_for(lambda: hall.running == 0)
    with Client(address) as again:
        again.begin()


@pytest.mark.parametrize(
    ("path", "rate", "code", "text"),
    [
        (
            "v1/enhance",
            16_000,
            Code.NOT_LIVE,
            "enhance hears 6 s at a time, both ways, and would answer 6 to 11 s late",
        ),
        ("v1/sing", 16_000, Code.BAD_REQUEST, "no stream at '/v1/sing'; there is one at /v1/echo"),
        ("v1/echo", 3999, Code.BAD_REQUEST, "sample_rate_hz: '3999' given; 4000 to 384000 is wanted"),
        ("v1/echo", "fast", Code.BAD_REQUEST, "sample_rate_hz: 'fast' given"),
    ],
)
def test_what_cannot_be_served_is_refused_in_words(address, path, rate, code, text):
    with Client(address, rate=rate, path=path) as client:
        client.drain()
    assert client.code == code and client.reason.startswith(text) and client.told["message"].startswith(text)


def test_pages_of_other_servers_may_not_stream(address):
    with Client(address, origin="https://example.org") as client:
        client.drain()
    assert client.code == Code.ORIGIN and "--any-origin" in client.told["message"]
    with Client(address, origin=f"http://{address}") as client:
        client.begin()


def test_page_health_and_metrics(address, hall):
    with Client(address) as client:
        client.begin()
        stream_through(client, noise(800), noise(800))
    wait_for(lambda: hall.running == 0)
    status, page, headers = get(address, "/")
    assert status == 200 and "<title>allears" in page and "default-src 'self'" in headers["content-security-policy"]
    for name in ("page.js", "plot.js", "stream.js", "tap.js", "page.css", "icon.svg"):
        assert get(address, f"/{name}")[0] == 200
    assert get(address, "/../hall.py")[0] == 404
    health = json.loads(get(address, "/healthz")[1])
    assert health["status"] == "ok" and health["engine"] == "subtract" and health["sessions_most"] == 3
    # Hops of 2 ms here: at 44.1 kHz they are no whole samples, and the rate is converted.
    assert health["streams"]["echo"]["latency_ms"] == {"16000": 4.0, "44100": 5.34, "48000": 4.0}
    assert health["streams"]["enhance"]["live"] is False and "late" in health["streams"]["enhance"]["reason"]
    _, text, headers = get(address, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['allears_info{engine="subtract"}'] == "1" and values["allears_sessions_most"] == "3"
    assert int(values['allears_sessions_total{stream="echo"}']) == hall.metrics.sessions["echo"]
    assert float(values['allears_hop_ms{quantile="0.99"}']) >= float(values['allears_hop_ms{quantile="0.5"}']) > 0
    assert int(values["allears_hop_ms_count"]) == hall.metrics.hop_ms.count > 0


def test_times_are_those_of_the_newest():
    times = Times(kept=100)
    assert np.isnan(times.quantiles()[0])
    for value in range(300):
        times.add(float(value))
    assert times.quantiles((0.0, 0.5, 1.0)) == [200.0, 249.5, 299.0] and times.count == 300 and times.total == 44850
    assert "allears_hop_ms_count 0" in Metrics().text(0, 1, "x") and 'quantile="0.5"} NaN' in Metrics().text(0, 1, "x")


def test_faster_than_real_time_is_slowed_and_waits_in_bounds(monkeypatch):
    from allears.serve.live import LiveSession

    longest = [0.0]
    accept = LiveSession.accept

    def watch(self, frame):
        done = accept(self, frame)
        longest[0] = max(longest[0], self.waiting_s)
        return done

    monkeypatch.setattr(LiveSession, "accept", watch)
    mic, reference = noise(16_000), noise(16_000)
    with running(make_hall(limits=Limits(ahead_s=0.3, waiting_s=0.2))) as address, Client(address) as client:
        client.begin()
        begun = time.monotonic()
        near = stream_through(client, mic, reference, size=800)
        elapsed = time.monotonic() - begun
    np.testing.assert_allclose(near, mic - reference, atol=1e-6)
    assert 0.6 < elapsed < 5 and longest[0] <= 0.25


@pytest.mark.parametrize(
    ("limits", "code", "text"),
    [
        ({"idle_s": 0.2}, Code.IDLE, "no frame for 0.2 s"),
        ({"session_s": 0.3}, Code.TIME_OVER, "sessions end after 0.005 minutes: begin another"),
        ({"session_bytes": 3000}, Code.BYTES_OVER, "more than 3000 bytes came"),
    ],
)
def test_limits_end_a_session_in_words(limits, code, text):
    with running(make_hall(limits=Limits(**limits))) as address, Client(address) as client:
        client.begin()
        client.send(noise(200), noise(200))
        if code is Code.BYTES_OVER:
            client.send(noise(200), noise(200))
        client.drain()
        assert client.code == code and client.told["message"].startswith(text)


def test_a_session_whose_time_is_over_gets_its_rest():
    mic, reference = noise(500), noise(500)
    with running(make_hall(limits=Limits(session_s=0.3))) as address, Client(address) as client:
        client.begin()
        client.send(mic, reference)
        np.testing.assert_allclose(client.drain(), mic - reference, atol=1e-6)
        assert client.code == Code.TIME_OVER and client.replies[-1].kind == END


def test_shutdown_lets_sessions_finish():
    hall = make_hall(steps=Subtract(slow_s=0.002))
    mic, reference = noise(3200), noise(3200)
    with running(hall) as address:
        client = Client(address).begin()
        for begin in range(0, 3200, 320):
            client.send(mic[begin : begin + 320], reference[begin : begin + 320])
        wait_for(lambda: hall.metrics.frame_ms.count >= 1)
    near = client.drain()
    assert client.code == Code.STOPPING and client.told["message"] == "the server is stopping"
    assert len(near) >= 320 and client.replies[-1].kind == END
    np.testing.assert_allclose(near, (mic - reference)[: len(near)], atol=1e-6)
    assert hall.running == 0


def test_a_stopping_server_takes_nobody():
    hall = make_hall()
    with running(hall) as address:
        hall.stopping = True
        with Client(address) as client:
            client.drain()
        assert client.code == Code.STOPPING
        status, body, _ = get(address, "/healthz")
        assert status == 503 and json.loads(body)["status"] == "stopping"


def test_many_sessions_leave_nothing_behind():
    """Sessions that end in five ways, forty: no object is left of them, and no more threads than workers."""
    import gc

    from allears.models.echo.stream import EchoSession
    from allears.serve.connection import Connection
    from allears.serve.live import LiveSession

    def alive():
        gc.collect()
        return sum(type(found) in (EchoSession, LiveSession, Connection) for found in gc.get_objects())

    hall, before = make_hall(most=2), alive()
    with running(hall) as address:
        for index in range(40):
            how = index % 5
            if how == 2:  # gone without a word
                client = DeafClient(address)
                client.send(encode(0, noise(64), noise(64)))
                wait_for(lambda: hall.running == 1)
                client.socket.close()
                wait_for(lambda: hall.running == 0)
                continue
            client = Client(address)
            client.send(noise(64), noise(64))
            if how == 0:
                client.finish()
            elif how == 1:
                client.socket.close()
            elif how == 3:
                client.socket.send(b"nonsense")
                client.drain()
            else:
                client.socket.send("text")
                client.drain()
            wait_for(lambda: hall.running == 0)
        wait_for(lambda: alive() <= before)
        assert sum(thread.name.startswith("step") for thread in threading.enumerate()) <= hall.engine.threads
    assert hall.metrics.sessions["echo"] == 40 == hall.metrics.closed.total() and hall.metrics.errors == 0


def test_raw_bytes_at_the_end_of_a_stream_are_not_read(address):
    with Client(address) as client:
        client.begin()
        client.socket.send(encode(0, noise(100), None, END))
        with pytest.raises(ConnectionClosed):
            for _ in range(200):
                client.socket.send(encode(1, NONE, NONE))
                time.sleep(0.01)


def test_replies_do_not_wait_for_the_clients_next_frame():
    """Nagle's delay is off for an accepted connection: else a reply lies until the client has said it got the last."""

    async def accepted() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_reader, writer):
            found = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            told.set_result(found)

        with listen("127.0.0.1", 0) as listening:
            server = await asyncio.start_server(connected, sock=listening)
            _, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                return await asyncio.wait_for(told, 10)
            finally:
                writer.close()
                server.close()

    assert asyncio.run(accepted())
