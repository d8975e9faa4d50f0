"""Streaming transform equals the offline one, however the signal is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio import stft_stream as stream
from allears.audio.stft import Stft


def cut(x, sizes):
    """``x`` in chunks of the given sizes, over and over until it is used up."""
    at, turn = 0, 0
    while at < x.shape[-1]:
        size = sizes[turn % len(sizes)] if turn < len(sizes) else max(1, sizes[turn % len(sizes)])
        yield x[..., at : at + size]
        at, turn = at + size, turn + 1


SIZES = st.lists(st.integers(0, 90), min_size=1, max_size=6)


@given(length=st.integers(1, 300), hop=st.integers(1, 12), half=st.integers(0, 12), sizes=SIZES)
@settings(max_examples=50, deadline=None)
def test_frames_equal_the_offline_ones(length, hop, half, sizes):
    stft = Stft(2 * (hop + half), hop)
    x = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    state, frames = stream.analysis_init(stft, (2,)), []
    for chunk in cut(x, sizes):
        got, state = stream.analysis_step(stft, state, chunk)
        frames.append(got)
    frames.append(stream.analysis_flush(stft, state))
    torch.testing.assert_close(torch.cat(frames, -1), stft.forward(x), atol=1e-5, rtol=0)


@given(length=st.integers(1, 300), hop=st.integers(1, 12), half=st.integers(0, 12), sizes=SIZES)
@settings(max_examples=50, deadline=None)
def test_samples_equal_the_offline_ones_for_any_spectrum(length, hop, half, sizes):
    stft = Stft(2 * (hop + half), hop)
    noise = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    X = stft.forward(noise) ** 2  # no longer the transform of any signal
    state, samples = stream.synthesis_init(stft, (2,)), []
    *first, last = cut(X, sizes)
    for frames in first:
        got, state = stream.synthesis_step(stft, state, frames)
        if state.emitted > length:  # a stream that knows its length keeps the last frames for the flush
            return
        samples.append(got)
    samples.append(stream.synthesis_flush(stft, state, length, last))
    want = stft.inverse(X, length)
    torch.testing.assert_close(torch.cat(samples, -1), want, atol=1e-5 * float(1 + want.abs().max()), rtol=0)


@given(length=st.integers(1, 300), hop=st.integers(1, 12), half=st.integers(0, 12), sizes=SIZES)
@settings(max_examples=50, deadline=None)
def test_both_in_a_row_give_the_signal_within_the_latency(length, hop, half, sizes):
    stft = Stft(2 * (hop + half), hop)
    x = torch.randn(length, generator=torch.Generator().manual_seed(length))
    analysis, synthesis, out, received = stream.analysis_init(stft), stream.synthesis_init(stft), [], 0
    for chunk in cut(x, sizes):
        frames, analysis = stream.analysis_step(stft, analysis, chunk)
        samples, synthesis = stream.synthesis_step(stft, synthesis, frames)
        out.append(samples)
        received += chunk.shape[-1]
        assert received - stream.latency_samples(stft) <= synthesis.emitted <= received
    out.append(stream.synthesis_flush(stft, synthesis, length, stream.analysis_flush(stft, analysis)))
    torch.testing.assert_close(torch.cat(out, -1), x, atol=5e-6, rtol=0)


@pytest.mark.parametrize(("n_fft", "hop"), [(512, 128), (320, 160), (20, 7)])
def test_the_latency_is_reached_and_never_passed(n_fft, hop):
    stft = Stft(n_fft, hop)
    analysis, synthesis, lags = stream.analysis_init(stft), stream.synthesis_init(stft), []
    for received in range(1, 2 * n_fft):
        frames, analysis = stream.analysis_step(stft, analysis, torch.ones(1))
        _, synthesis = stream.synthesis_step(stft, synthesis, frames)
        lags.append(received - synthesis.emitted)
    assert max(lags) == stream.latency_samples(stft)


def test_a_state_is_a_value_and_can_be_used_twice():
    stft = Stft(16, 4)
    x = torch.randn(64)
    _, state = stream.analysis_step(stft, stream.analysis_init(stft), x[:30])
    first, _ = stream.analysis_step(stft, state, x[30:])
    again, _ = stream.analysis_step(stft, state, x[30:])
    torch.testing.assert_close(first, again, atol=0, rtol=0)


def test_an_empty_stream_gives_nothing():
    stft = Stft(16, 4)
    frames, state = stream.analysis_step(stft, stream.analysis_init(stft, (3,)), torch.zeros(3, 0))
    assert frames.shape == (3, 9, 0)
    assert stream.analysis_flush(stft, state).shape == (3, 9, 0)
    assert stream.synthesis_flush(stft, stream.synthesis_init(stft, (3,)), 0).shape == (3, 0)


def test_a_flush_that_cannot_reach_the_length_says_so():
    stft = Stft(16, 4)
    X = stft.forward(torch.randn(40))
    _, state = stream.synthesis_step(stft, stream.synthesis_init(stft), X[:, :6])
    with pytest.raises(ValueError, match="40 samples need 11 frames, 6 came"):
        stream.synthesis_flush(stft, state, 40)
    with pytest.raises(ValueError, match=r"^length: 3 wanted, but 16 samples are out"):
        stream.synthesis_flush(stft, state, 3)
