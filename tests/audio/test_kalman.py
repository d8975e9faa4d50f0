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
@pytest.mark.parametrize("block", [160, 256])
def test_a_linear_path_is_learned_within_3_s(source, block):
    reference = source(5.0, 1)
    echo = echo_of(reference, path(2))
    left = KalmanEchoFilter(KalmanConfig(block))(echo, reference)[0]
    assert gone_db(echo, left, 2.5, 3.0) > 25
    assert gone_db(echo, left, 3.0, 5.0) > 25


def test_double_talk_does_not_undo_what_was_learned():
    """The near end comes through as it is, and the echo stays gone while it talks."""
    reference, near = speech_like(8.0, 1), speech_like(8.0, 5)
    echo = echo_of(reference, path(2))
    near[: 3 * RATE] = 0
    near[6 * RATE :] = 0
    left = KalmanEchoFilter()(echo + near, reference)[0] - near
    assert gone_db(echo, left, 3.0, 6.0) > 15
    assert gone_db(echo, left, 6.5, 8.0) > 25


def test_double_talk_from_the_start_on():
    reference, near = speech_like(8.0, 1), speech_like(8.0, 5)
    echo = echo_of(reference, path(2))
    left = KalmanEchoFilter()(echo + near, reference)[0] - near
    assert gone_db(echo, left, 4.0, 8.0) > 10


def test_near_end_alone_passes_to_the_bit():
    near = speech_like(1.0, 3)
    assert torch.equal(KalmanEchoFilter()(near, torch.zeros_like(near))[0], near)
    assert not KalmanEchoFilter()(torch.zeros_like(near), near)[0].any()


def test_a_path_that_changes_is_learned_again():
    reference = speech_like(10.0, 1)
    time = torch.arange(len(reference))
    moved = echo_of(reference, path(9, delay=900))
    echo = torch.where(time < 5 * RATE, echo_of(reference, path(2)), moved)
    left = KalmanEchoFilter()(echo, reference)[0]
    assert gone_db(echo, left, 4.0, 5.0) > 25
    assert -3 < gone_db(echo, left, 5.0, 5.5) < 6  # what was known is worth nothing, but is not held on to
    assert gone_db(echo, left, 7.0, 8.0) > 4
    assert gone_db(echo, left, 9.0, 10.0) > 20


def test_a_path_that_is_turned_round_is_forgotten_and_learned_anew():
    """What is known then doubles the echo: no longer than it takes to see that."""
    reference = white(4.0, 1)
    echo = echo_of(reference, path(2)) * torch.where(torch.arange(len(reference)) < 2 * RATE, 1.0, -1.0)
    left = KalmanEchoFilter()(echo, reference)[0]
    assert gone_db(echo, left, 2.0, 2.05) < -3
    assert gone_db(echo, left, 2.2, 2.4) > 0
    assert gone_db(echo, left, 3.0, 4.0) > 15


def test_loud_and_quiet_are_alike():
    """The filter has no scale of its own, but for the path gain that it expects."""
    reference = white(2.0, 1)
    echo = echo_of(reference, path(2))

    def run(mic, reference):
        return KalmanEchoFilter()(mic, reference)[0]

    torch.testing.assert_close(run(1e-2 * echo, 1e-2 * reference) * 1e2, run(echo, reference), atol=1e-3, rtol=0)
    for gain in (0.1, 2.0):
        assert gone_db(gain * echo, run(gain * echo, reference), 1.0, 2.0) > 20


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(0, 900), st.sampled_from([64, 100]))
def test_blocks_one_by_one_equal_the_whole_and_rows_are_apart(batch, samples, block):
    mic, reference = torch.randn(2, batch, samples, generator=torch.Generator().manual_seed(samples))
    canceller = KalmanEchoFilter(KalmanConfig(block, filter_ms=20.0))
    whole = canceller(mic, reference)
    torch.testing.assert_close(whole[0] + whole[1], mic)
    state = canceller.initial_state(batch)
    for at in range(0, samples - block + 1, block):
        part = slice(at, at + block)
        error, echo, state = canceller.step(mic[:, part], reference[:, part], state)
        torch.testing.assert_close((error, echo), (whole[0][:, part], whole[1][:, part]))
    torch.testing.assert_close(canceller(mic[-1], reference[-1])[0], whole[0][-1], atol=1e-4, rtol=1e-4)


def test_a_step_is_the_kalman_equations_bin_by_bin():
    """The second block of two partitions of one tap grid each, written out with explicit sums."""
    config = KalmanConfig(16, filter_ms=2.0, memory=0.9, spread=0.25, smoothing=0.8)
    canceller, generator = KalmanEchoFilter(config), torch.Generator().manual_seed(0)
    mic, far = torch.randn(2, 1, 32, generator=generator).double()
    _, _, state = canceller.step(mic[:, :16].float(), far[:, :16].float(), canceller.initial_state(1))
    state = state._replace(energies=torch.tensor([[0.0, 1e3]]))  # the path is not wrong
    error, echo, after = canceller.step(mic[:, 16:].float(), far[:, 16:].float(), state)

    spectra = [np.fft.rfft(far[0].numpy()), np.fft.rfft(np.r_[np.zeros(16), far[0, :16].numpy()])]
    path, doubt = state.path[0].numpy(), state.doubt[0].numpy()
    wanted = np.fft.irfft(spectra[0] * path[0] + spectra[1] * path[1])[16:]
    np.testing.assert_allclose(echo[0], wanted, atol=1e-5)
    seen = np.fft.rfft(np.r_[np.zeros(16), mic[0, 16:].numpy() - wanted])
    keep, size = 0.9 ** (2 * 0.1), np.abs(path) ** 2
    doubt = keep * doubt + (1 - keep) * (0.75 * size + 0.25 * size.mean(0))
    unsure = sum(np.abs(x) ** 2 * p for x, p in zip(spectra, doubt, strict=True))
    share = 0.8**0.1
    near = share * state.near[0].numpy() + (1 - share) * np.maximum(np.abs(seen) ** 2 - unsure / 2, 0)
    near = np.maximum(near, 0.15 * np.abs(seen) ** 2)
    for p in range(2):
        gain = doubt[p] / (unsure + 2 * near)
        taps = np.fft.irfft(gain * spectra[p].conj() * seen)
        taps[16:] = 0
        np.testing.assert_allclose(after.path[0, p], path[p] + np.fft.rfft(taps), atol=1e-4)
        np.testing.assert_allclose(after.doubt[0, p], doubt[p] * (1 - gain * np.abs(spectra[p]) ** 2 / 2), atol=1e-5)
    np.testing.assert_allclose(error[0], mic[0, 16:].numpy() - wanted, atol=1e-5)


def test_step_leaves_the_old_state_alone():
    canceller = KalmanEchoFilter(KalmanConfig(64, filter_ms=10.0))
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    *_, state = canceller.step(0.5 * x, x, canceller.initial_state(1))
    kept = [part.clone() for part in state]
    canceller.step(x, x, state)
    assert all(torch.equal(old, part) for old, part in zip(kept, state, strict=True))


def test_aligned_by_one_delay_or_by_frames():
    reference = torch.arange(1.0, 1001.0)[None]
    assert torch.equal(aligned(reference, torch.tensor([160])), reference)
    out = aligned(reference, torch.tensor([250]), early=100)[0]
    assert not out[:150].any() and torch.equal(out[150:], reference[0, :850])
    out = aligned(reference, 160 * torch.tensor([[3, 3, 3, 3, 5, 5, 5, 5]]))[0]
    assert not out[:320].any() and torch.equal(out[320:560], reference[0, :240])
    assert not out[560:640].any() and torch.equal(out[640:], reference[0, :360])
    two = aligned(reference.expand(2, -1), torch.tensor([160.0, 161.0]))
    assert torch.equal(two[1, 1:], two[0, :-1])
    with pytest.raises(ValueError, match=r"delay_samples: got shape \(7,\)"):
        aligned(reference, torch.zeros(7))


def test_odd_sizes_and_refusals():
    canceller = KalmanEchoFilter()
    assert [x.shape for x in canceller(torch.zeros(0), torch.zeros(0))] == [(0,), (0,)]
    assert canceller(torch.zeros(3, 0), torch.zeros(3, 0))[0].shape == (3, 0)
    assert canceller(torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, 5))[1].dtype == torch.float32
    for call in (
        lambda: canceller(torch.zeros(5), torch.zeros(6)),
        lambda: canceller(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5)),
        lambda: canceller.step(torch.zeros(1, 100), torch.zeros(1, 100), canceller.initial_state(1)),
        lambda: canceller.step(torch.zeros(2, 160), torch.zeros(2, 160), canceller.initial_state(1)),
    ):
        with pytest.raises(ValueError, match=r"mic, reference|mic_block, reference_block"):
            call()
    for name, value in (("block", 4), ("filter_ms", 0.0), ("memory", 1.0), ("smoothing", -0.1), ("path_gain", 0.0)):
        with pytest.raises(ValueError, match=name):
            KalmanConfig(**{name: value})
    assert KalmanConfig(160, 256.0).partitions == 26
