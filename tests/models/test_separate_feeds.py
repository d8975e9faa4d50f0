"""TF-Locoformer's layers with their feed-forwards as one operator, in place of norm, convolutions and sum.

Shapes: M sequences, L rows, D channels.
"""

import pytest
import torch

from allears.models.separate import locoformer_blocks
from allears.models.separate.config import LocoformerSize, SeparateConfig
from allears.models.separate.locoformer_blocks import MacaronLayer
from allears.ops.conv_glu import conv_swiglu

SIZE = LocoformerSize(16, 1, hidden=16, kernel=4, heads=2, groups=2, n_fft=16, hop=8)


def drawn(attention="optimised"):
    """A layer whose gains are not 1."""
    torch.manual_seed(0)
    layer = MacaronLayer(SeparateConfig(locoformer=SIZE, attention=attention), linear=False)
    for norm in layer.norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    return layer


@pytest.fixture
def by_operator(monkeypatch):
    """As where the kernels run; how often they were asked for."""
    calls = []

    def run(*args, **kwargs):
        calls.append(args[0].shape)
        return conv_swiglu(*args, **kwargs)

    monkeypatch.setattr(locoformer_blocks, "runs_kernel", lambda *args, **how: True)
    monkeypatch.setattr(locoformer_blocks, "conv_swiglu", run)
    return calls


def test_one_operator_is_the_norm_the_convolutions_and_the_sum(by_operator, monkeypatch):
    layer, x = drawn(), torch.randn(3, 7, 16, requires_grad=True)
    leaves, slope = [x, *layer.parameters()], torch.randn(3, 7, 16)
    got = layer(x)
    gradients = torch.autograd.grad(got, leaves, slope)
    assert by_operator == [(3, 7, 16)] * 2
    monkeypatch.setattr(locoformer_blocks, "runs_kernel", lambda *args, **how: False)
    wanted = layer(x)
    assert len(by_operator) == 2
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, torch.autograd.grad(wanted, leaves, slope), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_published_form_stays_as_it_was(by_operator):
    drawn("published")(torch.randn(2, 5, 16))
    assert not by_operator


def test_parameters_keep_their_names():
    names = {f"norms.{n}.weight" for n in range(2)}
    names |= {f"feeds.{n}.{part}.{of}" for n in range(2) for part in ("widen", "narrow") for of in ("weight", "bias")}
    assert names <= set(drawn().state_dict())


def test_a_cpu_keeps_its_path():
    layer, x = drawn(), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = x + layer.feeds[0](layer.norms[0](x))
        assert torch.equal(layer._feed(0, x), plain)
        whole = layer.attention(plain)
        assert torch.equal(layer(x), whole + layer.feeds[1](layer.norms[1](whole)))


def test_the_choice_breaks_no_graph():
    layer, x = drawn(), torch.randn(2, 5, 16)
    compiled = torch.compile(layer._feed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(1, x), layer._feed(1, x))
    torch._dynamo.reset()
