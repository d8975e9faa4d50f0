"""What goes wrong with one client: the session copes or ends in words, and the one beside it notices nothing."""

import contextlib
import socket
import struct

import numpy as np
import pytest
from tests.serve.stubs import HOP, NONE, RATE, Client, DeafClient, Subtract, make_hall, running, wait_for

from allears.serve.limits import Limits
from allears.serve.protocol import Code, encode

RNG = np.random.default_rng(0)


def noise(n):
    return (0.1 * RNG.standard_normal(n)).astype(np.float32)


@pytest.fixture(scope="module")
def hall():
    return make_hall(most=4, limits=Limits(frame_s=0.1, message_bytes=20_000))


@pytest.fixture(scope="module")
def address(hall):
    with running(hall) as address:
        yield address


@pytest.fixture
def beside(address, hall):
    """A session that runs all the while, and is whole at the end."""
    mic, reference = noise(4 * 320), noise(4 * 320)
    with Client(address) as client:
        client.begin()
        client.send(mic[:640], reference[:640])
        yield
        client.send(mic[640:], reference[640:])
        np.testing.assert_allclose(client.finish(), mic - reference, atol=1e-6)
        assert client.code == Code.DONE
    wait_for(lambda: hall.running == 0)
    assert hall.metrics.errors == 0


def counted(hall, kind):
    return hall.metrics.faults[kind]


def test_dropped_frames(address, hall, beside):
    before = counted(hall, "dropped")
    mic, reference = noise(500), noise(500)
    with Client(address) as client:
        for number in (0, 1, 4):
            here = slice(100 * number, 100 * number + 100)
            client.send(mic[here], reference[here], sequence=number)
        near = client.finish()
    wanted = mic - reference
    wanted[200:400] = 0
    np.testing.assert_allclose(near, wanted, atol=1e-6)
    assert client.code == Code.DONE and client.told["frames"] == {"dropped": 2}
    assert counted(hall, "dropped") == before + 2


def test_duplicated_and_late_frames(address, hall, beside):
    mic, reference = noise(300), noise(300)
    with Client(address) as client:
        for number in (0, 1, 1, 0, 2):
            here = slice(100 * number, 100 * number + 100)
            client.send(mic[here], reference[here], sequence=number)
        near = client.finish()
    np.testing.assert_allclose(near, mic - reference, atol=1e-6)
    assert client.told["frames"] == {"duplicated": 1, "late": 1}


def test_samples_that_are_no_numbers(address, hall, beside):
    mic, reference = noise(320), noise(320)
    bad = mic.copy()
    bad[50:60], bad[70], bad[80] = np.nan, np.inf, 1e20
    with Client(address) as client:
        client.send(bad, reference)
        client.send(mic, np.full(320, np.nan, np.float32))
        near = client.finish()
    mic[50:60], mic[70], mic[80] = 0, 0, 8.0
    np.testing.assert_allclose(near[:320], mic - reference, atol=1e-6)
    assert np.isfinite(near).all() and client.told["frames"] == {"repaired": 2} and client.code == Code.DONE


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (b"", Code.BAD_FRAME, "frame of 0 bytes"),
        (b"\xff" * 40, Code.BAD_FRAME, "header: version 255"),
        (encode(0, np.zeros(9, np.float32), NONE)[:-1], Code.BAD_FRAME, "frame of 51 bytes"),
        (encode(0, np.zeros(1601, np.float32), NONE), Code.TOO_LARGE, "frame of 1601 samples; at most 1600"),
        ("hello", Code.NOT_BINARY, "text came"),
    ],
)
def test_malformed_and_oversized_frames(address, beside, data, code, text):
    with Client(address) as client:
        client.begin()
        client.socket.send(data)
        client.drain()
    assert client.code == code and client.reason.startswith(text) and client.told["code"] == code


def test_a_message_too_large_is_not_read_to_its_end(address, beside):
    with Client(address) as client:
        client.begin()
        client.socket.send(bytes(20_001))
        client.drain()
    assert client.code == Code.TOO_LARGE


def test_a_client_that_vanishes(address, hall, beside):
    """Without a closing frame: cut in the middle of a frame, and with a reset."""
    for reset in (False, True):
        client = DeafClient(address)
        client.send(encode(0, noise(320), noise(320)))
        wait_for(lambda: hall.running == 2)
        if reset:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()
        else:
            client.socket.sendall(b"\x82\xfe\x10\x00half a frame")
            client.socket.shutdown(socket.SHUT_RDWR)
        wait_for(lambda: hall.running == 1)
        client.socket.close()


def test_a_client_that_takes_nothing_is_cut_off():
    """It sends and never reads: its replies pile up to the sockets' bounds, and then its place is given away."""
    hall = make_hall(limits=Limits(idle_s=0.4, ahead_s=600.0))
    with running(hall, send_buffer=4096) as address:
        client, frame = DeafClient(address), noise(8000)
        with contextlib.suppress(OSError):  # cut off while it sends
            for number in range(100):
                client.send(encode(number, frame, None))
        wait_for(lambda: hall.metrics.closed.total() == 1)
        client.socket.close()
    assert hall.metrics.closed == {Code.NOT_READING: 1} and hall.running == 0


def test_a_reference_that_is_missing_for_seconds(address, beside):
    mic = noise(2 * RATE)
    with Client(address) as client:
        client.begin()
        for begin in range(0, len(mic), 1600):
            client.send(mic[begin : begin + 1600], NONE)
        near = client.finish()
    np.testing.assert_allclose(near, mic, atol=1e-6)
    assert client.code == Code.DONE


def test_a_fault_of_the_engine_ends_its_session_alone(caplog):
    hall = make_hall(steps=Subtract(slow_s=0.001))
    mic, reference = noise(3200), noise(3200)
    with running(hall) as address, Client(address) as good, Client(address) as bad:
        good.begin()
        bad.begin()
        good.send(mic[:1600], reference[:1600])
        bad.send(np.full(4 * HOP, 0.75, np.float32), np.zeros(4 * HOP, np.float32))
        bad.drain()
        assert bad.code == Code.FAULT and bad.told["message"] == "a fault of the server: begin a new session"
        good.send(mic[1600:], reference[1600:])
        np.testing.assert_allclose(good.finish(), mic - reference, atol=1e-6)
    assert hall.metrics.errors == 1 and "a fault on purpose" in caplog.text
