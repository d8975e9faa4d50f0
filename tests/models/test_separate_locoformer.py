"""The parts of TF-Locoformer against loops and formulas, and its attentions against one another.

Shapes: M sequences, L rows, D channels, B batch, S samples.
"""

import pytest
import torch
import torch.nn.functional as F

from allears.models.separate.config import LocoformerSize, SeparateConfig
from allears.models.separate.locoformer import Locoformer
from allears.models.separate.locoformer_blocks import ConvSwiGlu, LinearAttentionBranch, MacaronLayer
from allears.models.separate.model import SeparateNet
from allears.nn.linear_attention import GatedLinearAttention
from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.linear.reference import explicit_attention

SIZE = LocoformerSize(8, 2, hidden=6, kernel=4, heads=2, groups=2, n_fft=16, hop=8)


def config(attention="fla", **change):
    return SeparateConfig(locoformer=SIZE, attention=attention, **change)


def drawn(module, seed=0):
    rng = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return module.eval()


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", [1, 3, 4, 8])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_conv_swiglu_is_its_loop(kernel, length):
    """A row of the hidden layer sees ``kernel`` rows, from (kernel - 1) // 2 before it, and gives to the same ones."""
    block, x = drawn(ConvSwiGlu(3, 5, kernel)), rows(2, length, 3)
    before = (kernel - 1) // 2
    wanted = block.narrow.bias.expand(2, length, 3).clone()
    for row in range(length):
        taps = [(k, row + k - before) for k in range(kernel) if 0 <= row + k - before < length]
        hidden = block.widen.bias.clone()
        for k, at in taps:
            hidden = hidden + x[:, at] @ block.widen.weight[:, :, k].T
        value, gate = hidden.expand(2, -1).split(5, dim=-1)
        hidden = value * gate * torch.sigmoid(gate)
        for k, at in taps:
            wanted[:, at] = wanted[:, at] + hidden @ block.narrow.weight[:, :, k]
    torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize("kernel", [3, 4])
def test_conv_swiglu_is_its_convolutions(kernel):
    block, x = drawn(ConvSwiGlu(3, 5, kernel)), rows(2, 11, 3)
    before = (kernel - 1) // 2
    h = block.widen(F.pad(x.mT, (before, kernel - 1 - before)))
    y = block.narrow(h[:, :5] * F.silu(h[:, 5:]))[..., before : before + 11]
    torch.testing.assert_close(block(x), y.mT)


def test_macaron_is_three_branches_each_behind_a_norm():
    layer, x = drawn(MacaronLayer(config("optimised"), linear=False)), rows(3, 7, 8)
    h = x + layer.feeds[0](layer.norms[0](x))
    h = h + layer.attention.attention(layer.attention.norm(h))
    torch.testing.assert_close(layer(x), h + layer.feeds[1](layer.norms[1](h)))


@pytest.mark.parametrize("gated", [True, False])
def test_linear_attention_branch_is_its_matrix_and_one_residual(gated):
    branch, x = drawn(LinearAttentionBranch(config(gated=gated), SIZE)), rows(2, 9, 8)
    inner = branch.attention.attention if gated else branch.attention
    norm = branch.attention.norm if gated else branch.norm
    q, k, v = (part.unflatten(-1, (2, 4)) for part in inner.qkv(norm(x)).split(8, dim=-1))
    scale = F.softplus(inner.raw_scale)
    y = explicit_attention(*(feature_map(part, "focused", scale=scale) for part in (q, k)), v, eps=1e-6)
    by_head = v.permute(0, 2, 3, 1).flatten(0, 1)
    around = F.conv1d(by_head, inner.conv.weight, inner.conv.bias, padding=2, groups=4)
    y = inner.out((y + around.unflatten(0, (2, 2)).permute(0, 3, 1, 2)).flatten(-2))
    if gated:
        y = y * branch.attention.gate(branch.attention.gate_norm(x)).sigmoid()
    torch.testing.assert_close(branch(x), x + y)


def test_only_layers_along_time_are_linear():
    net = Locoformer(config())
    linear = [any(isinstance(m, GatedLinearAttention) for m in layer.modules()) for layer in net.layers]
    assert linear == [False, True, False, True]
    assert not any(
        any(isinstance(m, GatedLinearAttention) for m in x.modules()) for x in Locoformer(config("published")).layers
    )


@pytest.mark.parametrize("samples", [1, 63, 500])
def test_optimised_is_published_in_value_and_gradient(samples):
    nets = [drawn(SeparateNet(config(attention))) for attention in ("published", "optimised")]
    nets[1].load_state_dict(nets[0].state_dict())
    mixture, slope = rows(2, samples).float(), rows(2, 2, samples, seed=2).float()
    nets = [net.float() for net in nets]
    outs = [net(mixture) for net in nets]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4 * float(outs[0].detach().abs().max()))
    grads = [torch.autograd.grad((y * slope).sum(), net.parameters()) for y, net in zip(outs, nets, strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(a.abs().max() + 1e-3))


@pytest.mark.parametrize("samples", [1, 7, 64, 1000])
def test_spectrum_and_back_is_the_mixture(samples):
    """With layers that add nothing, and outer convolutions that hand the spectrum through, so does the network."""
    net = Locoformer(SeparateConfig(locoformer=SIZE, talkers=3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.enter.weight[0, 0, 1, 1] = net.enter.weight[1, 1, 1, 1] = 1.0
        for talker in range(3):
            for part in range(2):
                net.leave.weight[part, 2 * talker + part, 1, 1] = 1.0 + talker
        net.norm.forward = lambda x: x
        mixture = torch.randn(2, samples)
        out = net(mixture).out
    torch.testing.assert_close(out, mixture[:, None] * torch.tensor([1.0, 2.0, 3.0])[:, None], rtol=1e-4, atol=1e-5)


def test_layers_run_along_the_axis_they_are_for():
    """What a change in one bin of one frame reaches: along frequency that frame alone, along time that bin alone."""
    net = drawn(Locoformer(config("optimised"))).float()
    x = torch.randn(1, 5, 9, 8)
    other = x.clone()
    other[0, 2, 4] += 1.0
    with torch.no_grad():
        changed = (net._along(net.layers[0], x) - net._along(net.layers[0], other)).abs().amax(-1)[0] > 1e-6
        assert changed[2].all() and not changed[[0, 1, 3, 4]].any()
        turned = [net._along(net.layers[1], y.transpose(1, 2)).transpose(1, 2) for y in (x, other)]
        changed = (turned[0] - turned[1]).abs().amax(-1)[0] > 1e-6
        assert changed[:, 4].all() and not changed[:, [0, 3, 5]].any()


def test_the_network_goes_along_frequency_and_then_along_time():
    """5 frames of 9 bins: the first layer of each block hears 5 sequences of 9, the second 9 of 5."""
    net, seen = Locoformer(config("published")), []
    for layer in net.layers:
        layer.register_forward_hook(lambda m, args, out: seen.append(tuple(args[0].shape)))
    net(torch.randn(1, 32))
    assert seen == [(5, 9, 8), (9, 5, 8)] * 2


def test_the_published_form_takes_all_sequences_at_once(monkeypatch):
    """It is the baseline of memory; the others take some at a time."""
    from allears.nn import slices

    monkeypatch.setitem(slices.SLICE_BYTES, "cpu", 1)
    for attention, wanted in (("published", 1), ("optimised", 5)):
        net, seen = Locoformer(config(attention)), []
        net.layers[0].register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].shape[0]))
        with torch.no_grad():
            net(torch.randn(1, 32))
        assert len(seen) == wanted and sum(seen) == 5
