"""The video model from the painted world to weights, sparse layers, and scores."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from allears.core.errors import WeightsError
from allears.core.weights import load_weights, save_weights
from allears.data.world import draw_specs, is_held_out
from allears.data.world_render import render
from allears.data.world_text import parse
from allears.models.video import PRESETS, VideoGenerator
from allears.models.video.loss import FlowLoss
from allears.models.video.model import VideoNet
from allears.ops.attention.sparse_linear import SparseLinear
from allears.recipes.sparse_tune import load_tuned
from allears.recipes.video import VideoObjective, WorldData, draw_batch, sample_specs, train_video, world_videos
from allears.recipes.video_judge import draw_any, load_judge, score_videos, train_judge, true_features
from allears.recipes.video_stages import Stage, Stages
from allears.recipes.video_tune import (
    calibration,
    distillation_kit,
    held_out_prompts,
    load_teacher,
    sparsify_video,
    tune_video,
)
from allears.turbo.sparse import SparseSettings

SMALL = {"preset": "test", "batch": 2, "device": "cpu", "check_clips": 0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return train_video([], str(out / "run"), steps=3, **SMALL), out / "run"


def test_the_recipe_trains_saves_and_loads(run):
    result, out = run
    assert result.step == 3 and set(result.metrics) == {"frames", "loss_train", "loss_test"}
    record = json.loads((out / "export.json").read_text())
    assert record["model"] == "video" and record["training"]["loss"]["drop_caption"] == 0.1
    video = VideoGenerator.from_pretrained(out / "export", device="cpu")("a red ball falls", steps=2)
    assert video.frames.shape == (8, 16, 16, 3)


def test_a_run_goes_on_from_another_and_with_fewer_frames(run, tmp_path):
    _, out = run
    train_video([], str(tmp_path), steps=1, lr=1e-9, start=str(out / "export"), frames=4, **SMALL)
    before, after = (load_weights(stem)[0] for stem in (out / "export", tmp_path / "export"))
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=2e-3, rtol=2e-3)
    assert json.loads((tmp_path / "export.json").read_text())["training"]["frames"] == 4


def test_draws_follow_the_step():
    config = PRESETS["test"]
    one, two = (WorldData(config, 2, 5, CPU) for _ in range(2))
    first, again = one(3), two(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(one(4)[0], first[0]) and not torch.equal(two(3)[0], first[0])
    assert torch.equal(WorldData(config, 2, 5, CPU)(4)[0], two(4)[0])  # drawn ahead or not
    videos, tokens = world_videos(draw_batch(config, 2, [1], frames=4), config, CPU)
    assert videos.shape == (2, 3, 4, 16, 16) and float(videos.min()) < -0.2 and tokens.shape == (2, config.text_words)


def test_the_loss_falls():
    torch.manual_seed(0)
    config = PRESETS["test"]
    net = VideoNet(config)
    objective = VideoObjective(Stages(config, [Stage(8, 1.0, 4)], FlowLoss(), 0, CPU), check_clips=1, check_steps=1)
    before = objective.validate(net.eval())
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    losses = []
    for step in range(25):
        loss, parts = objective.loss(net.train(), step, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-6:]) < 0.6 * sum(losses[:6]) and set(parts) == {"early", "late"}
    after = objective.validate(net.eval())
    assert after["loss_test"] < 0.7 * before["loss_test"] and 0 <= after["prompt_score"] <= 100


def test_scores_of_true_videos(tmp_path):
    result = train_judge(str(tmp_path), steps=2, device="cpu", batch=2, width=4, frames=8, size_px=16)
    assert {"colour", "motion", "camera"} <= set(result.metrics)
    judge, specs = load_judge(tmp_path / "export"), draw_specs(3, 3, "test")
    videos, real = render(specs), true_features(judge, specs, CPU, 32, 64, copies=2)
    true = score_videos(videos, specs, judge, real)
    dark = score_videos(videos * 0.3, specs, judge, real)
    assert true["prompt_score"] > 95 and dark["prompt_score"] < true["prompt_score"] - 30
    assert true["frechet"] < dark["frechet"] and true["consistency_db"] > 30


def test_the_judge_sees_what_the_model_does_not(tmp_path):
    specs = draw_any(np.random.default_rng(0), 200)
    share = sum(any(map(is_held_out, spec.things)) for spec in specs) / len(specs)
    assert 0.08 < share < 0.25
    save_weights(tmp_path / "old", {"features.weight": torch.zeros(3, 3)}, {"width": 4}, dtype="float32")
    with pytest.raises(WeightsError, match="missing"):
        load_judge(tmp_path / "old")


def test_samples_follow_their_specs_seed():
    specs = draw_specs(3, 0, "test")
    config = PRESETS["test"]
    seen = []

    def velocity(x, t, tokens):
        seen.append(len(x))
        return 0 * x

    videos = sample_specs(velocity, config, specs, CPU, steps=1, guidance=1.0, batch=2)
    assert seen == [2, 1] and videos.shape == (3, 3, 8, 16, 16)
    noise = torch.randn(3, *config.video_shape, generator=torch.Generator().manual_seed(specs[2].seed))
    torch.testing.assert_close(videos[2], (0.5 + 0.5 * noise).clamp(0, 1))
    texts, tokens = held_out_prompts(config, 4)
    assert tokens.shape == (4, config.text_words)
    assert all(any(map(is_held_out, parse(text).things)) for text in texts)


def test_sparse_layers_are_fitted_tuned_and_loaded(tmp_path):
    config = replace(PRESETS["test"], frames=16, size_px=32, tile=(4, 4, 4), layers=1)  # 512 tokens, 8 blocks
    torch.manual_seed(0)
    net = VideoNet(config)
    with torch.no_grad():
        net.leave.weight.normal_(std=0.2)
    from allears.core.config import to_dict

    teacher, sparse = str(tmp_path / "teacher"), str(tmp_path / "teacher-sparse")
    save_weights(teacher, net.state_dict(), {"model": "video", "config": to_dict(config)})
    settings = SparseSettings(keeps=(0.3,), max_error=5.0, options=SparseLinear(block_q=64), steps=2, query_blocks=2)
    reports = {report.name: report for report in sparsify_video(teacher, sparse, settings, "cpu", batches=1, batch=1)}
    assert reports["blocks.0.attention"].keep == 0.3 and reports["blocks.0.cross"].keep is None
    result = tune_video(str(tmp_path / "tuned"), teacher, sparse, steps=2, device="cpu", batch=1)
    assert 0 < result.metrics["rel_err"] < 1
    dense = load_teacher(teacher, "cpu")
    inputs = next(calibration(dense, 1, 1))
    wanted = dense(*inputs).detach()
    with load_tuned(dense, sparse, tmp_path / "tuned"):
        assert 0 < float((dense(*inputs).detach() - wanted).norm() / wanted.norm()) < 1
    kit = distillation_kit(teacher, 2, "cpu", guidance=2.0)
    videos, tokens = kit.data(0)
    t = torch.full((2,), 0.5)
    assert kit.teacher(videos, t, tokens).shape == kit.student(videos, t, tokens).shape == videos.shape
    assert next(kit.student.parameters()).requires_grad and not torch.equal(
        kit.teacher(videos, t, tokens), kit.student(videos, t, tokens)
    )


def test_settings_that_make_no_sense(tmp_path):
    for wrong, said in (
        ({"preset": "huge"}, "preset: 'huge'"),
        ({"corpus": ["x"]}, "corpus: 'x'"),
        ({"compile": True, "graphs": True}, "choose one"),
        ({"stages": [(3, 1.0, 2)]}, "frames: 3 given"),
        ({"stages": [(2, 1.0, 3)]}, "batch: 3 given; wanted a multiple of 4"),
        ({"stages": [{"frames": 2, "part": 1}]}, "unknown key 'part'"),
        ({"stages": [(2, 1.0, 4, "jit")]}, "way 'jit'"),
        ({"attention": {"kernel": "sdpa-cudnn"}}, "cannot run this call"),
        ({"loss": {"mean": 0.0, "drop": 0.5}}, "unknown key 'drop'"),
    ):
        with pytest.raises(ValueError, match=said):
            train_video(**{"corpus": [], "out": str(tmp_path), "steps": 1, **SMALL, **wrong})
