"""Stages of training the video model: parts of clips, what changes between stages, and their places in a run."""

import json
import math
from dataclasses import replace

import pytest
import torch

from allears.data.world_render import render
from allears.models.video import PRESETS
from allears.models.video.loss import FlowLoss
from allears.models.video.model import VideoNet, call_block
from allears.recipes.video import VideoObjective, train_video
from allears.recipes.video_data import Part, PartData, WorldData, cut_clips, draw_batch
from allears.recipes.video_stages import Stage, Stages, first_steps, read_stages, release, time_stages

CPU = torch.device("cpu")
TEST = PRESETS["test"]  # 8 frames, 4 of tokens
PLAN = ((2, 1, 4), (4, 1, 4), (8, 2, 2))


def test_parts_hold_the_frames_of_the_whole_clip_at_their_places():
    batch = draw_batch(TEST, 3, [7])
    whole = 2 * render(batch.layout, size_px=16) - 1
    first = torch.tensor([0, 2, 3])
    for frames, cuts, shown in ((2, 4, 1), (4, 2, 2)):
        part = Part(frames)
        videos, tokens, places = cut_clips(batch, TEST, part, first % (8 // frames), CPU)
        assert videos.shape == (3 * cuts, 3, frames, 16, 16) and places.shape == (3 * cuts, shown)
        for row in range(len(videos)):
            clip, at = row // cuts, [int(2 * p) + i for p in places[row] for i in (0, 1)]
            torch.testing.assert_close(videos[row], whole[clip][:, at])
            assert torch.equal(tokens[row], batch.tokens[clip])
        for clip in range(3):  # all of a clip, each once
            own = places[clip * cuts : (clip + 1) * cuts].flatten()
            assert sorted(own.tolist()) == [0, 1, 2, 3]
            assert float(own[0]) == float(first[clip] % (8 // frames))


def test_most_cuts_are_spread_evenly():
    base = PRESETS["base"]
    part = Part(2)
    assert part.cuts(base) == 8 and Part(32).cuts(base) == 1 and Part(16, spread=False).cuts(base) == 1
    _, _, places = cut_clips(draw_batch(base, 1, [1]), replace(base, size_px=16), part, torch.tensor([5]), CPU)
    assert places.flatten().tolist() == [5, 7, 9, 11, 13, 15, 1, 3]
    for frames, said in ((12, "divides 32"), (64, "divides 32"), (3, "multiple of 2")):
        with pytest.raises(ValueError, match=said):
            Part(frames).cuts(base)


def test_processes_draw_what_a_thread_draws():
    stages = [Stages(TEST, read_stages(PLAN), FlowLoss(), 3, CPU, processes=n) for n in (0, 1)]
    try:
        for index in range(len(PLAN)):
            for step in (0, 1, 4):
                for one, two in zip(*(part.data[index](step) for part in stages), strict=True):
                    assert one is two is None or torch.equal(one, two)
    finally:
        stages[1].close()


def test_draws_follow_the_step_and_whole_clips_are_those_of_before():
    one, two = (PartData(TEST, 4, 5, CPU, Part(2)) for _ in range(2))
    first, again = one(3), two(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(one(4)[0], first[0])
    whole = PartData(TEST, 2, 5, CPU, Part(8))(3)
    assert whole[2] is None and torch.equal(whole[0], WorldData(TEST, 2, 5, CPU)(3)[0])
    slow = PartData(TEST, 2, 5, CPU, Part(4, spread=False))(3)
    assert slow[2] is None and torch.equal(slow[0], WorldData(TEST, 2, 5, CPU, 4)(3)[0])


def test_steps_are_shared_out():
    plan = read_stages(PLAN)
    assert plan[0] == Stage(2, 1.0, 4) and read_stages([plan[2], {"frames": 8, "share": 2, "batch": 2}])[1] == plan[2]
    assert first_steps(plan, 100) == [0, 25, 50]
    stages = Stages(TEST, plan, FlowLoss(mean=0.8), 0, CPU)
    stages.begins = [0, 25, 50]
    assert [stages.index(step) for step in (0, 24, 25, 49, 50, 10**6)] == [0, 0, 1, 1, 2, 2]
    stages.begins = [0]
    for step, done in ((0, 0.0), (10, 0.24), (20, 0.26), (30, 0.4), (40, 0.51), (50, 1.0)):
        stages.tell(step, done)
    assert stages.begins == [0, 20, 40]
    resumed = Stages(TEST, plan, FlowLoss(), 0, CPU)
    resumed.tell(70, 0.6)
    assert resumed.begins == [0, 70, 70] and resumed.index(70) == 2
    assert [loss.mean for loss in stages.losses] == pytest.approx([0.8 - math.log(4) / 4, 0.8 - math.log(2) / 4, 0.8])
    assert Stage(2, 1.0, 4, mean=0.1).loss(FlowLoss(), TEST).mean == 0.1
    assert stages.chosen_kernel(VideoNet(TEST), 0).kernel == "sdpa"
    with pytest.raises(ValueError, match="none given"):
        Stages(TEST, [], FlowLoss(), 0, CPU)
    for wrong in ({"share": 0.0}, {"batch": 0}, {"frames": -2}):
        with pytest.raises(ValueError, match="wanted more than 0"):
            replace(plan[0], **wrong)


def test_each_stage_trains_and_says_how_well():
    torch.manual_seed(0)
    net = VideoNet(replace(TEST, anchored=True))
    stages = Stages(TEST, read_stages(PLAN), FlowLoss(), 0, CPU)
    stages.begins = [0, 1, 2]
    objective = VideoObjective(stages, check_clips=2, check_steps=1)
    for step, frames in enumerate((2, 4, 8)):
        loss, parts = objective.loss(net.train(), step, torch.Generator().manual_seed(0))
        loss.backward()
        assert set(parts) == {"early", "late"} and net.training_block is call_block
        found = objective.validate(net.eval())
        assert found["frames"] == frames and found["loss_test"] > 0
        assert ("motion" in found) == (frames == 8) and "shape" in found


def test_blocks_are_compiled_once_a_shape(monkeypatch):
    calls, real = [], torch.compile

    def counted(graph, inputs):
        calls.append(graph)
        return graph.forward

    def to_count(function, dynamic=None):
        assert dynamic is False
        return real(function, dynamic=dynamic, backend=counted)

    monkeypatch.setattr(torch, "compile", to_count)
    torch._dynamo.reset()
    net, losses = VideoNet(TEST).eval(), {}
    for way in ("eager", "compile"):
        stages = Stages(TEST, read_stages(PLAN[:2]), FlowLoss(), 0, CPU, way)
        objective, seen = VideoObjective(stages, 0), losses.setdefault(way, [])

        def step(index, number, objective=objective, seen=seen):
            loss, _ = objective.loss_in(index, net, number, torch.Generator().manual_seed(1))
            loss.backward()
            seen.append(float(loss.detach()))

        took = time_stages(stages, net, step, CPU)
        assert len(took) == 2 and min(took) > 0
        assert net.blocks[0].feed.widen.weight.grad is None and not net.training
    assert len(calls) == 2  # two blocks, two shapes
    assert losses["compile"] == pytest.approx(losses["eager"], rel=1e-4)
    torch._dynamo.reset()


def test_captured_passes_are_let_go():
    net = VideoNet(TEST)
    net.forward = lambda *_: None
    release(net)
    release(net)
    assert net.forward.__func__ is VideoNet.forward


def test_a_run_in_stages_and_its_resumption(tmp_path):
    common = {"preset": "test", "device": "cpu", "check_clips": 0, "stages": PLAN, "validate_every": 2}
    result = train_video([], str(tmp_path), steps=4, **common)
    record = json.loads((tmp_path / "export.json").read_text())["training"]
    assert result.metrics["frames"] == 8 and record["first_steps"] == [0, 1, 2] and record["frames"] == 8
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows if "loss_test" in row] == [2, 4, 8]
    train_video([], str(tmp_path), steps=8, **common)  # stages are shares of all steps
    assert json.loads((tmp_path / "export.json").read_text())["training"]["first_steps"] == [0, 2, 4]


def test_a_run_by_time_goes_through_all_stages(tmp_path):
    common = {"preset": "test", "device": "cpu", "check_clips": 0, "stages": PLAN[::2]}
    train_video([], str(tmp_path), minutes=0.05, **common)
    record = json.loads((tmp_path / "export.json").read_text())["training"]
    assert 0 < record["first_steps"][1] < record["steps"]
    seen = []
    real = VideoObjective.loss_in

    def noting(self, index, *args):
        seen.append(index)
        return real(self, index, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoObjective, "loss_in", noting)
        train_video([], str(tmp_path), minutes=0.07, **common)
    assert seen and set(seen) == {1}  # resumed where it was
