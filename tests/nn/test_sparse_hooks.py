"""A sparse spec through the hooks of transformers and diffusers: obeyed in self-attention, dense in cross-attention."""

from dataclasses import fields, replace

import pytest
import torch
from tests.small_models import small_dit, small_llama, small_wan

from allears import AttentionSpec, LowBit
from allears.nn.attention_hooks import use_attention
from allears.nn.attention_processors import CROSS_STAYS_DENSE, StandardProcessor, WanProcessor, spec_of_layer
from allears.ops.attention import Sparsity, attention

SPARSE = Sparsity(keep=0.4, block_q=64)
SPEC = AttentionSpec(sparse=SPARSE)


def seen(model, call, spec):
    """The output, and for each call of attention its layer, spec and number of keys."""
    calls = []

    def attend(layer, q, k, v, chosen, mask):
        calls.append((layer, chosen, k.shape[1]))
        return attention(q, k, v, chosen, mask)

    with use_attention(model, spec, attend):
        return call(model), calls


def by_hand(model, call, spec):
    """The output with a spec that is written here into each call of attention."""

    def attend(layer, q, k, v, chosen, mask):
        return attention(q, k, v, replace(spec, causal=chosen.causal, scale=chosen.scale), mask)

    with use_attention(model, attend=attend):
        return call(model)


CONTEXT = 150  # positions of a context: three blocks of keys, of which a sparse rule would leave out two


@pytest.fixture
def llama():
    return small_llama()


@torch.no_grad()
def test_llama_obeys_a_sparse_spec(llama):
    tokens = torch.randint(50, (2, 300))

    def call(model):
        return model(tokens).logits

    dense = call(llama)
    with use_attention(llama, SPEC) as handle:
        found = call(llama)
        assert handle.stays_dense == {}
        with pytest.raises(ValueError, match="queries look at different keys"):
            llama(tokens, attention_mask=(torch.arange(300) > torch.tensor([[0], [9]])).long())
    assert torch.equal(found, by_hand(llama, call, SPEC))
    assert (found - dense).norm() > 0.01 * dense.norm()
    everything = AttentionSpec(sparse=Sparsity(keep=1.0))
    with use_attention(llama, everything):
        torch.testing.assert_close(call(llama), dense, atol=1e-4, rtol=1e-4)
    assert torch.equal(call(llama), dense)


@torch.no_grad()
def test_every_field_of_a_spec_reaches_the_layers(llama):
    """Whatever fields a spec has, now or later: the hook changes causal and scale alone."""
    tokens = torch.randint(50, (1, 70))
    for spec in (
        AttentionSpec(kernel="reference", numerics="int8_fp8", sparse=SPARSE),
        AttentionSpec(kernel="reference", numerics="nvfp4", lowbit=LowBit(smooth_k=False)),
    ):
        _, calls = seen(llama, lambda model: model(tokens), spec)
        assert len(calls) == 2 and all(chosen.causal and chosen.scale == 8**-0.5 for _, chosen, _ in calls)
        for field in fields(AttentionSpec):
            if field.name not in ("causal", "scale"):
                assert {getattr(chosen, field.name) for _, chosen, _ in calls} == {getattr(spec, field.name)}
        _, calls = seen(small_dit(24), lambda model: model(**DIT), spec)
        assert {replace(chosen, scale=None) for _, chosen, _ in calls} == {spec}


def bart(transformers):
    config = transformers.BartConfig(
        vocab_size=50,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    return transformers.BartModel(config), {"decoder.layers.0.encoder_attn"}


def bert(transformers):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
        add_cross_attention=True,
    )
    return transformers.BertModel(config), {"encoder.layer.0.crossattention"}


def t5(transformers):
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5Model(config), {"decoder.block.0.layer.1"}


@torch.no_grad()
@pytest.mark.parametrize(("make", "attends"), [(bart, "encoder_attn"), (bert, "crossattention.self")])
def test_cross_attention_of_transformers_stays_dense(make, attends):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model, cross = make(transformers)
    model.eval()
    if make is bert:
        inputs = {"input_ids": torch.randint(50, (1, 200)), "encoder_hidden_states": torch.randn(1, CONTEXT, 32)}
    else:
        inputs = {"input_ids": torch.randint(50, (1, CONTEXT)), "decoder_input_ids": torch.randint(50, (1, 200))}
    names = {part: name for name, part in model.named_modules()}

    def call(model):
        return model(**inputs)[0]

    dense, attributes = call(model), {part: set(vars(part)) for part in model.modules()}
    for spec in (SPEC, AttentionSpec(kernel="reference", sparse=SPARSE)):
        found, calls = seen(model, call, spec)
        for layer, chosen, keys in calls:
            looks = names[layer].endswith(attends)
            assert (chosen.sparse is None) == looks and (keys == CONTEXT or not looks)
            assert not looks or chosen == AttentionSpec(causal=chosen.causal, scale=chosen.scale)
        assert {names[layer].endswith(attends) for layer, *_ in calls} == {True, False}
        assert (found - dense).norm() > 1e-4 * dense.norm()
    handle = use_attention(model, SPEC)
    assert handle.stays_dense == dict.fromkeys(cross, CROSS_STAYS_DENSE)
    with use_attention(model, SPEC):  # one inside the other: each takes back what it did
        pass
    assert torch.equal(call(model), found)
    handle.undo()
    assert torch.equal(call(model), dense)
    assert attributes == {part: set(vars(part)) for part in model.modules()}


def test_cross_attention_is_known_by_its_names():
    model, cross = t5(pytest.importorskip("transformers"))
    with use_attention(model, SPEC) as handle:
        assert set(handle.stays_dense) == cross
    with use_attention(model) as handle:
        assert handle.stays_dense == {}


DIT = {
    "hidden_states": torch.linspace(-1, 1, 2 * 4 * 24 * 24).sin().view(2, 4, 24, 24),
    "timestep": torch.tensor([7, 9]),
    "class_labels": torch.tensor([1, 2]),
}


@torch.no_grad()
def test_dit_obeys_a_sparse_spec():
    model = small_dit(24)

    def call(model):
        return model(**DIT).sample

    dense = call(model)
    with use_attention(model, SPEC) as handle:
        found = call(model)
        assert handle.stays_dense == {}
    assert torch.equal(found, by_hand(model, call, SPEC))
    assert (found - dense).norm() > 1e-3 * dense.norm()
    assert torch.equal(call(model), dense)


@torch.no_grad()
def test_wan_is_sparse_in_self_attention_alone():
    model = small_wan(num_layers=1, rope_max_seq_len=32, image_dim=20, added_kv_proj_dim=24)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 20, 20),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, CONTEXT, 20),
    }

    def call(model):
        return model(**inputs)[0]

    dense = call(model)
    with use_attention(model, SPEC) as handle:
        found = call(model)
    assert handle.stays_dense == {"blocks.0.attn2": CROSS_STAYS_DENSE}
    _, calls = seen(model, call, SPEC)
    assert [(chosen.sparse, keys) for _, chosen, keys in calls] == [(SPARSE, 200), (None, 512)]
    self_alone = use_attention(
        model,
        attend=lambda layer, q, k, v, spec, mask: attention(
            q, k, v, SPEC if k.shape[1] == 200 else AttentionSpec(), mask
        ),
    )
    with self_alone:
        assert torch.equal(call(model), found)
    assert (found - dense).norm() > 1e-4 * dense.norm()


def test_the_rule_of_cross_attention():
    fast = AttentionSpec(numerics="int8_fp8", kernel="reference")
    assert spec_of_layer(fast, cross=True) is fast
    sparse = AttentionSpec(numerics="int8_fp8", kernel="gathered", scale=0.5, sparse=SPARSE)
    assert spec_of_layer(sparse, cross=False) is sparse
    assert spec_of_layer(sparse, cross=True) == AttentionSpec(scale=0.5)
    assert StandardProcessor(sparse).spec is sparse and WanProcessor(sparse).spec is sparse
