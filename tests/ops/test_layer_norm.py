"""Layer norm by its kernel, interpreted where there is no GPU, and by the door. Shapes: (B, L, C)."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from allears.ops.norm.layer_norm import layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(batch, rows, channels):
    rng = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(batch, rows, channels, generator=rng)
    weight, bias = torch.randn(2, channels, generator=rng)
    return x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)


def by_hand(x, weight, bias, eps=1e-5):
    less = x - x.mean(-1, keepdim=True)
    return less / (less.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("size", [(2, 21, 24), (1, 100, 64), (3, 1, 5)])
def test_it_is_the_formula(size, kernel):
    if kernel == "triton":
        pytest.importorskip("triton")
    x, weight, bias = problem(*size)
    for view in (x, x[:, : max(1, size[1] // 2)], x.mT.contiguous().mT):
        with torch.no_grad():
            y = layer_norm(view, weight, bias, kernel=kernel)
        torch.testing.assert_close(y, by_hand(view, weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=2.0), by_hand(x, weight, bias, 2.0))


def test_kernel_writes_the_dtype_of_autocast_and_of_its_input():
    pytest.importorskip("triton")
    x, weight, bias = problem(1, 9, 16)
    with torch.no_grad():
        assert layer_norm(x.bfloat16(), weight, bias, kernel="triton").dtype == torch.bfloat16
        with torch.autocast(DEVICE, torch.bfloat16):
            y = layer_norm(x, weight, bias, kernel="triton")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), by_hand(x, weight, bias), rtol=0.02, atol=0.02)


def test_what_the_kernel_does_not_do_is_refused():
    pytest.importorskip("triton")
    x, weight, bias = problem(1, 9, 16)
    with pytest.raises(ValueError, match="no backward and gradients are asked for"):
        layer_norm(x, weight.requires_grad_(), bias, kernel="triton")
    assert torch.autograd.grad(layer_norm(x, weight, bias).sum(), weight)[0].shape == (16,)
    with pytest.raises(ValueError, match="takes 16 and 32 bits"):
        layer_norm(x.double(), weight.detach().double(), bias.double(), kernel="triton")
    with pytest.raises(ValueError, match=r"x, weight, bias: shapes \(9, 16\)"):
        layer_norm(x[0], weight, bias)
    with pytest.raises(ValueError, match="kernel: 'quick' given"):
        layer_norm(x, weight, bias, kernel="quick")
