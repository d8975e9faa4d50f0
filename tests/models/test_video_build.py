"""The video network from its weights: sparse layers, 8-bit layers, packed matrices, and the few-step sampler."""

import json
from dataclasses import replace

import pytest
import torch
from tests.video_nets import BLOCKY, lively

from allears.core.config import to_dict
from allears.core.errors import WeightsError
from allears.core.weights import load_weights, save_weights
from allears.diffusion.few_steps import few_step_angles
from allears.models.video import PRESETS, VideoGenerator
from allears.models.video.build import SparseLayers, build_net, pack, unpack, use_w8a8
from allears.models.video.model import VideoNet
from allears.models.video.sample import draw_noise, generate_few, noises
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.nn.w8a8 import W8A8Linear
from allears.ops.attention.sparse_linear import SparseLinear

TEST = PRESETS["test"]
WORDS = torch.tensor([[1, 2, 0], [3, 0, 0]])


def with_cores(keep: float = 0.3) -> VideoNet:
    net = lively(BLOCKY)
    core = SparseLinearAttention(2, 16, keep, SparseLinear(block_q=64, precision="int8_fp8"))
    core.ratio.set(torch.tensor([0.3, 0.8]))
    net.blocks[0].attention.core = core
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_exact_velocity_leads_to_its_video_in_few_steps(steps):
    wanted = torch.rand(2, 3, *TEST.video_shape, generator=torch.Generator().manual_seed(0))

    def velocity(x, t, tokens):
        return (x - (2 * wanted - 1)) / t.view(-1, 1, 1, 1, 1)

    done = []
    made = generate_few(velocity, TEST, WORDS, [1, 2], steps, done.append)
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
    assert done == list(range(1, steps + 1))


def test_noise_between_steps_is_fresh_and_of_the_videos_seed():
    seen = []

    def velocity(x, t, tokens):
        seen.append((x.clone(), float(t[0])))
        return x / t.view(-1, 1, 1, 1, 1)  # the clean video is 0

    generate_few(velocity, TEST, WORDS, [5, 9], 2)
    stream = noises(TEST, [5, 9])
    start, second = next(stream), next(stream)
    torch.testing.assert_close(start, draw_noise(TEST, [5, 9]))
    t = seen[1][1]
    torch.testing.assert_close(seen[1][0] / t, second)
    assert t == pytest.approx(torch.tensor(few_step_angles(2)[1]).tan().item() / (1 + 14.1014), rel=1e-3)
    both = [x for x, _ in seen]
    seen.clear()
    generate_few(velocity, TEST, WORDS[1:], [9], 2)
    torch.testing.assert_close(torch.stack([x for x, _ in seen])[:, 0], torch.stack(both)[:, 1])
    with pytest.raises(ValueError, match="steps: 5"):
        generate_few(velocity, TEST, WORDS, [5, 9], 5)


def test_distilled_configurations_are_of_few_steps_without_guidance():
    few = replace(TEST, steps=4, guidance=1.0, distilled=True)
    assert few.distilled and not TEST.distilled
    for wrong in ({"steps": 5}, {"guidance": 3.0}):
        with pytest.raises(ValueError, match="distilled"):
            replace(few, **wrong)


def test_sparse_weights_come_back_as_they_were(tmp_path):
    net = with_cores()
    layers = SparseLayers.of(net)
    assert layers is not None and layers.keeps == {"blocks.0.attention": 0.3}
    assert SparseLayers.of(lively(TEST)) is None and SparseLayers.of_record({}) is None
    record = json.loads(json.dumps({"sparse": layers.to_record()}))
    assert SparseLayers.of_record(record) == layers
    x, t = draw_noise(BLOCKY, [1]), torch.tensor([0.7])
    again = build_net(BLOCKY, net.state_dict(), layers)
    torch.testing.assert_close(again(x, t, WORDS[:1]), net(x, t, WORDS[:1]))
    exact = build_net(BLOCKY, net.state_dict(), layers, "exact")
    core = exact.blocks[0].attention.core
    assert core.options.precision == "exact" and core.options.block_q == 64
    assert not torch.equal(exact(x, t, WORDS[:1]), net(x, t, WORDS[:1]))
    with pytest.raises(WeightsError, match=r"unknown blocks\.0\.attention\.core"):
        build_net(BLOCKY, net.state_dict())
    with pytest.raises(WeightsError, match=r"blocks\.7\.attention"):
        build_net(BLOCKY, net.state_dict(), replace(layers, keeps={"blocks.7.attention": 0.3}))
    with pytest.raises(WeightsError, match=r"keep=0\.3"):
        build_net(BLOCKY, net.state_dict(), replace(layers, keeps={"blocks.0.attention": 0.5}))


def test_eight_bits_change_little_and_leave_routers_alone():
    net = with_cores()
    x, t = draw_noise(BLOCKY, [1]), torch.tensor([0.7])
    wanted = net(x, t, WORDS[:1])
    names = use_w8a8(net)
    assert "blocks.0.feed.widen" in names and "blocks.0.cross.kv" in names and not any("core" in name for name in names)
    assert isinstance(net.blocks[0].attention.qkv, W8A8Linear) and isinstance(net.time_blocks, torch.nn.Linear)
    off = float((net(x, t, WORDS[:1]) - wanted).norm() / wanted.norm())
    assert 1e-4 < off < 0.1


def test_dense_layers_attend_in_eight_bits_where_asked_for():
    net = lively(TEST)
    x, t = draw_noise(TEST, [1]), torch.tensor([0.7])
    low = build_net(TEST, net.state_dict(), precision="int8_fp8")
    assert low.blocks[0].attention.spec.numerics == "int8_fp8" and low.blocks[0].cross.spec.numerics == "exact"
    with torch.no_grad():
        off = low(x, t, WORDS[:1]) - net(x, t, WORDS[:1])
    assert 0 < float(off.norm() / net(x, t, WORDS[:1]).norm()) < 0.05


def test_packed_matrices_are_half_as_large_and_nearly_the_same():
    state = lively(TEST).state_dict()
    state["time_blocks.weight"][3] = 0.0
    packed = pack(state, ["time_blocks"])
    assert "time_blocks.weight" not in packed and packed["time_blocks.weight.int8"].dtype == torch.int8
    back = unpack({name: x.half() if x.is_floating_point() else x for name, x in packed.items()})
    assert back.keys() == state.keys()
    step = state["time_blocks.weight"].abs().amax(1, keepdim=True) / 127
    assert bool(((back["time_blocks.weight"] - state["time_blocks.weight"]).abs() <= 0.51 * step + 1e-6).all())
    assert torch.equal(back["time_blocks.weight"][3], torch.zeros(state["time_blocks.weight"].shape[1]))
    with pytest.raises(ValueError, match="'nothing' has no matrix"):
        pack(state, ["nothing"])
    with pytest.raises(WeightsError, match="without its scale"):
        unpack({"a.weight.int8": packed["time_blocks.weight.int8"]})


def test_the_generator_runs_distilled_sparse_weights(tmp_path):
    net = with_cores()
    layers = SparseLayers.of(net)
    config = replace(BLOCKY, steps=2, guidance=1.0, distilled=True)
    record = {"model": "video", "config": to_dict(config), "sparse": layers.to_record()}
    save_weights(tmp_path / "weights", pack(net.state_dict(), ["time_blocks"]), record)
    generator = VideoGenerator.from_pretrained(tmp_path, device="cpu")
    assert generator.net.blocks[0].attention.core.options.precision == "exact"  # on a CPU
    seen = []
    one = generator(
        "a red ball falls", seed=3, on_progress=lambda progress: seen.append((progress.done, progress.total))
    )
    assert seen == [(1, 2), (2, 2)] and one.frames.shape == (16, 32, 32, 3)
    pair = generator.batch(["a red ball falls", "a blue box stays"], seeds=[3, 4])
    assert abs(pair[0].frames.astype(int) - one.frames.astype(int)).max() <= 1
    low = VideoGenerator.from_pretrained(tmp_path, device="cpu", precision="int8_fp8", linear="int8_row")
    assert isinstance(low.net.blocks[0].feed.widen, W8A8Linear)
    assert (low("a red ball falls", seed=3).frames != one.frames).any()
    with pytest.raises(ValueError, match="guidance: 3"):
        generator("a red ball falls", guidance=3.0)
    with pytest.raises(ValueError, match="steps: 7"):
        generator("a red ball falls", steps=7)
    assert load_weights(tmp_path / "weights")[1]["sparse"]["keeps"] == {"blocks.0.attention": 0.3}
