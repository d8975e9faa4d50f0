from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from allears.core.config import from_dict, to_dict
from allears.models.video.config import PRESETS, VideoConfig
from allears.models.video.model import VideoNet, modulate, use_attention
from allears.models.video.patches import positions, rope_3d, to_patches, to_video, token_places, turn
from allears.nn.rope import apply_rope
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import AttentionSpec, Sparsity
from allears.ops.attention.sparse_linear import SparseLinear

TEST = PRESETS["test"]


def trained(config=TEST, seed=0):
    """A network none of whose parameters is at a value that hides a part."""
    torch.manual_seed(seed)
    net = VideoNet(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def inputs(config=TEST, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, *config.video_shape, generator=generator)
    words = torch.randint(1, len(config.words), (batch, config.text_words), generator=generator)
    return x, torch.linspace(0.2, 0.9, batch), words


def test_patches_come_back_and_a_tile_is_a_cube():
    video = torch.arange(3 * 8 * 8 * 16).float().view(1, 3, 8, 8, 16)
    for patch, tile in (((2, 4, 4), (2, 1, 2)), ((1, 2, 2), (4, 2, 4)), ((2, 4, 4), (1, 1, 1))):
        parts = to_patches(video, patch, tile)
        assert parts.shape == (1, 3072 // (3 * patch[0] * patch[1] * patch[2]), 3 * patch[0] * patch[1] * patch[2])
        assert torch.equal(to_video(parts, (8, 8, 16), patch, tile), video)
    parts = to_patches(video, (2, 4, 4), (2, 1, 2))
    second = video[0, :, :2, :4, 4:8]  # the second token of a tile of 2 x 1 x 2 is the one to the right
    assert torch.equal(parts[0, 1], second.flatten())
    third = video[0, :, 2:4, :4, :4]  # and the third the one two frames later
    assert torch.equal(parts[0, 2], third.flatten())
    place = positions((4, 8, 8), (4, 4, 4), torch.device("cpu"))
    assert place[:64].amax(0).tolist() == [3, 3, 3] and place[64:128].amin(0).tolist() == [0, 0, 4]
    assert len({tuple(row) for row in place.tolist()}) == 256


def test_rotary_positions_know_differences_alone_in_each_direction():
    grid, tile = (4, 4, 4), (2, 2, 2)
    table = rope_3d(grid, tile, 16, torch.device("cpu"))
    place = positions(grid, tile, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (apply_rope(x.expand(1, 64, 1, 16), table)[0, :, 0] for x in (q, k))
    products = turned_q @ turned_k.T
    seen: dict[tuple, float] = {}
    where, values = place.tolist(), products.tolist()
    for i in range(64):
        for j in range(64):
            step = tuple(a - b for a, b in zip(where[i], where[j], strict=True))
            assert abs(seen.setdefault(step, values[i][j]) - values[i][j]) < 1e-4
    near = float(q.flatten() @ k.flatten())
    for step in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1)):
        assert abs(seen[step] - near) > 1e-3
    fast = rope_3d(grid, tile, 16, torch.device("cpu"), torch.arange(4) * 2.0)[0]
    at_two, at_one = ((place == torch.tensor(p)).all(1).nonzero()[0, 0] for p in ([2.0, 1, 3], [1.0, 1, 3]))
    torch.testing.assert_close(table[0][at_two], fast[at_one])
    each = rope_3d(grid, tile, 16, torch.device("cpu"), torch.stack([torch.arange(4) * s for s in (1.0, 2.0)]))
    assert torch.equal(each[0][0], table[0]) and torch.equal(each[0][1], fast)
    both = torch.cat([q.expand(1, 64, 1, 16)] * 2)
    torch.testing.assert_close(turn(both, each)[0], turn(both[:1], table)[0])
    with pytest.raises(ValueError, match="each of 4 frames"):
        rope_3d(grid, tile, 16, torch.device("cpu"), torch.arange(3))


def test_tokens_of_clips_of_fewer_frames_lie_where_they_do_in_the_whole_one():
    cpu = torch.device("cpu")
    assert torch.equal(token_places(32, 32, 2, cpu), torch.arange(16.0))
    for frames in (2, 4, 16):
        moments = torch.linspace(0, 31, frames)  # of the frames of the short clip, in frames of the whole one
        wanted = (moments.view(-1, 2).mean(1) - 0.5) / 2
        torch.testing.assert_close(token_places(frames, 32, 2, cpu), wanted)
    assert token_places(1, 32, 1, cpu).tolist() == [15.5]


def test_places_in_time_count_one_by_one():
    """A clip of some tokens, each at its place, is another than at other places; whole clips are as without."""
    for anchored in (False, True):
        config = replace(TEST, anchored=anchored)
        net, (x, t, words) = trained(config), inputs(config)
        whole = net(x, t, words)
        torch.testing.assert_close(net(x, t, words, torch.arange(4.0)), whole)
        torch.testing.assert_close(net(x, t, words, torch.arange(4.0).repeat(2, 1)), whole)
        part = x[:, :, 2:6]
        at = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        found = net(part, t, words, at)
        torch.testing.assert_close(found[1:], net(part[1:], t[1:], words[1:], at[1]), atol=1e-5, rtol=1e-4)
        shifted = net(part, t, words, at + 1)
        same = torch.allclose(shifted, found, atol=1e-5, rtol=1e-4)
        assert same != anchored  # rotary positions alone know differences alone
    plain = trained(TEST)
    first = torch.zeros_like(x[:, :, :2])
    moved = [trained(replace(TEST, anchored=a))(first, t, words, torch.tensor([2.0])) for a in (False, True)]
    assert plain(first, t, words).shape == first.shape and not torch.allclose(*moved)


def test_training_may_run_blocks_its_own_way():
    net, (x, t, words) = trained(), inputs()
    wanted, seen = net(x, t, words), []

    def run(block, *args):
        seen.append(block)
        return block(*args)

    net.training_block = run
    assert torch.equal(net(x, t, words), wanted) and not seen
    torch.testing.assert_close(net.train()(x, t, words), wanted)
    assert seen == list(net.blocks)


def test_the_velocity_follows_from_the_clean_video():
    net, (x, t, words) = trained(), inputs()
    as_velocity = trained(replace(TEST, predicts="velocity"))
    clean = as_velocity(x, t, words)
    torch.testing.assert_close(net(x, t, words), (x - clean) / t.view(-1, 1, 1, 1, 1))
    tiny = torch.full_like(t, 1e-4)
    torch.testing.assert_close(net(x, tiny, words), (x - as_velocity(x, tiny, words)) / 1e-3)


def test_a_block_is_the_published_one():
    """Against the equations written out: modulated self-attention, cross-attention, modulated feed-forward."""
    net, (x, t, words) = trained(), inputs()
    block, config = net.blocks[0], TEST
    h = net.enter(to_patches(x, config.patch, config.tile))
    context, time = net.text(words), net.time(t)
    of_blocks = net.time_blocks(F.silu(time)).view(2, 6, -1)
    six = (of_blocks + block.modulation)[:, :, None]

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    def rms(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def attend(q, k, v):
        logits = torch.einsum("blhd,bmhd->bhlm", q, k) / 4
        return torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v).flatten(2)

    own, cross = block.attention, block.cross
    q, k, v = own.qkv(norm(h) * (1 + six[:, 1]) + six[:, 0]).view(2, -1, 3, 2, 16).unbind(2)
    table = rope_3d(config.grid, config.tile, 16, x.device)
    q, k = apply_rope(rms(q, own.q_norm.weight), table), apply_rope(rms(k, own.k_norm.weight), table)
    wanted = h + six[:, 2] * own.out(attend(q, k, v))
    q = rms(cross.q(block.cross_norm(wanted)).view(2, -1, 2, 16), cross.q_norm.weight)
    k, v = cross.kv(context).view(2, -1, 2, 2, 16).unbind(2)
    wanted = wanted + cross.out(attend(q, rms(k, cross.k_norm.weight), v))
    wanted = wanted + six[:, 5] * block.feed(norm(wanted) * (1 + six[:, 4]) + six[:, 3])
    found = block(h, of_blocks, context, table)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_text_time_and_every_pixel_matter():
    net, (x, t, words) = trained(), inputs()
    base = net(x, t, words)
    other = words.clone()
    other[:, 3] = (other[:, 3] + 1) % len(TEST.words)
    swapped = words[:, [1, 0, *range(2, words.shape[1])]]
    for change in (net(x, t, other), net(x, t, swapped), net(x, t * 0.9, words)):
        assert float((change - base).detach().abs().mean()) > 1e-4
    touched = x.clone()
    touched[:, 0, 0, 0, 0] += 1
    assert ((net(touched, t, words) - base).abs().amax((1, 3, 4)) > 0).all()  # all frames see it
    torch.testing.assert_close(net(x[1:], t[1:], words[1:]), base[1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.with_context(x, t, net.text(words)), base)


def test_gradients_reach_every_parameter():
    net, (x, t, words) = trained(), inputs()
    net(x, t, words).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name
    fresh = VideoNet(TEST)
    torch.testing.assert_close(fresh(x, t, words) * t.view(-1, 1, 1, 1, 1), x)  # an untrained one sees a gray video


def test_forward_mode_derivatives():
    """As consistency training takes them: in x and t together, with attention written in plain products."""
    net, (x, t, words) = (
        trained(replace(TEST, frames=4, tile=(1, 2, 2), layers=1)).double(),
        inputs(replace(TEST, frames=4, tile=(1, 2, 2), layers=1)),
    )
    x, t = x.double(), t.double()

    class Plain(torch.nn.Module):
        def forward(self, q, k, v, mask=None):
            weights = (torch.einsum("blhd,bmhd->bhlm", q, k) * q.shape[-1] ** -0.5).softmax(-1)
            return torch.einsum("bhlm,bmhd->blhd", weights, v)

    for block in net.blocks:
        block.attention.core = block.cross.core = Plain()
    context = net.text(words).detach()
    direction, rate = torch.randn_like(x), torch.tensor([0.03, -0.02], dtype=torch.float64)
    _, tangent = torch.func.jvp(lambda a, b: net.with_context(a, b, context), (x, t), (direction, rate))
    step = 2e-3
    with torch.no_grad():
        ahead, back = (net.with_context(x + s * direction, t + s * rate, context) for s in (step, -step))
    wanted = (ahead - back) / (2 * step)
    assert float((tangent - wanted).detach().norm() / wanted.norm()) < 2e-3


def test_other_lengths_and_attention_through_the_engine():
    config = replace(TEST, frames=16, size_px=32, tile=(4, 4, 4))  # 512 tokens
    net = trained(config)
    x, t, words = inputs(config, batch=1)
    dense = net(x, t, words)
    assert net(x[:, :, ::2], t, words).shape == (1, 3, 8, 32, 32)
    use_attention(net, AttentionSpec(sparse=Sparsity(keep=1.0)))
    torch.testing.assert_close(net(x, t, words), dense, atol=1e-4, rtol=1e-4)
    use_attention(net, AttentionSpec(sparse=Sparsity(keep=0.25)))
    assert float((net(x, t, words) - dense).detach().abs().mean()) > 1e-5
    use_attention(net, AttentionSpec())
    for layer in net.attentions():
        layer.core = SparseLinearAttention(2, 16, 1.0, SparseLinear(form="sparse", block_q=64))
    torch.testing.assert_close(net(x, t, words), dense, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="causal=True given"):
        use_attention(net, AttentionSpec(causal=True))


def test_modulate_keeps_the_dtype():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    shift, scale = torch.full((2, 8), 3.0), torch.full((2, 8), -0.5)
    y = modulate(x, shift, scale)
    torch.testing.assert_close(y.mean(-1), torch.full((2, 5), 3.0))
    torch.testing.assert_close(y.std(-1, correction=0), torch.full((2, 5), 0.5), atol=1e-3, rtol=0)
    assert modulate(x.bfloat16(), shift, scale).dtype == torch.bfloat16


def test_configurations():
    for config in PRESETS.values():
        assert from_dict(VideoConfig, to_dict(config)) == config
    base = PRESETS["base"]
    assert base.tokens == 4096 and base.attention_flops() / base.step_flops() == pytest.approx(0.717, abs=0.01)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in VideoNet(base).parameters())
    assert 2 * size < 12 * 2**20 - 40_000  # in float16, with names and configuration
    for wrong, said in (
        ({"frames": 30}, "frames: 30 given; wanted a multiple of patch x tile, 2 x 4"),
        ({"size_px": 60}, "size_px: 60"),
        ({"heads": 3}, "heads: 3"),
        ({"predicts": "noise"}, "predicts: 'noise'"),
        ({"shift": 0.0}, "shift"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(base, **wrong)
    few = base.with_frames(4)
    assert few.video_shape == (4, 64, 64) and few.tile == (2, 4, 4) and few.tokens == 512
    assert base.with_frames(None) is base
    with pytest.raises(ValueError, match="frames: 3 given"):
        base.with_frames(3)


def test_wrong_inputs_are_named():
    net, (x, t, words) = trained(), inputs()
    for given, said in (
        ((x[:, :, :5], t, words), r"multiples of \[2, 8, 8\]"),
        ((x[0], t, words), "wanted"),
        ((x, t[:1], words), "2, 1 and 2 entries"),
    ):
        with pytest.raises(ValueError, match=said):
            net(*given)


def test_in_16_bits():
    net, (x, t, words) = trained(), inputs()
    wanted = net(x, t, words).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x, t, words)
    assert found.dtype == torch.float32 and float((found.detach() - wanted).norm() / wanted.norm()) < 0.05
