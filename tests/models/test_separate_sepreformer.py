"""The parts of SepReformer against the layers of PyTorch that the papers name, and its baselines against each other.

Shapes: B batch, T frames, N pooled frames, F channels, H heads, J talkers.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from allears.models.separate import ega
from allears.models.separate.config import SeparateConfig, SepReformerSize
from allears.models.separate.model import SeparateNet
from allears.models.separate.sepreformer import OutputHead, SepReformer, _merge, add_frames, cut_frames
from allears.models.separate.sepreformer_blocks import (
    FeedForward,
    GlobalBlock,
    Halve,
    LocalAttention,
    SpeakerAttention,
    Split,
)
from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.linear.reference import explicit_attention

SIZE = SepReformerSize(8, 2, features=12, heads=2, max_distance=6)
PUBLISHED = SeparateConfig(sepreformer=SIZE, attention="published")
OPTIMISED = SeparateConfig(sepreformer=SIZE, attention="optimised")
FLA = SeparateConfig(sepreformer=SIZE)


def drawn(module, seed=0):
    """In float64 and evaluation, every weight and running statistic moved."""
    rng = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = 0.3 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
                value.add_(noise.abs() if "running_var" in name else noise)
    return module.eval()


def rows(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("samples", [16, 17, 40, 63])
def test_frames_are_those_of_a_convolution_and_come_back_as_of_a_transposed_one(samples):
    x, filters = rows(2, samples), rows(5, 1, 16)
    padded = F.pad(x, (0, -samples % 4))
    frames = cut_frames(x, 16, 4)
    torch.testing.assert_close((frames @ filters[:, 0].T).mT, F.conv1d(padded[:, None], filters, stride=4))
    features = rows(2, 5, frames.shape[1])
    wanted = F.conv_transpose1d(features, filters, stride=4)[:, 0]
    torch.testing.assert_close(add_frames(features.mT @ filters[:, 0], 4), wanted)
    assert wanted.shape[1] >= samples


def test_a_short_input_is_one_frame():
    x = rows(1, 3)
    assert torch.equal(cut_frames(x, 8, 2), F.pad(x, (0, 5))[:, None])


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 20])
@pytest.mark.parametrize("first", [0, 3])
def test_shifted_bias_is_the_key_of_each_distance(frames, first):
    table, q = rows(12, 4), rows(1, 2, frames, 4)
    bias = ega._shifted_bias(q, table, first, frames + first)
    keys = ega.relative_keys(table, frames + first)
    for i in range(frames):
        for j in range(frames + first):
            distance = min(max(i + first - j, -6), 5)
            assert torch.equal(keys[i + first, j], table[distance + 6])
            torch.testing.assert_close(bias[0, :, i, j], q[0, :, i] @ table[distance + 6])


@pytest.mark.parametrize("queries", [512, 5])
@pytest.mark.parametrize("samples", [1, 63, 500, 501])
def test_optimised_is_published_in_value_and_gradient(monkeypatch, samples, queries):
    monkeypatch.setattr(ega, "_QUERIES", queries)
    nets = [drawn(SeparateNet(config)) for config in (PUBLISHED, OPTIMISED)]
    nets[1].load_state_dict(nets[0].state_dict())
    mixture, slope = rows(2, samples), rows(2, 2, samples, seed=2)
    outs = [net(mixture) for net in nets]
    torch.testing.assert_close(*outs, rtol=1e-8, atol=1e-8)
    grads = [torch.autograd.grad((y * slope).sum(), net.parameters()) for y, net in zip(outs, nets, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_global_attention_by_the_layers_the_paper_names():
    """Adaptive pooling, layer norm, attention with a bias of relative keys, layer scale, nearest upsampling, a gate."""
    block = drawn(ega.GlobalAttention(8, 2, 4, 0.1, fused=True))
    x, table = rows(3, 20, 8), rows(12, 4)
    pooled = F.adaptive_avg_pool1d(x.mT, 5).mT
    h = F.layer_norm(pooled, (8,), block.norm.weight, block.norm.bias)
    q, k, v = (f(h).view(3, 5, 2, 4).transpose(1, 2) for f in (block.q, block.k, block.v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) + torch.einsum("bhid,ijd->bhij", q, ega.relative_keys(table, 5))
    y = block.out(((scores / 2).softmax(-1) @ v).transpose(1, 2).reshape(3, 5, 8)) * block.scale.weight
    gate = block.gate(F.layer_norm(x, (8,), block.gate_norm.weight, block.gate_norm.bias)).sigmoid()
    wanted = x + gate * F.interpolate(y.mT, 20, mode="nearest").mT
    torch.testing.assert_close(block(x, table), wanted)


@pytest.mark.parametrize("change", [{}, {"power": 1}, {"conv_taps": 0}, {"gated": False}])
@pytest.mark.parametrize("frames", [1, 12])
def test_linear_attention_in_the_block_is_its_matrix(change, frames):
    """Feature maps, an N x N matrix with rows that sum to 1, a convolution of the values, one residual."""
    config = SeparateConfig(sepreformer=SIZE, **change)
    block, x = drawn(GlobalBlock(config, SIZE, 1)), rows(2, frames, 8)
    outer, inner = block.attention, getattr(block.attention, "attention", block.attention)
    norm = outer.norm if config.gated else block.norm
    h = F.layer_norm(x, (8,), norm.weight, norm.bias)
    q, k, v = (part.unflatten(-1, (2, 4)) for part in inner.qkv(h).split(8, dim=-1))
    scale = (1 + inner.raw_scale.exp()).log()
    phi = [feature_map(part, "focused", power=config.power, scale=scale) for part in (q, k)]
    y = explicit_attention(*phi, v, eps=1e-6)
    if config.conv_taps:
        by_head = v.permute(0, 2, 3, 1).flatten(0, 1)
        around = F.conv1d(by_head, inner.conv.weight, inner.conv.bias, padding=2, groups=4)
        y = y + around.unflatten(0, (2, 2)).permute(0, 3, 1, 2)
    y = inner.out(y.flatten(-2))
    if config.gated:
        y = y * outer.gate(F.layer_norm(x, (8,), outer.gate_norm.weight, outer.gate_norm.bias)).sigmoid()
    torch.testing.assert_close(block(x, None), block.feed(x + y))


def test_feed_forward_by_the_layers_the_paper_names():
    block, x = drawn(FeedForward(8, 0.1)), rows(2, 11, 8)
    h = block.widen(F.layer_norm(x, (8,), block.norm.weight, block.norm.bias)).mT
    h = F.glu(F.conv1d(h, block.conv.weight, block.conv.bias, padding=1, groups=48), dim=1)
    torch.testing.assert_close(block(x), x + block.scale.weight * block.narrow(h.mT))


def test_local_attention_by_the_layers_the_paper_names_in_training_and_evaluation():
    block, x = drawn(LocalAttention(8, 0.0)), rows(2, 90, 8)
    h = F.glu(block.enter(F.layer_norm(x, (8,), block.norm.weight, block.norm.bias)), dim=-1).mT
    h = block.widen(F.conv1d(h, block.conv.weight, block.conv.bias, padding=32, groups=8).mT).mT
    for training in (False, True):
        block.train(training)
        bn = block.widen_norm
        wide = F.batch_norm(h, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, training)
        wanted = x + block.scale.weight * block.narrow(F.gelu(wide).mT)
        torch.testing.assert_close(block(x), wanted)
    assert bn.num_batches_tracked == 1


def test_halving_by_the_layers_the_paper_names():
    block, x = drawn(Halve(8)), rows(2, 12, 8)
    h = F.conv1d(x.mT, block.conv.weight, block.conv.bias, stride=2, padding=2, groups=8)
    for training in (False, True):
        block.train(training)
        bn = block.norm
        wide = F.batch_norm(h, bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, training)
        torch.testing.assert_close(block(x), F.gelu(wide).mT)
        assert block(x).shape == (2, 6, 8)


@pytest.mark.parametrize("talkers", [1, 2, 3])
def test_speaker_attention_is_multi_head_attention_over_the_talkers_of_a_frame(talkers):
    block, x = drawn(SpeakerAttention(8, 2, talkers, 0.1)), rows(2 * talkers, 5, 8)
    tokens = F.layer_norm(x, (8,), block.norm.weight, block.norm.bias).view(2, talkers, 5, 8).permute(1, 0, 2, 3)
    tokens = tokens.reshape(talkers, 10, 8)
    y = F.multi_head_attention_forward(
        tokens, tokens, tokens, 8, 2, block.qkv.weight, block.qkv.bias, None, None, False, 0.0, block.out.weight,
        block.out.bias, training=False, need_weights=False,
    )[0]  # fmt: skip
    y = y.view(talkers, 2, 5, 8).transpose(0, 1).reshape(2 * talkers, 5, 8)
    torch.testing.assert_close(block(x), x + block.scale.weight * y)


def test_split_by_the_layers_the_paper_names():
    split, x = drawn(Split(8, 3)), rows(2, 7, 8)
    h = F.conv1d(
        F.glu(F.conv1d(x.mT, split.widen.weight[..., None], split.widen.bias), dim=1), split.narrow.weight[..., None]
    )
    h = (h + split.narrow.bias[:, None]).reshape(6, 8, 7)
    torch.testing.assert_close(split(x), F.group_norm(h, 1, split.norm.weight, split.norm.bias, 1e-8).mT)


def test_merge_is_the_layer_on_both_side_by_side():
    layer, x, skip = drawn(torch.nn.Linear(16, 8)), rows(2, 5, 8), rows(2, 10, 8, seed=2)
    repeated = F.interpolate(x.mT, 10, mode="nearest").mT
    torch.testing.assert_close(_merge(layer, x, skip), layer(torch.cat([repeated, skip], dim=-1)))


def test_output_head_is_its_layers_one_after_the_other():
    head, x = drawn(OutputHead(8, 12, 6, 3)), rows(4, 9, 8)
    features = head.narrow(F.glu(head.widen(x), dim=-1))
    out, energy = head(x, 25)
    frames = features @ head.decoder.weight.T
    wanted = F.conv_transpose1d(features.mT, head.decoder.weight.T[:, None], stride=3)[:, 0, :25]
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(energy, frames.square().mean(-1))


@pytest.mark.parametrize("config", [OPTIMISED, FLA])
def test_the_network_is_its_parts_in_the_papers_order(config):
    """Encoder with GELU, norm and projection, R stages whose skips are split, the bottleneck, R stages upwards."""
    net, x = drawn(SepReformer(config)), rows(2, 150)
    h = F.gelu(F.conv1d(F.pad(x, (0, 2))[:, None], net.encoder.weight[:, None], stride=4))
    h = F.group_norm(h, 1, net.norm.weight, net.norm.bias, 1e-8)
    h = F.pad(F.conv1d(h, net.project.weight[..., None]), (0, 1)).mT  # 35 frames, one more for R = 2 halvings
    skips = []
    for stage in range(2):
        for block in net.down[stage]:
            h = block(h, net.relative) if isinstance(block, GlobalBlock) else block(h)
        skips.append(net.split(h))
        h = net.halve[stage](h)
    for block in net.down[2]:
        h = block(h, net.relative) if isinstance(block, GlobalBlock) else block(h)
    h = net.split(h)
    for stage in range(2):
        h = net.merge[stage](torch.cat([h.repeat_interleave(2, dim=1), skips.pop()], dim=-1))
        assert [type(block).__name__ for block in net.up[stage]] == ["GlobalBlock", "LocalBlock", "SpeakerBlock"] * 3
        for block in net.up[stage]:
            h = block(h, net.relative) if isinstance(block, GlobalBlock) else block(h)
    assert h.shape == (4, 36, 8)
    made = net(x)
    torch.testing.assert_close(made.features, h[:, :35].unflatten(0, (2, 2)))
    torch.testing.assert_close(made.out, net.head(h[:, :35], 150)[0].unflatten(0, (2, 2)))


def test_masked_head_repeats_its_mask_over_the_mixtures_features():
    head, x, encoded = drawn(OutputHead(8, 12, 6, 3)), rows(4, 3, 8), rows(2, 9, 12)
    mask = head.narrow(F.glu(head.widen(x), dim=-1)).relu()
    mask = F.interpolate(mask.mT, scale_factor=4, mode="nearest").mT[:, :9]
    masked = torch.stack([mask[i] * encoded[i // 2] for i in range(4)])
    wanted = F.conv_transpose1d(masked.mT, head.decoder.weight.T[:, None], stride=3)[:, 0, :25]
    torch.testing.assert_close(head.masked(x, encoded, 25, 4)[0], wanted)
    assert 0.1 < (mask > 0).double().mean() < 0.9


def test_auxiliary_heads_hear_the_inputs_of_the_decoders_stages_at_their_rates():
    net = drawn(SepReformer(FLA, aux_heads=True))
    mixture, seen = rows(1, 200), []
    for head in net.auxiliary:

        def masked(x, encoded, samples, ratio, real=head.masked):
            seen.append((x.shape[1], ratio))
            return real(x, encoded, samples, ratio)

        head.masked = masked
    made = net(mixture, with_auxiliary=True)
    frames = math.ceil((1 + (200 - 16) / 4) / 4) * 4
    assert seen == [(frames // 4, 4), (frames // 2, 2)]
    assert len(made.auxiliary) == 2 and made.features.shape == (1, 2, 47, 8) and made.energy.shape == (1, 2, 47)


def test_the_decoder_is_told_the_talkers_apart_by_the_split_alone():
    """With the split's channels turned round the outputs are turned round, in training mode too."""
    config = SeparateConfig(sepreformer=SIZE, talkers=3)
    net = drawn(SeparateNet(config)).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    mixture = rows(2, 100)
    before, order = net(mixture), [2, 0, 1]
    with torch.no_grad():
        for value in (net.core.split.narrow.weight, net.core.split.narrow.bias):
            value.copy_(value.unflatten(0, (3, -1))[order].flatten(0, 1))
    torch.testing.assert_close(net(mixture), before[:, order], rtol=1e-6, atol=1e-8)


def test_a_masked_network_masks_what_it_hears_and_begins_with_the_weights_asked_for():
    """With a mask of ones and a decoder that takes the encoder's features back, the mixture itself comes out."""
    size = SepReformerSize(8, 2, features=16, heads=2, kernel=16, stride=16, masked=True, layer_scale=0.25)
    net = SepReformer(SeparateConfig(sepreformer=size)).double().eval()
    assert all(block.scale.weight[0].item() == 0.25 for block in net.down[0][0].modules() if hasattr(block, "scale"))
    head = net.head
    with torch.no_grad():
        net.encoder.weight.copy_(torch.eye(16))
        net.encoder.weight.mul_(50.0)  # a GELU passes what is far above 0
        head.decoder.weight.copy_(torch.eye(16) / 50.0)
        head.narrow.weight.zero_()
        head.narrow.bias.copy_(torch.ones(16))
    x = rows(1, 64).abs() + 1.0
    made = net(x)
    torch.testing.assert_close(made.out, x[:, None].expand(-1, 2, -1))
    torch.testing.assert_close(made.energy, x.unflatten(1, (-1, 16)).square().mean(-1)[:, None].expand(-1, 2, -1))
    with torch.no_grad():
        head.narrow.bias.copy_(torch.full((16,), -1.0))  # no mask is below 0
    assert not net(x).out.any()
