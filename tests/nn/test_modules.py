from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears import AttentionSpec
from allears.nn.attention import ChannelsLastConv, CrossAttention, GatedConv, SelfAttention
from allears.nn.rope import apply_rope, rope_table
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.nn.timestep import TimestepEmbedding


def test_rope_is_the_complex_rotation():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 8)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    rates = 10_000.0 ** (-torch.arange(4) / 4)
    turned = pairs * torch.polar(torch.ones(9, 4), torch.arange(9)[:, None] * rates)[:, None]
    wanted = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(apply_rope(x, rope_table(9, 8, x.device)), wanted)


def test_rope_scores_depend_on_distance_only():
    torch.manual_seed(1)
    q, k = (torch.randn(1, 1, 1, 16).expand(1, 20, 1, 16) for _ in range(2))
    table = rope_table(20, 16, q.device)
    scores = torch.einsum("blhd,bmhd->lm", apply_rope(q, table), apply_rope(k, table))
    torch.testing.assert_close(scores[3, 7], scores[12, 16])
    with pytest.raises(ValueError, match="even"):
        rope_table(4, 7, q.device)


def test_attention_without_rope_does_not_know_order():
    torch.manual_seed(2)
    x, order = torch.randn(2, 7, 12), torch.randperm(7)
    plain, placed = SelfAttention(12, 2, rope=False), SelfAttention(12, 2)
    torch.testing.assert_close(plain(x)[:, order], plain(x[:, order]))
    assert (placed(x)[:, order] - placed(x[:, order])).abs().max() > 1e-3


def test_qk_norm_makes_scores_independent_of_size():
    torch.manual_seed(3)
    module = SelfAttention(12, 2, qk_norm=True)
    x = torch.randn(1, 6, 12)
    before = module(x)
    with torch.no_grad():
        module.qkv.weight[:24] *= 5.0
    torch.testing.assert_close(module(x), before, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="does not divide"):
        SelfAttention(10, 4)


def by_hand(module, q, k, v, look):
    """Attention of projected q (B, L, H, D), k and v (B, M, G, D), head by head, through the module's output layer."""
    heads = []
    for h in range(q.shape[2]):
        g = h * k.shape[2] // q.shape[2]
        scores = q[:, :, h] @ k[:, :, g].mT / q.shape[3] ** 0.5
        scores = scores.masked_fill(~look, float("-inf"))
        heads.append(scores.softmax(-1) @ v[:, :, g])
    return module.out(torch.cat(heads, dim=-1))


def test_grouped_causal_self_attention_by_hand():
    torch.manual_seed(7)
    module, x = SelfAttention(24, 6, kv_heads=2, causal=True), torch.randn(2, 5, 24)
    assert module.qkv.weight.shape == (6 * 4 + 2 * 2 * 4, 24)
    q, k, v = (part.unflatten(-1, (-1, 4)) for part in module.qkv(x).split((24, 8, 8), dim=-1))
    table = rope_table(5, 4, x.device)
    q, k = apply_rope(q, table), apply_rope(k, table)
    look = torch.ones(5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(module(x), by_hand(module, q, k, v, look))


def test_the_offset_moves_positions_and_distance_alone_counts():
    torch.manual_seed(8)
    module, x = SelfAttention(16, 2), torch.randn(1, 6, 16)
    torch.testing.assert_close(module(x, offset=11), module(x), atol=1e-5, rtol=1e-5)
    (q, k, _), (q3, k3, _) = module._project(x, 0), module._project(x[:, 3:], 3)
    torch.testing.assert_close(q3, q[:, 3:])
    torch.testing.assert_close(k3, k[:, 3:])
    assert (module._project(x[:, 3:], 0)[0] - q3).abs().max() > 0.05


@settings(max_examples=20, deadline=None)
@given(cuts=st.sets(st.integers(1, 11)), norm=st.booleans())
def test_steps_of_any_lengths_equal_the_whole(cuts, norm):
    torch.manual_seed(9)
    module, x = SelfAttention(16, 4, qk_norm=norm, kv_heads=2, causal=True), torch.randn(2, 12, 16)
    edges, state, out = [0, *sorted(cuts), 12], None, []
    for a, b in pairwise(edges):
        before = None if state is None else [part.clone() for part in state[:2]]
        y, new = module.step(x[:, a:b], state)
        if state is not None:
            assert all(torch.equal(a, b) for a, b in zip(before, state[:2], strict=True))
        out.append(y)
        state = new
    torch.testing.assert_close(torch.cat(out, dim=1), module(x), atol=2e-6, rtol=1e-5)
    assert state.position == 12 and state.k.shape == (2, 12, 2, 4)


def test_a_bounded_state_is_a_window():
    torch.manual_seed(10)
    module, x = SelfAttention(16, 2, causal=True), torch.randn(1, 9, 16)
    look = torch.ones(9, 9, dtype=torch.bool).tril() & torch.ones(9, 9, dtype=torch.bool).triu(-3)
    state, out = None, []
    for i in range(9):
        y, state = module.step(x[:, i : i + 1], state, keep=3)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, dim=1), module(x, mask=look), atol=2e-6, rtol=1e-5)
    assert state.k.shape[1] == 3 and state.position == 9


@pytest.mark.parametrize("norm", [False, True])
def test_cross_attention_by_hand(norm):
    torch.manual_seed(11)
    module = CrossAttention(12, 4, context_channels=10, qk_norm=norm, kv_heads=2)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    look = torch.rand(2, 1, 5, 7) > 0.3
    look[..., 0] = True
    q = module.q(x).unflatten(-1, (4, 3))
    k, v = (part.unflatten(-1, (2, 3)) for part in module.kv(context).chunk(2, dim=-1))
    if norm:
        q, k = (part * (part.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for part in (q, k))
    torch.testing.assert_close(module(x, context, look), by_hand(module, q, k, v, look[:, 0]))


def test_attention_modules_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="kv_heads: 3 does not divide heads 4"):
        SelfAttention(12, 4, kv_heads=3)
    with pytest.raises(ValueError, match="not causal"):
        SelfAttention(12, 4).step(torch.zeros(1, 1, 12))
    with pytest.raises(ValueError, match="keep: 0"):
        SelfAttention(12, 2, causal=True).step(torch.zeros(1, 1, 12), keep=0)
    with pytest.raises(ValueError, match="a context has no order"):
        CrossAttention(12, 4, spec=AttentionSpec(causal=True))


def test_channels_last_conv_equals_the_usual_layout():
    torch.manual_seed(4)
    conv, x = ChannelsLastConv(3, 5, kernel_size=3, padding=1), torch.randn(2, 6, 4, 3)
    usual = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), usual.permute(0, 2, 3, 1))


def test_gated_conv_sees_one_neighbour():
    torch.manual_seed(5)
    module, x = GatedConv(4, 6), torch.zeros(1, 7, 7, 4)
    x[0, 3, 3] = 1.0
    moved = (module(x) - module(torch.zeros_like(x))).abs().sum(-1)[0] > 1e-7
    assert moved[2:5, 2:5].all() and moved.sum() == 9


def test_timestep_embedding_tells_times_apart():
    torch.manual_seed(6)
    out = TimestepEmbedding(16)(torch.tensor([0.0, 0.01, 0.5, 1.0]))
    assert torch.pdist(out).min() > 1e-3


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(numerics="sagebwd")])
@pytest.mark.parametrize("causal", [False, True])
def test_padded_entries_give_what_they_give_alone(spec, causal):
    torch.manual_seed(3)
    layer = SelfAttention(32, 2, kv_heads=1, spec=spec, causal=causal)
    cross = CrossAttention(32, 2, context_channels=12, spec=spec)
    x, context, lengths = torch.randn(3, 7, 32), torch.randn(3, 5, 12), torch.tensor([7, 4, 0])
    y, z = layer(x, lengths=lengths), cross(x, context, context_lengths=torch.tensor([2, 5, 0]))
    for b, (rows, seen) in enumerate(((7, 2), (4, 5))):
        torch.testing.assert_close(y[b, :rows], layer(x[b : b + 1, :rows])[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(z[b], cross(x[b : b + 1], context[b : b + 1, :seen])[0], atol=1e-6, rtol=1e-5)
    assert not y[1, 4:].any() and not y[2].any() and not z[2].any() and y[1, :4].any()


def test_lengths_reach_a_core_that_takes_them():
    torch.manual_seed(4)
    core = SparseLinearAttention(2, 16, keep=1.0)
    layer = SelfAttention(32, 2, core=core)
    x, lengths = torch.randn(2, 7, 32), torch.tensor([7, 4])
    y = layer(x, lengths=lengths)
    torch.testing.assert_close(y[1, :4], layer(x[1:, :4])[0], atol=1e-6, rtol=1e-5)
    assert not y[1, 4:].any()
    cross = CrossAttention(32, 2, core=core)
    with pytest.raises(ValueError, match="context_lengths: given, but SparseLinearAttention takes none"):
        cross(x, x, context_lengths=lengths)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lengths=key_lengths_from_mask\(mask\)"):
        layer(x, mask)
