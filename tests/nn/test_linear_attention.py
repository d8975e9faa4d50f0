import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.nn.linear_attention import FocusedLinearAttention, GatedLinearAttention
from allears.nn.rope import apply_rope, rope_table
from allears.ops.attention.linear.options import LinearOptions


def build(*args, seed=0, **how):
    torch.manual_seed(seed)
    module = FocusedLinearAttention(*args, **how).double()
    if module.raw_scale is not None:
        torch.nn.init.normal_(module.raw_scale)
    return module


def in_the_published_order(module, x):
    """Projection, RoPE, ReLU, scale, power over all channels, heads, means, convolution, projection; one head after
    another, with both factors of n^-1/2 and the epsilons of the released audio models.
    """
    length, channels, heads = x.shape[1], x.shape[2], module.heads
    q, k, v = module.qkv(x).split(channels, dim=-1)
    if module.rope:
        table = rope_table(length, channels // heads, x.device)
        q, k = (apply_rope(part.unflatten(-1, (heads, -1)), table).flatten(-2) for part in (q, k))
    scale = (1 + module.raw_scale.flatten().exp()).log()

    def focus(part):
        part = (part.relu() + 1e-6) / scale
        sharp = part**3
        return sharp / (sharp.norm(dim=-1, keepdim=True) + 1e-8) * part.norm(dim=-1, keepdim=True)

    q, k, parts = focus(q), focus(k), []
    for h in range(heads):
        own = slice(h * channels // heads, (h + 1) * channels // heads)
        q_h, k_h, v_h = q[..., own], k[..., own], v[..., own]
        z = 1 / ((q_h * k_h.mean(1, keepdim=True)).sum(-1, keepdim=True) + 1e-6)
        kv = (k_h.mT * length**-0.5) @ (v_h * length**-0.5)
        around = torch.nn.functional.conv1d(
            v_h.mT, module.conv.weight, module.conv.bias, padding=2, groups=v_h.shape[-1]
        )
        parts.append(q_h @ kv * z + around.mT)
    return module.out(torch.cat(parts, dim=-1))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("length", [1, 2, 51])
def test_forward_is_the_published_order(rope, length):
    module = build(12, 3, rope=rope)
    x = torch.randn(2, length, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), in_the_published_order(module, x), rtol=1e-6, atol=1e-7)


def test_the_scale_begins_at_the_softplus_of_0_and_every_parameter_learns():
    module = FocusedLinearAttention(12, 3)
    assert module.raw_scale.eq(0).all() and module._choices()["scale"].allclose(torch.tensor(math.log(2)))
    for gated in (False, True):
        model = build(12, 3, causal=gated)
        model = GatedLinearAttention(model).double() if gated else model
        model(torch.randn(2, 9, 12, dtype=torch.float64)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in model.parameters())


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_inputs_and_all_parameters(causal):
    model = GatedLinearAttention(build(4, 2, causal=causal, rope=True, conv_taps=3)).double()
    names, values = zip(*model.named_parameters(), strict=True)
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *values))


def test_the_gate_weighs_what_is_added():
    model = GatedLinearAttention(build(8, 2), norm=lambda c: torch.nn.RMSNorm(c, eps=1e-5)).double()
    with torch.no_grad():
        model.norm.weight.mul_(2.0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    level = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    gate = 1 / (1 + (-(level @ model.gate.weight.mT + model.gate.bias)).exp())
    torch.testing.assert_close(model(x), x + gate * model.attention(2 * level))


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 39)),
    taps=st.integers(0, 6),
    rope=st.booleans(),
    kind=st.sampled_from(["focused", "elu", "softmax"]),
)
def test_steps_of_any_lengths_equal_the_whole(cuts, taps, rope, kind):
    inner = build(8, 2, causal=True, rope=rope, conv_taps=taps, options=LinearOptions(kind))
    model, x = GatedLinearAttention(inner).double(), torch.randn(2, 40, 8, dtype=torch.float64)
    state, parts = None, []
    for a, b in pairwise([0, *sorted(cuts), 40]):
        y, state = model.step(x[:, a:b], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=1e-10, atol=1e-10)
    assert state.position == 40 and state.attention.count.tolist() == [40, 40]


def test_a_causal_module_does_not_look_ahead_and_its_state_does_not_grow():
    module = build(8, 2, causal=True, rope=True)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    later = x.clone()
    later[:, 21:] = torch.nan
    torch.testing.assert_close(module(later)[:, :21], module(x)[:, :21])
    sizes = {sum(part.numel() for part in module.step(x[:, :n])[1].attention) for n in (1, 3, 40)}
    assert len(sizes) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_batches_of_different_lengths(causal):
    module = build(8, 2, causal=causal)
    x, lengths = torch.randn(3, 15, 8, dtype=torch.float64), torch.tensor([4, 15, 9])
    padded = module(x, lengths=lengths)
    packed = module(torch.cat([x[b, :n] for b, n in enumerate(lengths)]), cu_seqlens=torch.tensor([0, 4, 19, 28]))
    alone = [module(x[b : b + 1, :n])[0] for b, n in enumerate(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone))
    torch.testing.assert_close(torch.cat([padded[b, :n] for b, n in enumerate(lengths)]), torch.cat(alone))
    if causal:
        return
    gated = GatedLinearAttention(module).double()
    torch.testing.assert_close(gated(x, lengths)[2, :9], gated(x[2:, :9])[0])


def test_without_rope_and_convolution_order_has_no_meaning():
    module, order = build(8, 2, conv_taps=0), torch.randperm(13)
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x)[:, order], module(x[:, order]))
    placed = build(8, 2, conv_taps=0, rope=True)
    assert (placed(x)[:, order] - placed(x[:, order])).abs().max() > 1e-3


def test_autocast_keeps_sums_wide():
    module = FocusedLinearAttention(16, 4, causal=True)
    x = torch.randn(1, 64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = module.step(x)
    assert y.dtype == torch.bfloat16 and state.attention.kv.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.02)


def test_modules_refuse_what_does_not_fit():
    for how, words in [
        ({"heads": 3}, "heads: 3 does not divide channels 8"),
        ({"heads": 0}, "heads: 0"),
        ({"heads": 2, "conv_taps": 4}, "conv_taps: 4 given; it must be odd"),
        ({"heads": 2, "conv_taps": -1, "causal": True}, "conv_taps: -1 given"),
        ({"heads": 8, "rope": True}, "rope: True given with 1 channels a head"),
    ]:
        with pytest.raises(ValueError, match=words):
            FocusedLinearAttention(8, **how)
    x = torch.zeros(1, 4, 8)
    with pytest.raises(ValueError, match="not causal"):
        FocusedLinearAttention(8, 2).step(x)
    with pytest.raises(ValueError, match="cu_seqlens: given to a module with rope=True"):
        FocusedLinearAttention(8, 2, rope=True)(x[0], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="kernel: 'fast' given"):
        FocusedLinearAttention(8, 2, kernel="fast")(x)
    causal = FocusedLinearAttention(8, 2, causal=True)
    with pytest.raises(ValueError, match=r"state: its kv is .* for 2 streams"):
        causal.step(x.expand(2, 4, 8), causal.step(x)[1])
