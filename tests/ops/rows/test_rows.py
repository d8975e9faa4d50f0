"""Backward passes over many short rows, by Triton's interpreter on a CPU, against PyTorch's."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install 'allears[gpu]'", allow_module_level=True)

from allears.ops.rows import functions
from allears.ops.rows.triton_rows import column_sum, layer_norm_backward, scale_backward


def _draw(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.cuda() if torch.cuda.is_available() else x


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that a program takes several tiles, the last of which is not full."""
    monkeypatch.setattr("allears.ops.rows.triton_rows._PROGRAMS", 3)


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(functions, "takes", lambda x, *others: True)


@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (700, 64), (333, 24), (65, 130)])
def test_column_sum(rows, channels):
    x = _draw(rows, channels)
    torch.testing.assert_close(column_sum(x), x.sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [64, 24])
def test_scale_backward(channels):
    grad, y, gain = _draw(2, 211, channels), _draw(2, 211, channels) + 1, _draw(channels)
    d_y, d_gain = scale_backward(grad, y, gain)
    torch.testing.assert_close(d_y, grad * gain)
    torch.testing.assert_close(d_gain, (grad * y).sum((0, 1)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [64, 24])
def test_layer_norm_backward(channels):
    x, weight = (3 * _draw(2, 211, channels) + 5).requires_grad_(), _draw(channels).requires_grad_()
    bias, grad = torch.zeros_like(weight, requires_grad=True), _draw(2, 211, channels)
    wanted = torch.autograd.grad(F.layer_norm(x, (channels,), weight, bias, 1e-5), (x, weight, bias), grad)
    found = layer_norm_backward(grad, x.detach(), weight.detach(), 1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def _compare(ours, theirs, *inputs):
    grad = None
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        grad = torch.cos(torch.arange(out.numel(), device=out.device).float()).view(out.shape) if grad is None else grad
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=3e-4, rtol=1e-4)


def test_functions_are_pytorchs(always):
    x, weight, bias = _draw(2, 150, 24), _draw(40, 24), _draw(40)
    _compare(functions.linear, F.linear, x, weight, bias)
    gain, shift = _draw(24), _draw(24) + 1
    _compare(
        lambda x, w, b: functions.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: F.layer_norm(x, (24,), w, b),
        x,
        gain,
        shift,
    )
    _compare(functions.add_scaled, torch.addcmul, x, _draw(2, 150, 24) + 2, gain)


def test_mixed_types_keep_their_own(always):
    x = _draw(1, 60, 24).requires_grad_()
    y, gain = _draw(1, 60, 24).bfloat16().requires_grad_(), _draw(24).requires_grad_()
    out = functions.add_scaled(x, y, gain)
    d_x, d_y, d_gain = torch.autograd.grad(out, (x, y, gain), torch.ones_like(out))
    assert (out.dtype, d_x.dtype, d_y.dtype, d_gain.dtype) == (torch.float32, torch.float32, y.dtype, torch.float32)
    torch.testing.assert_close(d_y, gain.detach().expand_as(y).bfloat16())


def test_small_calls_are_pytorchs_own():
    x, weight, bias = _draw(2, 5, 24).requires_grad_(), _draw(40, 24), _draw(40)
    assert not functions.takes(x, weight)
    assert type(functions.linear(x, weight, bias).grad_fn).__name__ != "_LinearBackward"
