"""One stream without a network: frames that are missing, repeated, late or bad; pieces; the end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.echo_nets import SMALL, make
from tests.serve.stubs import Subtract

from allears.models.echo import EchoCanceller
from allears.serve.engines import Engine
from allears.serve.limits import Limits
from allears.serve.live import LiveSession
from allears.serve.protocol import AUDIO, FLOAT32, Code, Frame, Refusal

RATE, HOP = SMALL.sample_rate_hz, SMALL.hop
CANCELLER = EchoCanceller(make(), device="cpu")


def frame(sequence, mic, reference, repaired=False):
    return Frame(AUDIO, FLOAT32, sequence, mic.astype(np.float32), reference.astype(np.float32), repaired)


def session(**limits):
    return LiveSession(CANCELLER.net, RATE, Limits(**limits))


def worked(live):
    """All that is done of what waits."""
    parts = [np.zeros(0, np.float32)]
    while (piece := live.next_piece()) is not None:
        parts.append(live.work(piece).near)
        if piece.last:
            break
    return np.concatenate(parts)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=12), st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_frames_of_any_sizes_give_what_the_canceller_gives(sizes, first, piece):
    rng = np.random.default_rng(len(sizes))
    signals = [0.1 * rng.standard_normal((2, size)).astype(np.float32) for size in sizes]
    live, parts = session(piece_s=piece / RATE), []
    for number, (mic, reference) in enumerate(signals):
        live.accept(frame((first + number) % 2**32, mic, reference))
        parts.append(worked(live))
    live.end()
    got = np.concatenate([*parts, worked(live)])
    mic, reference = np.concatenate(signals, axis=1)
    assert got.shape == mic.shape and live.received == len(mic) and not live.counts.total()
    if len(mic):
        np.testing.assert_allclose(got, CANCELLER(mic, reference, RATE), atol=2e-5)


def test_silence_stands_for_frames_that_are_missing():
    rng = np.random.default_rng(1)
    signals = 0.1 * rng.standard_normal((6, 2, 50)).astype(np.float32)
    live = session()
    for number in (0, 1, 4, 5):
        live.accept(frame(number, *signals[number]))
    live.end()
    signals[2:4] = 0
    mic, reference = signals.transpose(1, 0, 2).reshape(2, -1)
    np.testing.assert_allclose(worked(live), CANCELLER(mic, reference, RATE), atol=2e-5)
    assert +live.counts == {"dropped": 2}


def test_a_gap_is_filled_up_to_a_limit():
    live = session(gap_s=0.1)
    live.accept(frame(0, np.zeros(400), np.zeros(400)))
    live.accept(frame(2**31 - 1, np.zeros(400), np.zeros(400)))
    assert live.waiting == 400 + 1600 + 400 and live.counts["dropped"] == 2**31 - 2
    live = session()  # a gap behind a frame of no samples
    live.accept(frame(0, np.zeros(0), np.zeros(0)))
    live.accept(frame(9, np.zeros(7), np.zeros(7)))
    assert live.waiting == 7


def test_what_came_already_or_late_is_left_out():
    rng = np.random.default_rng(2)
    signals = 0.1 * rng.standard_normal((3, 2, 64)).astype(np.float32)
    live = session()
    taken = [live.accept(frame(number, *signals[min(number, 2)])) for number in (0, 1, 1, 2, 0)]
    live.end()
    assert taken == [True, True, False, True, False]
    mic, reference = signals.transpose(1, 0, 2).reshape(2, -1)
    np.testing.assert_allclose(worked(live), CANCELLER(mic, reference, RATE), atol=2e-5)
    assert live.counts["duplicated"] == 1 and live.counts["late"] == 1


def test_a_reference_that_is_missing_for_seconds_stops_nothing():
    """Its part is done with silence."""
    rng = np.random.default_rng(3)
    mic, reference = 0.1 * rng.standard_normal((2, 2 * RATE)).astype(np.float32)
    live, parts = LiveSession(Engine(Subtract(), 1), RATE, Limits()), []
    for number, begin in enumerate(range(0, len(mic), 320)):
        here = slice(begin, begin + 320)
        live.accept(frame(number, mic[here], np.zeros(0) if 12 <= number < 75 else reference[here]))
        parts.append(worked(live))
    live.end()
    near = np.concatenate([*parts, worked(live)])
    assert near.shape == mic.shape and np.isfinite(near).all()
    silent = reference.copy()
    silent[12 * 320 : 75 * 320] = 0
    sure = slice(0, 75 * 320 - RATE // 5)  # what waits at most when the reference comes again
    np.testing.assert_allclose(near[sure], (mic - silent)[sure], atol=1e-6)


def test_a_reference_too_far_ahead_is_refused_in_words():
    live = session()
    live.accept(frame(0, np.zeros(10), np.zeros(11 * RATE)))
    with pytest.raises(Refusal, match=r"11.0 s ahead of the microphone; at most 10 s") as told:
        live.work(live.next_piece()._replace(reference=np.zeros(11 * RATE, np.float32)))
    assert told.value.code is Code.BAD_FRAME


def test_a_network_gone_wrong_is_told(monkeypatch):
    live = session()
    monkeypatch.setattr(live._stream, "push", lambda mic, reference: np.full(5, np.nan, np.float32))
    live.accept(frame(0, np.zeros(5), np.zeros(5)))
    with pytest.raises(Refusal, match="no numbers") as told:
        live.work(live.next_piece())
    assert told.value.code is Code.FAULT


def test_pieces_are_short_and_the_last_is_told():
    live = session(piece_s=0.01)
    live.accept(frame(0, np.zeros(400), np.zeros(250)))
    live.end()
    pieces = []
    while (piece := live.next_piece()) is not None:
        pieces.append((len(piece.mic), len(piece.reference), piece.last))
        if piece.last:
            break
    assert pieces == [(160, 160, False), (160, 90, False), (80, 0, True)]
    empty = session()
    assert empty.next_piece() is None
    empty.end()
    result = empty.work(empty.next_piece())
    assert result.near.size == 0 and np.isnan(result.voice)


def test_facts_of_the_newest_frame_come_with_it():
    live = session()
    live.accept(frame(0, *0.1 * np.random.default_rng(4).standard_normal((2, 10 * HOP))))
    result = live.work(live.next_piece())
    assert 0 <= result.delay_ms <= 1000 * SMALL.align_frames * SMALL.hop_s and 0 <= result.voice <= 1
    assert live.latency_ms == 4.0
