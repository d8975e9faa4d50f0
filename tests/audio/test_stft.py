"""The transform against torch.stft and against its own inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.audio.stft import Stft

SHAPES = [(512, 128), (510, 128), (320, 160), (20, 7), (6, 3), (512, 100), (2, 1)]


@pytest.mark.parametrize(("n_fft", "hop"), SHAPES)
@pytest.mark.parametrize("window", ["sqrt_hann", "hann"])
def test_inverse_gives_the_signal_back_for_any_length(n_fft, hop, window):
    stft = Stft(n_fft, hop, window)
    for length in (1, 2, 63, 160, 161, 1000):
        x = torch.randn(2, 3, length)
        X = stft.forward(x)
        assert X.shape == (2, 3, stft.bins, stft.frames(length))
        torch.testing.assert_close(stft.inverse(X, length), x, atol=3e-6, rtol=0)


def test_forward_matches_torch_stft_centred_with_zeros():
    stft = Stft(512, 128)
    x = torch.randn(2, 1024)  # a multiple of the hop, where torch makes the same number of frames
    window = torch.hann_window(512, dtype=torch.float64).sqrt().float()
    want = torch.stft(x, 512, 128, window=window, center=True, pad_mode="constant", return_complex=True)
    torch.testing.assert_close(stft.forward(x), want, atol=1e-4, rtol=0)


def test_frame_n_is_centred_at_sample_n_hop():
    stft = Stft(64, 16)
    x = torch.zeros(200)
    x[5 * 16] = 1.0
    energy = stft.forward(x).abs().square().sum(0)
    assert energy.argmax() == 5
    torch.testing.assert_close(energy[3:5], energy[6:8].flip(0))  # symmetric about it


@given(length=st.integers(1, 400), hop=st.integers(1, 16), half=st.integers(0, 16))
@settings(max_examples=60, deadline=None)
def test_reconstruction_for_any_hop(length, hop, half):
    stft = Stft(2 * (hop + half), hop)
    x = torch.from_numpy(np.random.default_rng(length).standard_normal(length).astype(np.float32))
    torch.testing.assert_close(stft.inverse(stft.forward(x), length), x, atol=5e-6, rtol=0)


def test_inverse_is_least_squares_for_a_changed_spectrum():
    stft = Stft(32, 8)
    length = 50
    X = torch.randn(17, stft.frames(length), dtype=torch.complex64)
    X[0].imag.zero_()
    X[-1].imag.zero_()
    # The answer, framed and windowed, is as near to the given frames as any signal can be: the gradient is zero.
    frames = torch.fft.irfft(X.transpose(-1, -2), n=32)
    y = torch.nn.functional.pad(stft.inverse(X, length), (16, frames.shape[0] * 8)).requires_grad_()
    loss = (y.unfold(-1, 32, 8)[: frames.shape[0]] * stft.window_on(y.device) - frames).square().sum()
    loss.backward()
    assert y.grad[16 : 16 + length].abs().max() < 1e-5
    assert y.grad.abs().max() > 1e-2


def test_gradients_match_the_numeric_ones():
    stft = Stft(16, 4)
    x = torch.randn(30, requires_grad=True)
    direction = torch.randn(30)

    def value(signal):
        X = stft.forward(signal)
        return stft.inverse(X * X.abs(), 30).square().sum()

    (grad,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        step = 1e-2
        numeric = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((grad * direction).sum(), numeric, rtol=5e-3, atol=1e-2)


def test_low_precision_input_and_autocast_are_computed_in_float32():
    stft = Stft(64, 16)
    x = torch.randn(300)
    want = stft.forward(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = stft.forward(x)
        back = stft.inverse(got, 300)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    torch.testing.assert_close(back, x, atol=3e-6, rtol=0)
    half = x.to(torch.bfloat16)
    torch.testing.assert_close(stft.forward(half), stft.forward(half.float()), atol=0, rtol=0)


def test_a_window_first_made_under_inference_mode_serves_training():
    stft = Stft(26, 5)  # a size that no other test has cached
    with torch.inference_mode():
        stft.forward(torch.randn(40))
    x = torch.randn(40, requires_grad=True)
    stft.forward(x).abs().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:Torchinductor")
def test_compiles_into_one_graph():
    stft = Stft(64, 16)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def half(x):
        return stft.inverse(stft.forward(x) * 0.5, x.shape[-1])

    x = torch.randn(2, 333)
    torch.testing.assert_close(half(x), 0.5 * x, atol=3e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((511, 128), "n_fft"),
        ((0, 1), "n_fft"),
        ((512, 257), "hop"),
        ((512, 0), "hop"),
        ((512, 128, "kaiser"), "window"),
    ],
)
def test_bad_settings_are_named(values, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        Stft(*values)


def test_bad_shapes_are_named():
    stft = Stft(64, 16)
    with pytest.raises(ValueError, match=r"^length:"):
        stft.forward(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="33"):
        stft.inverse(torch.zeros(32, 10, dtype=torch.complex64), 100)
    with pytest.raises(ValueError, match="8 frames"):
        stft.inverse(torch.zeros(33, 7, dtype=torch.complex64), 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    stft = Stft(512, 128)
    x = torch.randn(2, 4001)
    X = stft.forward(x.cuda())
    torch.testing.assert_close(X.cpu(), stft.forward(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(stft.inverse(X, 4001).cpu(), x, atol=3e-6, rtol=0)
