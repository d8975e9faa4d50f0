"""The video model distilled to few steps, tuned with sparse attention, and both merged."""

import json
from dataclasses import replace

import pytest
import torch
from tests.video_nets import BLOCKY, lively

from allears.core.config import to_dict
from allears.core.weights import load_weights, save_weights
from allears.data.world import draw_specs
from allears.diffusion.tangent import tangent_error, velocity_tangent
from allears.models.video import PRESETS, VideoGenerator
from allears.models.video.loss import draw_times
from allears.ops.attention.sparse_linear import SparseLinear
from allears.recipes import RECIPES
from allears.recipes.video_distil import VideoScores, check_tangent, distil_video, sample_few_specs
from allears.recipes.video_merge import load_stem, merge_video, merged, pack_video
from allears.recipes.video_tune import distillation_kit, load_teacher, sparsify_video, times_of, tune_video
from allears.turbo.sparse import SparseSettings

CPU = torch.device("cpu")
SMALL = {"batch": 1, "device": "cpu", "check_clips": 0}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """The pictures of a run cost more than all else here."""
    monkeypatch.setattr("allears.train.loop.draw_curves", lambda out: None)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    stem = tmp_path_factory.mktemp("teacher") / "teacher"
    save_weights(stem, lively(BLOCKY).state_dict(), {"model": "video", "config": to_dict(BLOCKY)}, dtype="float32")
    return str(stem)


@pytest.fixture(scope="module")
def distilled(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allears.train.loop.draw_curves", lambda out: None)
        rcm = {"warmup_steps": 1, "student_every": 2, "rollout_calls": 2}
        result = distil_video([], str(out), steps=4, teacher=teacher, rcm=rcm, lr=1e-3, sampler_steps=2, **SMALL)
    return result, out


@pytest.fixture(scope="module")
def tuned(teacher, tmp_path_factory):
    out = tmp_path_factory.mktemp("tuned")
    settings = SparseSettings(keeps=(0.3,), max_error=9.0, options=SparseLinear(block_q=64), steps=2, query_blocks=2)
    sparsify_video(teacher, str(out / "sparse"), settings, "cpu", batches=1, batch=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allears.train.loop.draw_curves", lambda out: None)
        tune_video(
            str(out), teacher, str(out / "sparse"), steps=2, device="cpu", batch=1, lr=1e-3, precision="int8_fp8"
        )
    return out


def test_the_network_has_an_exact_tangent():
    """Self-attention with rotary positions, cross-attention, norms, modulation and the embedding of time."""
    net = lively(PRESETS["test"])
    rng = torch.Generator().manual_seed(2)
    x, d_x = (torch.randn(2, 3, *net.config.video_shape, generator=rng) for _ in range(2))
    t, d_t = torch.tensor([0.3, 0.9]), torch.tensor([0.5, -1.0])
    tokens = torch.randint(1, 20, (2, net.config.text_words), generator=rng)
    net, x, d_x, t, d_t = net.double(), x.double(), d_x.double(), t.double(), d_t.double()
    coarse, fine = (tangent_error(net, x, t, tokens, d_x, d_t, step) for step in (3e-3, 3e-4))
    assert fine < 2e-3 and coarse > 20 * fine  # the error of the difference, which falls with the square of its step


def test_the_tangent_survives_sixteen_bits():
    """As on a GPU: autocast to bfloat16, the derivative within its precision of that in float32."""
    net = lively(PRESETS["test"])
    rng = torch.Generator().manual_seed(2)
    x, d_x = (torch.randn(2, 3, *net.config.video_shape, generator=rng) for _ in range(2))
    tokens = torch.randint(1, 20, (2, net.config.text_words), generator=rng)
    at = (x, torch.tensor([0.6, 0.9]), tokens, d_x, torch.tensor([0.2, 0.2]))
    with torch.no_grad():
        _, wanted = velocity_tangent()(net, *at)
        with torch.autocast("cpu", torch.bfloat16):
            _, found = velocity_tangent()(net, *at)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 0.05


def test_a_cut_tangent_is_found(teacher, monkeypatch):
    kit = distillation_kit(teacher, 2, "cpu")
    assert check_tangent(kit, CPU) < 0.03
    monkeypatch.setattr("allears.recipes.video_distil.tangent_error", lambda *args: 0.9)
    with pytest.raises(ValueError, match="derivative of the network is off by 90"):
        check_tangent(kit, CPU)


def test_the_recipe_distils_and_exports(teacher, distilled):
    result, out = distilled
    assert result.step == 4 and result.skipped == 0
    record = json.loads((out / "export.json").read_text())
    assert record["model"] == "video" and record["training"]["recipe"] == "video-rcm"
    assert record["config"]["distilled"] and record["config"]["steps"] == 2 and record["config"]["guidance"] == 1.0
    assert record["training"]["guidance"] == 3.0 and record["training"]["tangent_error"] < 0.05
    assert record["training"]["rcm"]["consistency_angles"] == {"mean": 1.6, "std": 1.4}
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    means = next(row for row in rows if row["kind"] == "train")
    assert 0 < means["consistency"] < 1.01 and means["critic"] > 0 and means["score"] > 0
    tensors, _ = load_weights(out / "ema")
    before, _ = load_weights(teacher)
    for part in ("student", "critic"):
        moved = [not torch.equal(tensors[f"{part}.{name}"], before[name]) for name in before]
        assert sum(moved) > 0.9 * len(moved), part
    assert callable(RECIPES["video-rcm"])
    video = VideoGenerator.from_pretrained(out / "export", device="cpu")("a red ball falls")
    assert video.frames.shape == (16, 32, 32, 3)


def test_without_score_distillation_there_is_no_critic_and_a_run_goes_on(teacher, tmp_path):
    rcm = {"warmup_steps": 1, "score_weight": 0}
    whole = distil_video([], str(tmp_path / "a"), steps=2, teacher=teacher, rcm=rcm, lr=1e-3, **SMALL)
    assert whole.step == 2 and not any("critic" in name for name in load_weights(tmp_path / "a" / "ema")[0])
    again = distil_video([], str(tmp_path / "a"), steps=3, teacher=teacher, rcm=rcm, lr=1e-3, **SMALL)
    assert again.step == 3


def test_scores_are_of_all_numbers_of_steps():
    net, config = lively(PRESETS["test"]), PRESETS["test"]
    scores = VideoScores(config, 2, CPU)(net)
    assert {f"prompt_score_{n}" for n in (4, 2, 1)} < set(scores) and VideoScores(config, 0, CPU)(net) == {}
    specs = draw_specs(3, 0, "test")
    whole = sample_few_specs(net, config, specs, CPU, 2, batch=2)
    assert whole.shape == (3, 3, 8, 16, 16)
    torch.testing.assert_close(sample_few_specs(net, config, specs[2:], CPU, 2), whole[2:], atol=1e-4, rtol=0)


def test_a_merge_is_the_sum_of_what_was_learnt_apart(teacher, tuned, distilled, tmp_path):
    base, sparse, few = (load_stem(stem) for stem in (teacher, tuned / "export", distilled[1] / "export"))
    state = merged(base, sparse, few)
    name = "blocks.0.feed.widen.weight"
    wanted = few.tensors[name] + sparse.tensors[name] - base.tensors[name]
    torch.testing.assert_close(state[name], wanted)
    torch.testing.assert_close(merged(base, sparse, few, 0.0)[name], few.tensors[name])
    router = "blocks.0.attention.core.router.proj_q"
    assert torch.equal(state[router], sparse.tensors[router]) and router not in base.tensors
    with pytest.raises(ValueError, match="was not distilled"):
        merged(base, sparse, base)
    with pytest.raises(ValueError, match=r"tuned: .* another size"):
        merged(base, replace(sparse, config=replace(sparse.config, hidden=96)), few)
    path = merge_video(teacher, tuned / "export", distilled[1] / "export", tmp_path / "merged")
    record = json.loads((tmp_path / "merged.json").read_text())
    assert record["training"]["tuned"]["precision"] == "int8_fp8" and record["packed"] == ["time_blocks"]
    assert path.stat().st_size < (distilled[1] / "export.safetensors").stat().st_size + 20_000
    generator = VideoGenerator.from_pretrained(tmp_path / "merged", device="cpu")
    assert generator.config.distilled and generator.net.blocks[0].attention.core.keep == 0.3
    torch.testing.assert_close(generator.net.state_dict()[name], state[name], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(generator.net.time_blocks.weight, state["time_blocks.weight"], atol=3e-3, rtol=0)
    assert generator("a red ball falls", seed=1).frames.shape == (16, 32, 32, 3)
    with pytest.raises(ValueError, match="wanted at most 1000"):
        merge_video(teacher, tuned / "export", distilled[1] / "export", tmp_path / "large", largest_bytes=1000)
    assert not (tmp_path / "large.safetensors").exists() and not (tmp_path / "large.json").exists()


def test_a_distilled_model_is_tuned_with_sparse_attention(tuned, distilled, tmp_path):
    tune_video(str(tmp_path), str(distilled[1] / "export"), str(tuned / "sparse"), steps=1, device="cpu", batch=1)
    few = load_stem(tmp_path / "export")
    pack_video(tmp_path / "export", tmp_path / "small")
    small = load_stem(tmp_path / "small")
    assert small.config == few.config and small.record["sparse"] == few.record["sparse"]
    assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "export.safetensors").stat().st_size
    assert few.config.distilled and few.record["sparse"]["options"]["precision"] == "exact"
    assert load_teacher(tmp_path / "export", "cpu").blocks[0].attention.core is not None


def test_compiled_blocks_learn_the_same(teacher, distilled, tuned, tmp_path, monkeypatch):
    graphs, real = [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: real(f, dynamic=dynamic, backend=counted))
    torch._dynamo.reset()
    rcm = {"warmup_steps": 1, "student_every": 2, "rollout_calls": 2}
    few = {"steps": 4, "teacher": teacher, "rcm": rcm, "lr": 1e-3, "sampler_steps": 2}
    distil_video([], str(tmp_path / "few"), compile=True, **few, **SMALL)
    of_distillation = len(graphs)
    sparse = {"steps": 2, "device": "cpu", "batch": 1, "lr": 1e-3, "precision": "int8_fp8"}
    tune_video(str(tmp_path / "tuned"), teacher, str(tuned / "sparse"), compile=True, **sparse)
    assert 0 < of_distillation < len(graphs)
    for found, wanted in ((tmp_path / "few", distilled[1]), (tmp_path / "tuned", tuned)):
        rows = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (found, wanted)]
        losses = [[row["loss"] for row in part if row["kind"] == "train"] for part in rows]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0]
    torch._dynamo.reset()


def test_times_of_a_distilled_model_reach_those_of_its_sampler():
    few = replace(BLOCKY, steps=4, guidance=1.0, distilled=True)
    drawn = [draw_times(4000, times_of(config), torch.Generator().manual_seed(0)) for config in (BLOCKY, few)]
    of_training, of_few = ((t > 0.98).float().mean() for t in drawn)
    assert float(of_few) > 0.06 > 10 * float(of_training) and times_of(few).drop_caption == 0.0


def test_layers_that_are_all_dense_are_not_tuned(teacher, tmp_path):
    settings = SparseSettings(keeps=(0.3,), max_error=1e-9, options=SparseLinear(block_q=64), steps=1, query_blocks=1)
    sparsify_video(teacher, str(tmp_path / "sparse"), settings, "cpu", batches=1, batch=1)
    with pytest.raises(ValueError, match=r"all layers of .* are dense"):
        tune_video(str(tmp_path / "x"), teacher, str(tmp_path / "sparse"), steps=1, device="cpu", batch=1)


def test_settings_that_make_no_sense(teacher, tmp_path):
    for wrong, said in (
        ({"preset": "base"}, "preset: 'base'"),
        ({"corpus": ["x"]}, "corpus: 'x'"),
        ({"sampler_steps": 5}, "sampler_steps: 5"),
        ({"rcm": {"warmup": 3}}, "unknown key 'warmup'"),
    ):
        with pytest.raises(ValueError, match=said):
            distil_video(**{"corpus": [], "out": str(tmp_path), "steps": 1, "teacher": teacher, **SMALL, **wrong})
