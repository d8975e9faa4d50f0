"""The table of video quality: which settings there are, what their networks are, and a run in small."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.registry import CASES, load_all
from benchmarks.video_quality import VideoQuality
from benchmarks.video_quality_models import MAIN, Family, Setting, ladder
from benchmarks.video_quality_picture import draw, save_frames, sheet
from tests.video_nets import BLOCKY

from allears.core.config import to_dict
from allears.core.weights import save_weights
from allears.data.world import draw_specs
from allears.data.world_features import WorldClassifier
from allears.models.video.build import SparseLayers
from allears.models.video.model import VideoNet
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.nn.w8a8 import W8A8Linear
from allears.ops.attention.sparse_linear import SparseLinear


def put(folder, name, config, keep=None, shift=0.0):
    torch.manual_seed(0)
    net = VideoNet(config)
    with torch.no_grad():
        net.leave.weight.normal_(std=0.2)
        net.enter.bias.add_(shift)
    record = {"model": "video", "config": to_dict(config), "training": {"steps": 7, "lr": 0.5}}
    if keep is not None:
        net.blocks[0].attention.core = SparseLinearAttention(2, 16, keep, SparseLinear(block_q=64))
        record["sparse"] = SparseLayers.of(net).to_record()
    save_weights(folder / name, net.state_dict(), record, dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    few = replace(BLOCKY, steps=4, guidance=1.0, distilled=True)
    put(folder, "teacher", BLOCKY)
    put(folder, "distilled", few, shift=1.0)
    put(folder, "tuned-97", BLOCKY, 0.03, shift=0.25)
    put(folder, "tuned-90-qat", BLOCKY, 0.1)
    put(folder, "few-97-qat", few, 0.03)
    torch.manual_seed(0)
    judge = WorldClassifier(4)
    save_weights(folder / "judge", judge.state_dict(), {"width": 4}, dtype="float32")
    return folder


def test_settings_have_names_of_their_own_and_the_telling_ones_come_first():
    settings = ladder(50, (0.9, 0.95, 0.97))
    names = [setting.name for setting in settings]
    assert len(set(names)) == len(names) and names[0] == "50 steps, dense, 16 bit"
    assert names[1] == "50 steps, dense, 16 bit, other noise"
    assert names[3] == "4 steps, 97 % sparse, 8 bit" and "4 steps, 97 % sparse, 8 bit, no QAT" in names[:10]
    for steps in (50, 4, 2, 1):
        for sparsity in (0.0, 0.9, 0.95, 0.97):
            for bits in (8, 16):
                assert Setting(steps, steps < 5, sparsity, bits) in settings
    assert set(MAIN) < set(names)
    with pytest.raises(ValueError, match="teacher_steps: 2"):
        ladder(2, (0.9,))


def test_each_setting_takes_its_own_weights():
    assert Setting(4, True, 0.97, 8).tuned == "tuned-97-qat" and Setting(4, True, 0.97).tuned == "tuned-97"
    assert Setting(4, True, 0.97, 8, "qat").tuned == "tuned-97"
    assert Setting(4, True, 0.95, 8, "router").tuned == "tuned-95-pooled"
    assert Setting(4, True, 0.97, 8, after=True).tuned == "few-97-qat"
    assert Setting(50, False, 0.9).distilled == "" and Setting(1, True, without="dmd").distilled == "distilled-nodmd"


def test_networks_are_merged_sparse_and_in_eight_bits(folder):
    family = Family(folder)
    assert family.lacks(Setting(4, True, 0.95)) == "tuned-95"
    assert family.lacks(Setting(4, True, without="dmd")) == "distilled-nodmd"
    assert family.lacks(Setting(4, True, 0.97, 8)) == ""  # tuned-97 in place of tuned-97-qat
    assert family.lacks(Setting(4, True, 0.9, 8, "qat")) == "tuned-90"  # the ablation has no stand-in
    assert family.lacks(Setting(4, True, 0.9)) == ""
    notes = family.notes((0.9, 0.97))
    assert "distilled: steps 7, lr 0.5" in notes
    assert "tuned-97: steps 7, lr 0.5, keeps 0.03 of the key blocks" in notes
    assert "97 % sparse, 8 bit: tuned-97 in place of tuned-97-qat" in notes
    plain, base = family.build(Setting(4, True)), family.build(Setting(50, False))
    net = family.build(Setting(4, True, 0.97, 8))
    assert net.blocks[0].attention.core.options.precision == "int8_fp8"
    assert isinstance(net.blocks[0].attention.qkv, W8A8Linear)
    torch.testing.assert_close(plain.enter.bias, base.enter.bias + 1)
    torch.testing.assert_close(net.enter.bias, base.enter.bias + 1.25)
    exact = family.build(Setting(50, False, 0.97))
    assert exact.blocks[0].attention.core.options.precision == "exact"
    torch.testing.assert_close(exact.enter.bias, base.enter.bias + 0.25)
    after = family.build(Setting(4, True, 0.97, 8, after=True))
    torch.testing.assert_close(after.enter.bias, base.enter.bias)


def test_frames_stand_side_by_side(tmp_path):
    pytest.importorskip("matplotlib")
    videos = torch.zeros(2, 3, 8, 16, 16)
    videos[1, 0, -1] = 1.0  # the last frame of the second is red
    picture = sheet((videos[:, :, [0, 7]] * 255).byte().permute(0, 2, 3, 4, 1).numpy())
    assert picture.shape == (16, 4 * 16 + 3, 3)
    assert (picture[:, 32:35] == 255).all() and (picture[:, -16:, 0] == 255).all() and not picture[:, :32].any()
    save_frames(tmp_path / "f.npz", {"b": videos, "a": videos}, draw_specs(2, 0, "test"))
    with np.load(tmp_path / "f.npz") as file:
        assert list(file)[:1] == ["captions"] and file["00/b"].shape == (2, 4, 16, 16, 3)
    draw(tmp_path / "f.npz", tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_the_whole_run_in_small(folder, tmp_path, monkeypatch):
    load_all()
    assert CASES["video_quality"] is VideoQuality
    monkeypatch.setattr("benchmarks.video_quality.draw", lambda source, path: None)
    given = {"folder": folder, "device": "cpu", "clips": 2, "teacher_steps": 3, "sparsities": (0.97,), "workers": 1}
    given |= {"results_folder": tmp_path, "commit": "abc"}
    assert VideoQuality(**given, name="x").run() == 0
    document = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["system"], row["metric"]): row["value"] for row in document["rows"]}
    first = "3 steps, dense, 16 bit"
    for system in (
        "true videos",
        first,
        f"{first}, other noise",
        "4 steps, 97 % sparse, 8 bit",
        "1 step, dense, 8 bit",
    ):
        assert {"prompt_score", "frechet", "consistency", "motion"} <= {m for s, m in rows if s == system}
    assert (first, "frechet_to_teacher") not in rows and rows[f"{first}, other noise", "frechet_to_teacher"] > 0
    assert rows["4 steps, 97 % sparse, 8 bit", "seconds_per_video"] > 0
    assert rows["true videos", "consistency"] > rows[first, "consistency"] + 10
    assert "4 steps, dense, 16 bit, no DMD: left out, no distilled-nodmd" in document["notes"]
    with np.load(tmp_path / "x_frames.npz") as file:
        assert any("true videos" in name for name in file)
    assert VideoQuality(**given, name="y", minutes=1e-9).run() == 0
    document = json.loads((tmp_path / "y.json").read_text())
    assert {row["system"] for row in document["rows"]} == {"true videos"}
    assert f"{first}: left out, the time was over" in document["notes"]


def test_a_setting_that_fails_does_not_end_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "benchmarks.video_quality.ladder", lambda steps, sparsities: [Setting(4, True), Setting(1, True)]
    )
    real = Family.build

    def build(self, setting):
        if setting.steps == 4:
            raise RuntimeError("no kernel\nfor this")
        return real(self, setting)

    monkeypatch.setattr(Family, "build", build)
    case = VideoQuality(folder=folder, device="cpu", clips=2, workers=1, results_folder=tmp_path, commit="abc")
    monkeypatch.setattr("benchmarks.video_quality.draw", lambda source, path: None)
    assert case.run() == 0
    document = json.loads((tmp_path / "video_quality.json").read_text())
    assert "4 steps, dense, 16 bit: failed, no kernel" in document["notes"]
    assert {row["system"] for row in document["rows"]} == {"true videos", "1 step, dense, 16 bit"}
