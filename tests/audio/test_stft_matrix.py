"""The transform by matrices against the one by FFT."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.stft import Stft
from allears.audio.stft_matrix import MatrixStft, analysis_matrix, synthesis_matrix

SHAPES = [(16, 8), (20, 7), (6, 3), (2, 1), (32, 5)]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(SHAPES), st.sampled_from(["sqrt_hann", "hann"]), st.integers(1, 100), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_it_is_the_transform_and_its_inverse_at_any_length(shape, window, length, batch):
    stft = Stft(*shape, window)
    by_matrix, x = MatrixStft(stft), drawn(batch, length)
    wanted = torch.view_as_real(stft.forward(x)).transpose(1, 2)
    torch.testing.assert_close(by_matrix(x), wanted, rtol=0, atol=1e-5)
    made = drawn(*wanted.shape, seed=1)
    back = stft.inverse(torch.view_as_complex(made).transpose(1, 2), length)
    torch.testing.assert_close(by_matrix.inverse(made, length), back, rtol=1e-5, atol=1e-5 * float(back.abs().max()))


def test_a_window_of_the_size_that_is_used():
    stft = Stft(512, 256)
    by_matrix, x = MatrixStft(stft), drawn(1, 1001)
    spectrum = by_matrix(x)
    wanted = torch.view_as_real(stft.forward(x)).transpose(1, 2)
    torch.testing.assert_close(spectrum, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(by_matrix.inverse(spectrum, 1001), x, rtol=0, atol=1e-5)


def test_matrices_transform_one_frame():
    stft, frame = Stft(12, 4), drawn(12)
    spectrum = stft.transform_frames(frame)[:, 0]
    parts = torch.cat([spectrum.real, spectrum.imag])
    torch.testing.assert_close(frame @ analysis_matrix(stft), parts)
    window = stft.window_on(torch.device("cpu"))
    torch.testing.assert_close(parts @ synthesis_matrix(stft), frame * window**2)


def test_the_inverse_takes_the_first_and_the_last_bin_as_real():
    """As the inverse FFT does: masks give these bins imaginary parts, which no signal has."""
    by_matrix, spectrum = MatrixStft(Stft(8, 4)), drawn(1, 3, 5, 2)
    other = spectrum.clone()
    other[:, :, [0, -1], 1] += 7.0
    assert torch.equal(by_matrix.inverse(spectrum, 8), by_matrix.inverse(other, 8))


def test_it_has_nothing_to_store():
    assert not MatrixStft(Stft(8, 4)).state_dict()


@pytest.mark.parametrize("shape", [(16, 8), (20, 7)])
def test_gradients_are_those_of_the_transform(shape):
    stft = Stft(*shape)
    by_matrix, x = MatrixStft(stft), drawn(1, 37).requires_grad_()
    slope = drawn(*by_matrix(x).shape, seed=2)
    grads = [
        torch.autograd.grad((y * slope).sum(), x)[0]
        for y in (by_matrix(x), torch.view_as_real(stft.forward(x)).transpose(1, 2))
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)
