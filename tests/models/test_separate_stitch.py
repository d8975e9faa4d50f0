"""Windows of the separator: talkers stay on their output, and the way in changes no sample."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.models.split_nets import RATE_HZ, SplitNet, mix, speech, swaps

from allears.models.separate import Separator
from allears.models.separate.chunks import ChunkedSeparator
from allears.models.separate.stitch import Stitcher

SLOW_HZ, WINDOW_S = 100, 15.0
WINDOW, SHIFT, OVERLAP = 1500, 1000, 500


def chunked(net, rate_hz: int = SLOW_HZ, window_s: float = WINDOW_S) -> ChunkedSeparator:
    return ChunkedSeparator(Separator(net, "cpu")._run, net.config.talkers, rate_hz, window_s)


def feed(core: ChunkedSeparator, x: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Push ``x`` (S,) in pieces of ``sizes``, over and over."""
    out, at, turn = [], 0, 0
    while at < len(x):
        out.append(core.push(x[None, at : at + sizes[turn % len(sizes)]]))
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return np.concatenate([*out, core.flush()], axis=1)


def turns(sources: np.ndarray, longest_pause_s: float, seed: int, overlap: float = 0.3) -> np.ndarray:
    """Silences the sources (J, S) so that they speak in turns of 1 to 8 s, after pauses, sometimes into one another."""
    rng = np.random.default_rng(seed)
    gates = np.zeros_like(sources)
    at, speaker = 0.0, 0
    while at * RATE_HZ < sources.shape[1]:
        length = rng.uniform(1, 8)
        gates[speaker, round(at * RATE_HZ) : round((at + length) * RATE_HZ)] = 1
        speaker = (speaker + rng.integers(1, len(sources))) % len(sources)
        at += length - rng.uniform(0, 1) if rng.random() < overlap else length + rng.uniform(0, longest_pause_s)
    return sources * gates


def silent_overlaps(sources: np.ndarray, window_s: float) -> int:
    """In how many overlaps of windows nobody speaks."""
    shift, overlap = round((window_s - 5) * RATE_HZ), 5 * RATE_HZ
    starts = range(shift, sources.shape[1] - overlap, shift)
    return sum(not sources[:, at : at + overlap].any() for at in starts)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 6000) | st.sampled_from([k * SHIFT + r for k in (1, 2) for r in (0, 499, 500, 501)]),
    sizes=st.tuples(st.integers(50, 6000), st.integers(0, 300), st.integers(0, 3000)).map(list),
    talkers=st.integers(1, 3),
)
@example(length=1, sizes=[1], talkers=2)
@example(length=WINDOW, sizes=[WINDOW], talkers=2)
@example(length=WINDOW + 1, sizes=[WINDOW, 1], talkers=3)
@example(length=4 * SHIFT, sizes=[SHIFT], talkers=2)
def test_cuts_change_no_sample(length, sizes, talkers):
    x = mix(speech(talkers, length / SLOW_HZ, seed=length, rate_hz=SLOW_HZ))
    whole = feed(chunked(SplitNet(talkers)), x, [length])
    assert whole.shape == (talkers, length)
    np.testing.assert_array_equal(feed(chunked(SplitNet(talkers)), x, sizes), whole)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(20, 8000), talkers=st.integers(1, 3), seed=st.integers(0, 99))
@example(length=WINDOW + SHIFT, talkers=3, seed=0)
def test_windows_of_a_net_without_memory_give_what_one_pass_gives(length, talkers, seed):
    sources = speech(talkers, length / SLOW_HZ, seed, SLOW_HZ)
    one_pass = feed(chunked(SplitNet(talkers, flips=False), window_s=1000), mix(sources), [length])
    np.testing.assert_array_equal(one_pass, sources)
    windows = feed(chunked(net := SplitNet(talkers)), mix(sources), [700])
    assert len(net.windows) == (1 if length <= WINDOW else 1 + -(-(length - WINDOW) // SHIFT))
    first = feed(chunked(SplitNet(talkers)), mix(sources)[:WINDOW], [WINDOW])  # its order is the order
    order = [int(np.argmin(np.abs(sources[:, : first.shape[1]] - row).sum(1))) for row in first]
    np.testing.assert_allclose(windows, sources[order], atol=1e-6)


def test_windows_hand_over_in_the_middle_of_the_overlap():
    """A net that answers with the number of its calls shows where each window is heard."""
    calls = []

    def run(window):
        calls.append(len(window))
        return np.full((1, len(window)), len(calls), np.float32), np.ones((1, 4), np.float32)

    x = np.ones((1, 2 * SHIFT + 700), np.float32)
    core = ChunkedSeparator(run, 1, SLOW_HZ, WINDOW_S)
    y = np.concatenate([core.push(x), core.flush()], axis=1)[0]
    assert calls == [WINDOW, WINDOW, 700]
    for index, at in enumerate((SHIFT, 2 * SHIFT), start=1):
        assert (y[at : at + 150] == index).all() and (y[at + 350 : at + OVERLAP] == index + 1).all()
        assert (np.diff(y[at + 150 : at + 350]) > 0).all()
        assert y[at + 250] == pytest.approx(index + 0.5, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("talkers", "pause_s", "leak"), [(2, 1.0, 0.0), (2, 12.0, 0.0), (3, 12.0, 0.0), (3, 8.0, 0.05)]
)
def test_ten_minutes_of_alternation_without_a_swap(talkers, pause_s, leak, seed):
    sources = turns(speech(talkers, 600, seed), pause_s, seed)
    net = SplitNet(talkers, leak=leak)
    y = feed(chunked(net, RATE_HZ, 30.0), mix(sources), [50_000])
    assert len(net.windows) == 24
    if pause_s > 5:
        assert silent_overlaps(sources, 30.0) >= 1
    assert swaps(y, sources) == 0
    order = [int(np.argmax(row @ sources.T)) for row in y]
    if not leak:
        np.testing.assert_allclose(y, sources[order], atol=1e-6)


def test_without_fingerprints_silence_would_swap_them():
    """What the test above sees when the fingerprints say nothing: it can fail."""
    sources = turns(speech(3, 600, 0), 12.0, 0)
    y = feed(chunked(SplitNet(3, prints=False), RATE_HZ, 30.0), mix(sources), [50_000])
    assert swaps(y, sources) > 0


def test_a_muddled_order_would_show():
    """The same for the stitching as a whole."""
    net = SplitNet(2)
    sources = turns(speech(2, 120, 0), 1.0, 0)
    shift = 25 * RATE_HZ
    run = Separator(net, "cpu")._run
    parts = [run(mix(sources)[at : at + shift])[0] for at in range(0, sources.shape[1], shift)]
    assert swaps(np.concatenate(parts, axis=1), sources) > 0


def stitched(stitcher: Stitcher, before, outputs, prints) -> list[int]:
    prints = np.asarray(prints, np.float32)
    return stitcher.order(before, np.asarray(outputs, np.float32), prints).tolist()


def test_the_ear_outweighs_wrong_fingerprints():
    a, b = speech(2, 2, rate_hz=SLOW_HZ)
    stitcher = Stitcher(2, SLOW_HZ)
    assert stitched(stitcher, None, [a, b], np.eye(2)) == [0, 1]
    assert stitched(stitcher, np.stack([a, b]), [b, a], np.eye(2)) == [1, 0]
    assert stitched(stitcher, np.stack([a, 0 * b]), [0 * b, a], np.eye(2)) == [1, 0]  # one speaks in the overlap


@pytest.mark.parametrize("quieter_db", [0, 10, 20])
def test_a_quiet_talker_is_matched_by_ear_too(quieter_db):
    a, b, c = speech(3, 5, rate_hz=1000)
    b, c = b * 10 ** (-quieter_db / 20), c * 10 ** (-quieter_db / 20)
    stitcher = Stitcher(3, 1000)
    stitched(stitcher, None, [a, b, c], np.ones((3, 2)))
    assert stitched(stitcher, np.stack([a, b, c]), [c, a, b], np.ones((3, 2))) == [1, 2, 0]


def test_fingerprints_decide_after_a_pause_and_a_new_talker_takes_a_free_output():
    silence = np.zeros((3, 500), np.float32)
    a, b, c = speech(3, 20, rate_hz=SLOW_HZ)
    quiet = 0 * a
    common = np.full(3, 3.0)
    tells = common + np.eye(3)
    stitcher = Stitcher(3, SLOW_HZ)
    assert stitched(stitcher, None, [a, b, quiet], [tells[0], tells[1], [9, -9, 0]]) == [0, 1, 2]
    outputs = [np.concatenate([np.zeros(500, np.float32), x]) for x in (c, quiet, a)]
    assert stitched(stitcher, silence, outputs, [tells[2], [0, 5, -5], tells[0]]) == [2, 1, 0]
    outputs = [np.concatenate([np.zeros(500, np.float32), x]) for x in (b, c, a)]
    assert stitched(stitcher, silence, outputs, [tells[1], tells[2], tells[0]]) == [2, 0, 1]


def test_things_stay_where_nothing_tells():
    stitcher = Stitcher(3, SLOW_HZ)
    silence = np.zeros((3, 1500), np.float32)
    for before in (None, silence[:, :500], silence[:, :500]):
        assert stitched(stitcher, before, silence, np.zeros((3, 4))) == [0, 1, 2]


def test_silent_windows_are_not_run_and_teach_nothing():
    sources = speech(2, 60, 3)
    sources[:, 20 * RATE_HZ : 40 * RATE_HZ] = 0
    net = SplitNet(2)
    y = feed(chunked(net, RATE_HZ, 10.0), mix(sources), [9_000])
    assert len(net.windows) == 11 - 3  # windows of 10 s begin every 5 s up to 50 s; three lie within 20 to 40 s
    assert swaps(y, sources) == 0 and not y[:, 20 * RATE_HZ : 40 * RATE_HZ].any()


def test_memory_does_not_grow_with_the_signal():
    core = chunked(SplitNet(2))
    block = mix(speech(2, 3, rate_hz=SLOW_HZ))[None]
    given_, out = 0, 0
    for _ in range(60):
        out += core.push(block).shape[1]
        given_ += block.shape[1]
        assert given_ - out <= WINDOW + block.shape[1]
        assert sum(len(part) for part in core._waiting) <= WINDOW + block.shape[1]
    assert out + core.flush().shape[1] == given_


@pytest.mark.parametrize("window_s", [9.9, 0, -1, float("nan")])
def test_windows_that_are_too_short_are_refused(window_s):
    with pytest.raises(ValueError, match=r"one_pass_s: .* given; at least 10 s"):
        chunked(SplitNet(2), window_s=window_s)
