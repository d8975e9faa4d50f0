import math

import pytest
import torch

from allears.models.language import PRESETS, LanguageConfig, LanguageModel
from allears.models.language.loss import bits_per_byte, next_token_loss
from allears.models.language.model import use_attention
from allears.ops.attention import AttentionSpec

SMALL = LanguageConfig(vocabulary=50, context=16, layers=2, channels=16, heads=4, kv_heads=2, hidden=24)


def _model(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return LanguageModel(config)


def test_a_position_sees_no_later_token():
    model, tokens = _model(), torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=0)
    assert ((before - after)[:, 9:].abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_model_is_the_textbook_one(qk_norm):
    """Against a loop over heads and positions written out in plain products."""
    config = LanguageConfig(
        vocabulary=11, context=8, layers=1, channels=8, heads=2, kv_heads=1, hidden=6, qk_norm=qk_norm, init_qk_gain=3.0
    )
    model = _model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = torch.tensor([[3, 7, 1, 10, 0]])

    def rms(x, weight, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x, position):
        angles = position * 10_000.0 ** (-torch.arange(2) / 2)
        a, b = x[:2], x[2:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    block, x = model.blocks[0], model.embed.weight[tokens[0]]
    rows = rms(x, block.attention_norm.weight, 1e-6) @ block.attention.qkv.weight.T
    heads = rows.unflatten(-1, (4, 4))  # two of queries, one of keys, one of values
    queries, keys, values = heads[:, :2], heads[:, 2], heads[:, 3]
    if qk_norm:
        queries = rms(queries, block.attention.q_norm.weight, 1e-5)
        keys = rms(keys, block.attention.k_norm.weight, 1e-5)
    mixed = torch.zeros(5, 2, 4)
    for i in range(5):
        for h in range(2):
            logits = torch.stack([rotate(queries[i, h], i) @ rotate(keys[j], j) / 2 for j in range(i + 1)])
            mixed[i, h] = logits.softmax(0) @ values[: i + 1]
    x = x + mixed.flatten(1) @ block.attention.out.weight.T
    gate, value = (rms(x, block.feed_norm.weight, 1e-6) @ block.feed.widen.weight.T).chunk(2, -1)
    x = x + (gate * gate.sigmoid() * value) @ block.feed.narrow.weight.T
    wanted = rms(x, model.norm.weight, 1e-6) @ model.embed.weight.T
    torch.testing.assert_close(model(tokens)[0], wanted, rtol=1e-4, atol=1e-4)


def test_initial_gain_scales_the_queries_and_keys_alone():
    """Four times the queries and keys, with and without QK-norm; all else is as before."""
    for qk_norm in (True, False):
        plain, loud = (
            _model(LanguageConfig(**{**vars(SMALL), "qk_norm": qk_norm, "init_qk_gain": gain})) for gain in (1.0, 4.0)
        )
        x = torch.randn(1, 5, 16)
        small, large = (net.attentions()[0]._project(x, 0) for net in (plain, loud))
        torch.testing.assert_close(large[0], 4 * small[0])
        torch.testing.assert_close(large[1], 4 * small[1])
        torch.testing.assert_close(large[2], small[2])


def test_tied_output_is_the_embedding_and_untied_is_not():
    tied, untied = _model(), _model(LanguageConfig(**{**vars(SMALL), "tied": False}))
    assert tied.head.weight is tied.embed.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 16


def test_size_and_flops_of_the_study_model():
    """The model card's figures. FLOPs: 6 a weight of a product and token; attention 2 x 2 x L/2 x C x 3.5 a layer."""
    config = PRESETS["study"]
    with torch.device("meta"):
        count = sum(p.numel() for p in LanguageModel(config).parameters())
    assert count == pytest.approx(23.5e6, rel=0.01)
    weights = 6 * (4 * 512**2 + 3 * 512 * 1408) + 512 * 8192
    assert config.flops_per_token() == pytest.approx(6 * weights + 6 * 2 * 1024 * 512 * 3.5)


def test_loss_is_the_mean_negative_log_probability():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 4, 2], [1, 1, 3]])
    wanted = -sum(logits[b, i].softmax(0)[targets[b, i]].log() for b in range(2) for i in range(3)) / 6
    torch.testing.assert_close(next_token_loss(logits, targets), wanted)
    assert next_token_loss(torch.zeros(1, 4, 256), torch.zeros(1, 4, dtype=torch.long)) == pytest.approx(math.log(256))
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)  # a byte a token, all alike: 8 bits
    with pytest.raises(ValueError, match=r"targets: shape \(2, 2\)"):
        next_token_loss(logits, targets[:, :2])


def test_another_attention_must_be_causal():
    model = _model()
    with pytest.raises(ValueError, match="spec: causal=False"):
        use_attention(model, AttentionSpec())
    use_attention(model, AttentionSpec(causal=True, kernel="reference"))
    assert [attention.spec.kernel for attention in model.attentions()] == ["reference"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 3}, "heads: 3 must divide"), ({"layers": 0}, "layers: 0"), ({"init_qk_gain": 0.0}, "init_qk_gain")],
)
def test_bad_sizes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**change)
