"""Depthwise convolution over (B, L, C): the reference against a loop, and the Triton kernels, interpreted where there
is no GPU, against the reference.

Shapes: B batch, L rows, C channels, K taps.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from allears.ops.conv.depthwise import depthwise_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(2, 37, 6, 5, 1, 2), (1, 100, 20, 65, 1, 32), (2, 33, 70, 5, 2, 2), (2, 1, 4, 3, 1, 1), (1, 300, 8, 3, 1, 1)]


def problem(batch, rows, channels, taps, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shapes = (batch, rows, channels), (channels, 1, taps), (channels,)
    return [torch.randn(shape, generator=rng).to(DEVICE, dtype) for shape in shapes]


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 2), (2, 1), (3, 4)])
def test_reference_is_the_sum_it_says(stride, padding):
    x, weight, bias = problem(2, 11, 3, 4, torch.float64)
    y = depthwise_conv(x, weight, bias, stride=stride, padding=padding, kernel="reference")
    rows = (11 + 2 * padding - 4) // stride + 1
    assert y.shape == (2, rows, 3)
    for i in range(rows):
        expected = bias.clone().expand(2, 3)
        for k in range(4):
            at = i * stride + k - padding
            if 0 <= at < 11:
                expected = expected + weight[:, 0, k] * x[:, at]
        torch.testing.assert_close(y[:, i], expected)


def test_gate_is_the_second_half():
    x, weight, bias = problem(1, 9, 6, 3)
    plain = depthwise_conv(x, weight, bias, padding=1)
    gated = depthwise_conv(x, weight, bias, padding=1, gated=True)
    torch.testing.assert_close(gated, plain[..., :3] / (1 + (-plain[..., 3:]).exp()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_wide_and_many_taps_end(dtype):
    x, weight, bias = problem(1, 50, 4, 65)
    exact = depthwise_conv(x.to(dtype).float(), weight, bias, padding=32)
    y = depthwise_conv(x.to(dtype), weight, bias, padding=32)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=2**-8)


def test_reference_gradients():
    x, weight, bias = (t.requires_grad_() for t in problem(1, 6, 4, 3, torch.float64))
    for gated in (False, True):
        assert torch.autograd.gradcheck(lambda *t: depthwise_conv(*t, padding=1, gated=gated), (x, weight, bias))  # noqa: B023


@pytest.mark.parametrize("size", SIZES)
def test_kernel_equals_the_reference_and_so_do_its_gradients(size):
    pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")
    batch, rows, channels, taps, stride, padding = size
    tensors = [t.requires_grad_() for t in problem(batch, rows, channels, taps)]
    how = {"stride": stride, "padding": padding}
    got, wanted = (depthwise_conv(*tensors, **how, kernel=kernel) for kernel in ("triton", "reference"))
    d_out = torch.randn_like(wanted)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, wanted, **close)
    for a, b in zip(torch.autograd.grad(got, tensors, d_out), torch.autograd.grad(wanted, tensors, d_out), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize(
    "size", [(2, 21, 12, 3, 1, 1), (1, 300, 140, 3, 1, 1), (2, 40, 6, 5, 2, 2), (1, 1, 4, 3, 1, 1)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_kernel_gates_in_its_pass_and_so_does_its_gradient(size, with_bias):
    pytest.importorskip("triton")
    batch, rows, channels, taps, stride, padding = size
    x, weight, bias = (t.requires_grad_() for t in problem(batch, rows, channels, taps))
    tensors = [x, weight, bias] if with_bias else [x, weight]
    how = {"stride": stride, "padding": padding, "gated": True}
    got, wanted = (depthwise_conv(*tensors, **how, kernel=kernel) for kernel in ("triton", "reference"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(depthwise_conv(*tensors, **how, kernel="triton"), wanted, rtol=1e-4, atol=1e-4)
    d_out = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(got, tensors, d_out), torch.autograd.grad(wanted, tensors, d_out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_kernel_takes_strided_input_and_no_bias():
    pytest.importorskip("triton")
    x, weight, _ = problem(2, 40, 6, 3)
    for view in (x[:, 5:30], x.transpose(1, 2).contiguous().transpose(1, 2), x[:, ::2]):
        for gated in (False, True):
            got, wanted = (depthwise_conv(view, weight, gated=gated, kernel=k) for k in ("triton", "reference"))
            torch.testing.assert_close(got, wanted)


def test_kernel_of_nothing():
    pytest.importorskip("triton")
    x, weight, bias = problem(1, 0, 4, 3)
    assert depthwise_conv(x, weight, bias, padding=1, kernel="triton").shape == (1, 0, 4)


def test_bad_calls_are_refused():
    x, weight, bias = problem(1, 9, 6, 3)
    for args, how, words in [
        ((x[0], weight, bias), {}, r"x: shape \(9, 6\) given"),
        ((x, weight[:5], bias), {}, r"weight: shape \(5, 1, 3\) given; x has 6 channels"),
        ((x, weight, bias[:2]), {}, r"bias: shape \(2,\) given"),
        ((x, weight, bias), {"stride": 0}, "stride, padding: 0 and 0"),
        ((x[..., :3], weight[:3], None), {"gated": True}, "gated: True given with 3 channels"),
        ((x, weight, bias), {"kernel": "fast"}, "kernel: 'fast' given"),
        ((x.double(), weight, bias), {"kernel": "triton"}, "'triton' cannot run this call"),
    ]:
        with pytest.raises(ValueError, match=words):
            depthwise_conv(*args, **how)
