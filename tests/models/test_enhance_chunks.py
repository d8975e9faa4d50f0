"""Windows and cross-fades: what comes out does not depend on how the signal was cut on its way in."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allears.models.enhance import PRESETS
from allears.models.enhance.chunks import ChunkedEnhancer, prior_noise

CONFIG = PRESETS["test"]
SHIFT, WINDOW = 80_000, 96_000
GUARD, FADE = 4_000, 8_000
SIZES = st.tuples(st.integers(5_000, 300_000), st.integers(0, 300), st.integers(0, 300_000)).map(list)


def identity(windows, noise):
    return windows


def feed(chunked: ChunkedEnhancer, x: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Push ``x`` in pieces of ``sizes``, over and over."""
    out, at, turn = [], 0, 0
    while at < x.shape[1]:
        out.append(chunked.push(x[:, at : at + sizes[turn % len(sizes)]]))
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return np.concatenate([*out, chunked.flush()], axis=1)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 260_000) | st.sampled_from([k * SHIFT + r for k in (1, 2) for r in (0, 16_000, 16_001)]),
    sizes=SIZES,
    channels=st.integers(1, 2),
    batch=st.sampled_from([1, 3]),
)
@example(length=1, sizes=[1], channels=1, batch=1)
@example(length=WINDOW, sizes=[WINDOW], channels=1, batch=1)
@example(length=WINDOW + 1, sizes=[WINDOW, 1], channels=1, batch=3)
@example(length=3 * SHIFT, sizes=[SHIFT], channels=2, batch=3)
@example(length=WINDOW + 2 * SHIFT, sizes=[300_000], channels=1, batch=3)
def test_identity_gives_the_input_back(length, sizes, channels, batch):
    x = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    y = feed(ChunkedEnhancer(CONFIG, channels, identity, batch=batch), x, sizes)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, x, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 360_000), sizes=SIZES)
@example(length=300_000, sizes=[300_000])
def test_cuts_and_batch_size_change_no_sample(length, sizes):
    """With a run that uses the noise, so a window at another place or with other noise would show."""

    def run(windows, noise):
        return windows * noise.mean((1, 2, 3))[:, None] + noise[:, :1, 0, 0]

    x = np.random.default_rng(length).uniform(-1, 1, (2, length)).astype(np.float32)
    whole = feed(ChunkedEnhancer(CONFIG, 2, run, seed=5), x, [length])
    np.testing.assert_array_equal(feed(ChunkedEnhancer(CONFIG, 2, run, seed=5), x, sizes), whole)
    np.testing.assert_allclose(feed(ChunkedEnhancer(CONFIG, 2, run, 5, batch=3), x, sizes), whole, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_windows_share_each_sample_in_weights_that_sum_to_one(batch):
    """A ramp tells each window's place; a run that answers 1 in one window alone shows that window's weights."""
    length = WINDOW + 2 * SHIFT - 30_000
    x = np.arange(1, length + 1, dtype=np.float32)[None]

    def weights_of(index):
        def run(windows, noise):
            return ((windows[:, :1] - 1) == index * SHIFT).float().expand_as(windows)

        return feed(ChunkedEnhancer(CONFIG, 1, run, batch=batch), x, [50_000])[0]

    weights = np.stack([weights_of(index) for index in range(3)])
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
    assert weights.min() >= 0
    for index in range(2):  # each hands over to the next between the guards of the overlap
        begin = (index + 1) * SHIFT + GUARD
        assert (weights[index, begin - 1], weights[index + 1, begin - 1]) == (1, 0)
        assert (weights[index, begin + FADE], weights[index + 1, begin + FADE]) == (0, 1)
        assert (np.diff(weights[index + 1, begin : begin + FADE]) > -1e-7).all()
        assert weights[index, begin + FADE // 2] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_memory_does_not_grow_with_the_signal(batch):
    chunked = ChunkedEnhancer(CONFIG, 1, identity, batch=batch)
    block = np.full((1, 30_000), 0.1, np.float32)
    given, out, most = 0, 0, 0
    for _ in range(30):
        out += chunked.push(block).shape[1]
        given += block.shape[1]
        most = max(most, chunked._waiting.shape[1])
        assert given - out <= WINDOW + batch * SHIFT
    assert most <= WINDOW + (batch - 1) * SHIFT
    assert out + chunked.flush().shape[1] == given


def test_silent_channels_stay_silent_and_are_not_run():
    seen = []

    def run(windows, noise):
        seen.append(len(windows))
        return windows + 1

    x = np.zeros((3, 150_000), np.float32)
    x[1] = 0.5
    y = feed(ChunkedEnhancer(CONFIG, 3, run, batch=4), x, [150_000])
    assert (y[[0, 2]] == 0).all()
    np.testing.assert_allclose(y[1], 1.5, atol=1e-6)
    assert sum(seen) == 2  # one channel, two windows


def test_noise_follows_the_place_and_seed():
    whole = prior_noise(CONFIG, 0, 800, seed=9)
    assert whole.shape == (800, 256, 2)
    assert whole.mean().abs() < 0.01 and abs(whole.std() - 1) < 0.01
    for first, frames in ((0, 1), (124, 2), (125, 125), (625, 175), (333, 300)):
        assert torch.equal(prior_noise(CONFIG, first, frames, 9), whole[first : first + frames])
    for seed in (8, 1):
        assert (prior_noise(CONFIG, 0, 800, seed) * whole).mean().abs() < 0.01
    assert (whole[:125] * whole[125:250]).mean().abs() < 0.02
