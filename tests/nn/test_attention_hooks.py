"""Small random models of transformers and diffusers give the same through our attention, and undo restores them."""

import pytest
import torch
from tests.small_models import small_dit, small_llama, small_wan
from torch import nn

from allears import AttentionSpec, attention
from allears.nn.attention_hooks import AttentionHandle, use_attention
from allears.nn.padding_masks import PaddingMasks
from allears.ops.attention import Sparsity

REFERENCE = AttentionSpec(kernel="reference")


def assert_agree(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture
def calls(monkeypatch):
    """How often our attention ran, and with which mask."""
    import allears.nn.attention_processors as processors
    import allears.nn.padding_masks as masks

    seen = []
    for module in (masks, processors):
        inner = module.attention

        def counted(q, k, v, spec=None, mask=None, *, inner=inner, **lengths):
            seen.append((spec, mask, *lengths.values()))
            return inner(q, k, v, spec, mask, **lengths)

        monkeypatch.setattr(module, "attention", counted)
    return seen


@pytest.fixture
def llama():
    return small_llama(64)


@pytest.fixture
def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertModel(config).eval()


@torch.no_grad()
def test_llama_is_the_same_and_comes_back(llama, calls):
    tokens = torch.randint(50, (2, 11))
    before, wanted = llama.config._attn_implementation, llama(tokens).logits
    with use_attention(llama, REFERENCE):
        assert_agree(llama(tokens).logits, wanted)
        assert len(calls) == 2 and all(spec.kernel == "reference" and spec.causal for spec, *_ in calls)
    assert llama.config._attn_implementation == before
    assert torch.equal(llama(tokens).logits, wanted) and len(calls) == 2


@torch.no_grad()
def test_llama_with_left_padding(llama, calls):
    tokens, mask = torch.randint(50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    wanted = llama(tokens, attention_mask=mask).logits
    with use_attention(llama):
        out = llama(tokens, attention_mask=mask).logits
    assert_agree(out[mask.bool()], wanted[mask.bool()])
    assert calls[0][1].dtype == torch.bool


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_llama_decodes_the_same(llama, calls, cache):
    tokens = torch.randint(50, (1, 7))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    options |= {"disable_compile": True}
    wanted = llama.generate(tokens, **options)
    with use_attention(llama):
        assert torch.equal(llama.generate(tokens, **options), wanted)
    assert len(calls) == 2 * 6


def test_llama_gradients_are_the_same(llama):
    tokens, grads = torch.randint(50, (2, 8)), []
    for handle in (AttentionHandle(lambda: None), use_attention(llama)):
        with handle:
            llama.zero_grad()
            llama(tokens, labels=tokens).loss.backward()
            grads.append(llama.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert_agree(grads[1], grads[0])
    assert grads[0].abs().max() > 1e-6


@torch.no_grad()
def test_bert_with_padding(bert, calls):
    tokens, mask = torch.randint(50, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:], mask[2, 3:] = 0, 0
    wanted, plain = bert(tokens, attention_mask=mask)[0], bert(tokens)[0]
    handle = use_attention(bert, REFERENCE)
    assert_agree(bert(tokens, attention_mask=mask)[0], wanted)
    assert_agree(bert(tokens)[0], plain)
    assert not any(spec.causal for spec, *_ in calls) and len(calls) == 4
    handle.undo()
    handle.undo()
    assert torch.equal(bert(tokens, attention_mask=mask)[0], wanted) and len(calls) == 4


@pytest.fixture
def readings(monkeypatch):
    """Every mask whose values were read for its lengths."""
    import allears.nn.padding_masks as masks

    seen, inner = [], masks.key_lengths_from_mask
    monkeypatch.setattr(masks, "key_lengths_from_mask", lambda mask: seen.append(mask) or inner(mask))
    return seen


@torch.no_grad()
def test_bert_with_padding_in_8_bits(bert, calls, readings):
    """Padding behind the words reaches kernels without masks as lengths, read once a forward; none: no lengths."""
    tokens, mask = torch.randint(50, (3, 10)), torch.ones(3, 10, dtype=torch.long)
    mask[0, 6:], mask[2, 3:] = 0, 0
    wanted = bert(tokens, attention_mask=mask)[0]
    with use_attention(bert, AttentionSpec(numerics="int8_fp16")):
        out = bert(tokens, attention_mask=mask)[0]
        assert len(calls) == 2 and all(len(call) == 3 and call[2].tolist() == [6, 10, 3] for call in calls)
        assert len(readings) == 1
        off = (out - wanted)[mask.bool()].norm() / wanted[mask.bool()].norm()
        assert 0 < off < 0.02
        alone = bert(tokens[2:, :3])[0]
        torch.testing.assert_close(out[2:, :3], alone, atol=1e-4, rtol=1e-4)
        full = bert(tokens, attention_mask=torch.ones_like(mask))[0]
        torch.testing.assert_close(full, bert(tokens)[0], atol=1e-5, rtol=1e-5)
        assert all(len(call) == 2 for call in calls[2:])
        with pytest.raises(ValueError, match="padding at the left, or a hole"):
            bert(tokens, attention_mask=mask.flip(-1))


@torch.no_grad()
def test_padded_text_for_sparse_and_causal_models(bert, llama, calls):
    tokens, mask = torch.randint(50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    wanted = bert(tokens, attention_mask=mask)[0]
    with use_attention(bert, AttentionSpec(sparse=Sparsity(keep=1.0))):
        assert_agree(bert(tokens, attention_mask=mask)[0][mask.bool()], wanted[mask.bool()])
    assert all(len(call) == 3 for call in calls)
    with (
        use_attention(llama, AttentionSpec(numerics="int8_fp8")),
        pytest.raises(ValueError, match="queries look at different keys"),
    ):
        llama(tokens, attention_mask=mask)


def test_a_mask_that_changes_is_read_again(readings):
    masks, mask = PaddingMasks(), torch.ones(1, 1, 1, 4, dtype=torch.bool)
    q, spec = torch.randn(2, 4, 1, 16), AttentionSpec(numerics="int8_fp16")
    for read in (1, 1):
        assert torch.equal(masks.attend(q, q, q, spec, mask), attention(q, q, q, spec)) and len(readings) == read
    mask[..., 3] = False
    wanted = attention(q, q, q, spec, key_lengths=torch.tensor([3, 3]))
    for mine, read in ((masks, 2), (masks, 2), (PaddingMasks(), 3)):
        assert torch.equal(mine.attend(q, q, q, spec, mask), wanted) and len(readings) == read
    with torch.inference_mode():
        for read in (4, 5):
            made = mask.clone()
            assert torch.equal(masks.attend(q, q, q, spec, made), wanted) and len(readings) == read


def test_what_transformers_may_ask_for_and_we_do_not_have(llama, bert):
    tokens = torch.randint(50, (1, 5))
    with use_attention(bert), pytest.raises(ValueError, match=r"dropout: 0\.1 given"):
        bert.train()(tokens)
    with (
        use_attention(llama, AttentionSpec(kernel="sdpa-cudnn")),
        pytest.raises(ValueError, match="'sdpa-cudnn' cannot"),
    ):
        llama(tokens)
    with use_attention(llama):
        attend = pytest.importorskip("transformers").modeling_utils.ALL_ATTENTION_FUNCTIONS[
            llama.config._attn_implementation
        ]
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="attention sinks"):
        attend(nn.Identity(), x, x, x, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="output_attentions"):
        attend(nn.Identity(), x, x, x, None, output_attentions=True)
    with pytest.raises(ValueError, match="alignment is unknown"):
        attend(nn.Identity(), x[:, :, :2], x, x, None)


def test_position_bias_is_added_to_either_mask(llama):
    with use_attention(llama):
        attend = pytest.importorskip("transformers").modeling_utils.ALL_ATTENTION_FUNCTIONS[
            llama.config._attn_implementation
        ]
    torch.manual_seed(2)
    x, bias, look = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 4), torch.ones(4, 4, dtype=torch.bool).tril()
    hidden = bias.masked_fill(~look, float("-inf"))
    wanted = ((x @ x.mT / 8**0.5 + hidden).softmax(-1) @ x).transpose(1, 2)
    for mask in (look[None, None], torch.zeros(1, 1, 4, 4).masked_fill(~look, float("-inf"))):
        assert_agree(attend(nn.Identity(), x, x, x, mask, position_bias=bias)[0], wanted)


@pytest.fixture
def wan():
    return small_wan


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_wan_is_the_same_and_comes_back(wan, calls, fused):
    model = wan()
    if fused:
        model.fuse_qkv_projections()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 6, 4),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }
    wanted, before = model(**inputs)[0], dict(model.attn_processors)
    with use_attention(model, REFERENCE):
        assert_agree(model(**inputs)[0], wanted)
        assert len(calls) == 4  # two layers, each with self- and cross-attention
    assert dict(model.attn_processors) == before
    assert torch.equal(model(**inputs)[0], wanted) and len(calls) == 4


@torch.no_grad()
def test_wan_image_to_video(wan, calls):
    model = wan(image_dim=20, added_kv_proj_dim=24)
    inputs = {
        "hidden_states": torch.randn(1, 4, 1, 4, 4),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, 7, 20),
    }
    wanted = model(**inputs)[0]
    with use_attention(model):
        assert_agree(model(**inputs)[0], wanted)
    assert len(calls) == 6


@torch.no_grad()
def test_dit_is_the_same_and_comes_back(calls):
    model = small_dit(8)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([7, 9]),
        "class_labels": torch.tensor([1, 2]),
    }
    wanted = model(**inputs).sample
    with use_attention(model):
        assert_agree(model(**inputs).sample, wanted)
        assert len(calls) == 2
    assert torch.equal(model(**inputs).sample, wanted) and len(calls) == 2


@torch.no_grad()
def test_unet_with_cross_attention_and_masks(calls, readings):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(5)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("AttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    look = torch.ones(2, 6, dtype=torch.long)
    look[1, 3:] = 0
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": 5,
        "encoder_hidden_states": torch.randn(2, 6, 12),
        "encoder_attention_mask": look,
    }
    wanted = model(**inputs).sample
    with use_attention(model):
        assert_agree(model(**inputs).sample, wanted)
    layers = len(model.attn_processors)
    assert len(calls) == layers and any(mask is not None for _, mask, *_ in calls)
    assert torch.equal(model(**inputs).sample, wanted)

    with use_attention(model, AttentionSpec(numerics="int8_fp16")):
        out = model(**inputs).sample
    assert (out - wanted).norm() / wanted.norm() < 0.02 and len(readings) == 1
    lengths = [call[2].tolist() for call in calls[layers:] if len(call) == 3]
    assert lengths and all(found == [6, 3] for found in lengths)


def test_a_layer_without_counterpart_is_named():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    before = dict(model.attn_processors)
    with pytest.raises(ValueError, match=r"2 of 2 attention layers have no counterpart .*FluxAttnProcessor"):
        use_attention(model)
    assert dict(model.attn_processors) == before


def test_models_without_hooks_and_specs_of_the_caller():
    with pytest.raises(ValueError, match="Linear has no hook for attention; give a transformers or diffusers"):
        use_attention(nn.Linear(2, 2))
    pipeline = nn.Module()
    pipeline.transformer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="give its transformer"):
        use_attention(pipeline)
    with pytest.raises(ValueError, match="the model decides"):
        use_attention(nn.Linear(2, 2), AttentionSpec(causal=True))


def test_undo_runs_once_even_after_an_error():
    runs = []
    handle = AttentionHandle(lambda: runs.append(1))
    with pytest.raises(KeyError), handle:
        raise KeyError
    handle.undo()
    assert runs == [1]
