import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.kalman import KalmanConfig, KalmanEchoFilter, aligned

RATE = 16_000


def white(seconds, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(int(seconds * RATE)).astype(np.float32) * 0.1)


def speech_like(seconds, seed):
    """Noise through a resonance that wanders, loud and quiet in turn by syllables."""
    rng = np.random.default_rng(seed)
    samples = int(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    shape = 1 / (1 + (frequency / 500) ** 2) + 0.1 / (1 + ((frequency - 2000) / 200) ** 2) + 0.003
    syllables = rng.uniform(0, 1, samples // 1600 + 2) ** 3
    rhythm = np.interp(np.arange(samples), 1600 * np.arange(len(syllables)), syllables)
    x = np.fft.irfft(spectrum * shape, samples) * rhythm
    return torch.from_numpy((0.1 * x / x.std()).astype(np.float32))


def path(seed, delay=40, length=2400):
    rng = np.random.default_rng(seed)
    taps = rng.standard_normal(length) * np.exp(-np.arange(length) / 400) * 0.2
    taps[0] = 1.0
    return torch.from_numpy(np.concatenate([np.zeros(delay), taps]).astype(np.float32))


def echo_of(reference, taps):
    size = 1 << (len(reference) + len(taps)).bit_length()
    return torch.fft.irfft(torch.fft.rfft(reference, size) * torch.fft.rfft(taps, size), size)[: len(reference)]


def gone_db(echo, left, begin_s, end_s):
    part = slice(int(begin_s * RATE), int(end_s * RATE))
    return float(10 * torch.log10(echo[part].square().sum() / left[part].square().sum()))


@pytest.mark.parametrize("source", [white, speech_like])
@pytest.mark.parametrize("block", [160, 256, 512])
def test_a_linear_path_is_learned_within_3_s(source, block):
    reference = source(5.0, 1)
    echo = echo_of(reference, path(2))
    left = KalmanEchoFilter(KalmanConfig(block)).run(echo, reference)
    assert gone_db(echo, left, 2.5, 3.0) > 25
    assert gone_db(echo, left, 3.0, 5.0) > 25


def test_double_talk_does_not_undo_what_was_learned():
    """The near end comes through as it is, and the echo stays gone while it talks."""
    reference, near = speech_like(8.0, 1), speech_like(8.0, 5)
    echo = echo_of(reference, path(2))
    near[: 3 * RATE] = 0
    near[6 * RATE :] = 0
    left = KalmanEchoFilter().run(echo + near, reference) - near
    assert gone_db(echo, left, 3.0, 6.0) > 15
    assert gone_db(echo, left, 6.5, 8.0) > 25


def test_double_talk_from_the_start_on():
    reference, near = speech_like(8.0, 1), speech_like(8.0, 5)
    echo = echo_of(reference, path(2))
    left = KalmanEchoFilter().run(echo + near, reference) - near
    assert gone_db(echo, left, 4.0, 8.0) > 10


def test_near_end_alone_passes_to_the_bit():
    near = speech_like(1.0, 3)
    assert torch.equal(KalmanEchoFilter().run(near, torch.zeros_like(near)), near)
    assert not KalmanEchoFilter().run(torch.zeros_like(near), near).any()


def test_a_path_that_changes_is_learned_again():
    reference = speech_like(10.0, 1)
    time = torch.arange(len(reference))
    moved = echo_of(reference, path(9, delay=900))
    echo = torch.where(time < 5 * RATE, echo_of(reference, path(2)), moved)
    left = KalmanEchoFilter().run(echo, reference)
    assert gone_db(echo, left, 4.0, 5.0) > 25
    assert gone_db(echo, left, 5.0, 5.1) < 10
    assert gone_db(echo, left, 6.0, 7.0) > 3
    assert gone_db(echo, left, 8.0, 10.0) > 25


def test_a_volume_that_is_turned_is_followed_at_once():
    reference = speech_like(6.0, 1)
    echo = echo_of(reference, path(2)) * torch.where(torch.arange(len(reference)) < 4 * RATE, 1.0, 2.0)
    assert gone_db(echo, KalmanEchoFilter().run(echo, reference), 4.4, 5.0) > 20


def test_loud_and_quiet_are_alike():
    """The filter has no scale of its own, but for the path gain that it expects."""
    reference = white(2.0, 1)
    echo = echo_of(reference, path(2))
    run = KalmanEchoFilter().run
    torch.testing.assert_close(run(1e-2 * echo, 1e-2 * reference) * 1e2, run(echo, reference), atol=1e-3, rtol=0)
    for gain in (0.1, 3.0):
        assert gone_db(gain * echo, run(gain * echo, reference), 1.0, 2.0) > 20


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 1500), st.sampled_from([64, 100]))
def test_blocks_one_by_one_equal_the_whole_and_rows_are_apart(batch, samples, block):
    generator = torch.Generator().manual_seed(samples)
    mic, reference = torch.randn(2, batch, samples, generator=generator)
    canceller = KalmanEchoFilter(KalmanConfig(block, filter_ms=20.0))
    whole = canceller.run(mic, reference)
    assert whole.shape == mic.shape
    state, at = canceller.initial_state(batch), 0
    while at + block <= samples:
        part = slice(at, at + block)
        out, state = canceller.step(mic[:, part], reference[:, part], state)
        torch.testing.assert_close(out, whole[:, part])
        at += block
    torch.testing.assert_close(canceller.run(mic[-1], reference[-1]), whole[-1], atol=1e-4, rtol=1e-4)


def test_step_leaves_the_old_state_alone():
    canceller = KalmanEchoFilter(KalmanConfig(64, filter_ms=10.0))
    x = torch.randn(1, 64)
    _, state = canceller.step(0.5 * x, x, canceller.initial_state(1))
    kept = [part.clone() for part in state]
    canceller.step(x, x, state)
    assert all(torch.equal(old, part) for old, part in zip(kept, state, strict=True))


def test_aligned_delays_by_frames():
    reference = torch.arange(1.0, 1001.0)[None]
    assert torch.equal(aligned(reference, torch.ones(1, 8).long()), reference)
    delay = torch.tensor([[3, 3, 3, 3, 5, 5, 5, 5]])
    out = aligned(reference, delay)[0]
    assert not out[:320].any() and torch.equal(out[320:560], reference[0, :240])
    assert not out[560:640].any() and torch.equal(out[640:], reference[0, :360])


def test_odd_sizes_and_refusals():
    canceller = KalmanEchoFilter()
    assert canceller.run(torch.zeros(0), torch.zeros(0)).shape == (0,)
    for call in (
        lambda: canceller.run(torch.zeros(5), torch.zeros(6)),
        lambda: canceller.run(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)),
        lambda: canceller.step(torch.zeros(1, 100), torch.zeros(1, 100), canceller.initial_state(1)),
        lambda: canceller.step(torch.zeros(2, 256), torch.zeros(2, 256), canceller.initial_state(1)),
    ):
        with pytest.raises(ValueError, match="mic, reference"):
            call()
    for name, value in (("block", 4), ("filter_ms", 0.0), ("memory", 1.0), ("smoothing", -0.1), ("path_gain", 0.0)):
        with pytest.raises(ValueError, match=name):
            KalmanConfig(**{name: value})
    assert KalmanConfig(160, 256.0).partitions == 26
