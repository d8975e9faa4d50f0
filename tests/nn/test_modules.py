import pytest
import torch

from allears.nn.attention import ChannelsLastConv, GatedConv, SelfAttention
from allears.nn.rope import apply_rope, rope_table
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
