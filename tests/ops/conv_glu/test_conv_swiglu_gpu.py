"""The feed-forward by its kernels on a GPU at real sizes, also compiled.

Shapes: A, B outer sizes, L rows, D channels, C hidden channels, K taps.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.conv_glu import conv_swiglu, runs_kernel

pytestmark = pytest.mark.gpu
SIZES = [(64, 128, 4), (96, 128, 8), (128, 384, 4), (48, 80, 3)]


def problem(outer, rows, channels, hidden, taps):
    torch.manual_seed(0)
    x, narrow = torch.randn(*outer, rows, channels), torch.randn(hidden, channels, taps) / (hidden * taps) ** 0.5
    widen = torch.randn(2 * hidden, channels, taps) / (channels * taps) ** 0.5
    return [t.cuda() for t in (x, widen, torch.randn(2 * hidden), narrow, torch.randn(channels))]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
def test_value_and_gradients(size, kind, turned):
    x, *weights = problem((3, 41), 87, *size)
    x = (x.transpose(1, 2) if turned else x).to(kind)
    how = {"groups": 4 if size[0] % 64 else 8, "eps": 1e-5, "before": (size[2] - 1) // 2}
    exact = [t.double().requires_grad_() for t in (x, *weights)]
    narrow = [t.requires_grad_() for t in (x, *weights)]
    products = torch.bfloat16 if kind == torch.float32 else kind
    with torch.autocast("cuda", products):
        assert runs_kernel(*narrow, groups=how["groups"])
        y = conv_swiglu(*narrow, **how)
    wanted = conv_swiglu(*exact, **how)
    d_y = torch.randn_like(y)
    got, expected = torch.autograd.grad(y, narrow, d_y), torch.autograd.grad(wanted, exact, d_y.double())
    assert y.stride() == x.stride() == got[0].stride()
    for a, b in zip((y, *got), (wanted, *expected), strict=True):
        assert (a.double() - b).norm() < 1.5e-2 * b.norm()


def test_it_repeats_and_compiles():
    x, *weights = problem((2, 30), 188, 64, 128, 4)
    tensors = [t.requires_grad_() for t in (x.bfloat16(), *weights)]

    def run(*tensors):
        return conv_swiglu(*tensors, groups=4, eps=1e-5, before=1)

    d_y = torch.randn_like(tensors[0])
    first = [run(*tensors), *torch.autograd.grad(run(*tensors), tensors, d_y)]
    y = torch.compile(run, fullgraph=True)(*tensors)
    for a, b in zip(first, [y, *torch.autograd.grad(y, tensors, d_y)], strict=True):
        assert torch.equal(a, b)


def test_float32_without_autocast_is_the_reference():
    x, *weights = problem((2, 3), 20, 64, 128, 4)
    assert not runs_kernel(x, *weights, groups=4)
    with pytest.raises(ValueError, match="multiplies 16-bit numbers"):
        conv_swiglu(x, *weights, groups=4, eps=1e-5, before=1, kernel="triton")
