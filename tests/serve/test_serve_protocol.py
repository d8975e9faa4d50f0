"""Frames as bytes: what goes out comes back, what is no frame is refused in words, bad samples are repaired."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allears.serve.limits import Limits, Pace
from allears.serve.protocol import (
    AUDIO,
    END,
    FLOAT32,
    INT16,
    LOUDEST,
    Code,
    Refusal,
    Reply,
    behind,
    decode,
    decode_reply,
    encode,
    encode_reply,
)


@given(st.integers(0, 2**32 - 1), st.integers(0, 50), st.integers(0, 50), st.sampled_from(["float32", "int16"]))
def test_a_frame_comes_back(sequence, n, k, sample_format):
    rng = np.random.default_rng(n + 100 * k)
    mic, reference = rng.uniform(-1, 1, n).astype(np.float32), rng.uniform(-1, 1, k).astype(np.float32)
    frame = decode(encode(sequence, mic, reference, sample_format=sample_format), 50)
    assert (frame.kind, frame.sequence, frame.repaired) == (AUDIO, sequence, False)
    assert frame.format == (FLOAT32 if sample_format == "float32" else INT16)
    atol = 0 if sample_format == "float32" else 0.51 / 32768 + 1 / 32768 * (n + k > 0)
    np.testing.assert_allclose(frame.mic, mic, atol=atol)
    np.testing.assert_allclose(frame.reference, reference, atol=atol)


def test_the_layout_is_the_documented_one():
    data = encode(7, np.array([0.5, -1.0], np.float32), np.array([0.25], np.float32), sample_format="int16")
    assert data == bytes([1, 1, 1, 0]) + struct.pack("<III", 7, 2, 1) + struct.pack("<hhh", 16384, -32768, 8192)
    data = encode(8, np.array([0.5], np.float32), None, kind=END)
    assert data == bytes([1, 2, 0, 1]) + struct.pack("<III", 8, 1, 0) + struct.pack("<f", 0.5)
    np.testing.assert_array_equal(decode(data, 9).reference, np.zeros(1))


def test_a_reply_comes_back():
    near = np.array([0.25, -0.5, 0.125], np.float32)
    for number in (FLOAT32, INT16):
        data = encode_reply(Reply(END, number, 9, near, 30.0, float("nan"), 1.5))
        assert len(data) == 24 + 3 * (4 if number == FLOAT32 else 2)
        reply = decode_reply(data)
        assert (reply.kind, reply.sequence, reply.delay_ms, reply.took_ms) == (END, 9, 30.0, 1.5)
        assert np.isnan(reply.voice)
        np.testing.assert_array_equal(reply.near, near)
    with pytest.raises(ValueError, match="2 samples came, the header tells of 3"):
        decode_reply(data[:-2])


GOOD = encode(0, np.zeros(4, np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (b"", Code.BAD_FRAME, "frame of 0 bytes; a header alone has 16"),
        (GOOD[:15], Code.BAD_FRAME, "frame of 15 bytes"),
        (b"\x02" + GOOD[1:], Code.BAD_FRAME, "version 2"),
        (b"\x01\x09" + GOOD[2:], Code.BAD_FRAME, "kind 9"),
        (b"\x01\x01\x05" + GOOD[3:], Code.BAD_FRAME, "format 5"),
        (b"\x01\x01\x00\x80" + GOOD[4:], Code.BAD_FRAME, "flags 128"),
        (b"\x01\x01\x00\x01" + GOOD[4:], Code.BAD_FRAME, "nothing is played, but 4 samples"),
        (GOOD[:-1], Code.BAD_FRAME, r"frame of 47 bytes; its header tells of 4 \+ 4 samples: 48"),
        (GOOD + b"x", Code.BAD_FRAME, "frame of 49 bytes"),
        (GOOD[:8] + struct.pack("<II", 2**32 - 1, 2**32 - 1), Code.TOO_LARGE, "frame of 4294967295 samples; at most 4"),
        (encode(0, np.zeros(5, np.float32), None), Code.TOO_LARGE, "frame of 5 samples; at most 4: send shorter"),
    ],
)
def test_what_is_no_frame_is_refused_in_words(data, code, text):
    with pytest.raises(Refusal, match=text) as told:
        decode(data, 4)
    assert told.value.code is code


@given(st.binary(max_size=80))
def test_any_bytes_are_a_frame_or_refused(data):
    try:
        frame = decode(data, 10)
    except Refusal:
        return
    assert np.isfinite(frame.mic).all() and len(frame.mic) <= 10 and len(frame.reference) <= 10


def test_bad_samples_are_repaired():
    mic = np.array([np.nan, np.inf, -np.inf, 1e30, -9.0, 0.5], np.float32)
    frame = decode(encode(0, mic, mic[:2]), 10)
    np.testing.assert_array_equal(frame.mic, [0, 0, 0, LOUDEST, -LOUDEST, 0.5])
    np.testing.assert_array_equal(frame.reference, [0, 0])
    assert frame.repaired


@pytest.mark.parametrize(
    ("sequence", "expected", "apart"),
    [
        (5, 5, 0),
        (8, 5, 3),
        (4, 5, -1),
        (0, 2**32, 0),
        (1, 2**32 - 1, 2),
        (2**32 - 1, 2**32 + 1, -2),
        (0, 2**31 + 1, 2**31 - 1),
    ],
)
def test_sequences_go_round(sequence, expected, apart):
    assert behind(sequence, expected) == apart


def test_a_reason_fits_into_a_closing_frame():
    refusal = Refusal(Code.FULL, "ö" * 200)
    assert refusal.reason == "ö" * 61 and len(refusal.reason.encode()) <= 123


def test_a_pace_lets_real_time_pass_and_slows_what_is_faster():
    pace, now = Pace(0.5), 100.0
    for _ in range(500):  # real time: never waits
        assert pace.pause_s(now, 0.02) == 0
        now += 0.02
    begun, sent = now, 0.0
    while sent < 10.0:  # as fast as it may
        now += pace.pause_s(now, 0.1)
        sent += 0.1
    assert now - begun == pytest.approx(9.5, abs=0.15)
    now += 60  # a pause earns nothing beyond what may come at once
    assert sum(pace.pause_s(now, 0.1) > 0 for _ in range(10)) == 5


def test_limits_name_what_is_wrong():
    with pytest.raises(ValueError, match="idle_s: 0 given; more than 0"):
        Limits(idle_s=0)
