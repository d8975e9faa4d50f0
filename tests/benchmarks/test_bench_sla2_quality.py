import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks.registry import CASES, load_all
from benchmarks.sla2_picture import choose, draw, save_maps
from benchmarks.sla2_quality import Sla2Quality, window_samples
from benchmarks.sla2_systems import ABOUT, ORACLE, Fitter, Joined, Layer, gradient_errors, maps
from benchmarks.sla2_tuning import ARMS, tune_arms
from torch import nn

from allears.core.config import to_dict
from allears.core.weights import save_weights
from allears.models.enhance.config import PRESETS
from allears.models.enhance.model import EnhanceNet
from allears.models.video.config import PRESETS as VIDEO_PRESETS
from allears.models.video.model import VideoNet
from allears.nn.attention import SelfAttention
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.sparse.fit import Errors, Sample, dense, measure

B64 = SparseLinear(block_q=64)


def sample(seed, blocks=6):
    """A few blocks of keys matter, their means do not show which (channel 0), but a flag does (channel 1)."""
    draws = torch.Generator().manual_seed(seed)
    length = 64 * blocks
    q, k, v = (0.3 * torch.randn(length, 2, 8, generator=draws) for _ in range(3))
    sign = torch.where(torch.arange(length) % 2 == 0, 1.0, -1.0)[:, None]
    hot = (torch.rand(blocks, 2, generator=draws).argsort(0) < 1).float().repeat_interleave(64, 0)
    k[..., 0] += 4 * sign * hot
    k[..., 1] += hot - 0.5
    k[..., 2:6] += torch.randn(blocks, 2, 4, generator=draws).repeat_interleave(64, 0)
    q[..., 0] += 3 * sign
    q[..., 1:6] += 0.7
    return Sample(q, k, v)


@pytest.fixture(scope="module")
def layer():
    return Layer("blocks.0.along_time", [sample(seed) for seed in range(6)], [sample(6)])


@pytest.fixture(scope="module")
def fitted(layer):
    fitter = Fitter(layer, B64, mass_steps=50, output_steps=6, lr=0.03, query_blocks=2)
    return fitter.errors(0.17)


def test_the_learned_router_and_ratio_are_best_where_means_mislead(layer, fitted):
    errors, core = fitted
    assert list(errors) == list(ABOUT)
    assert errors["sla2"].error < 0.5 * min(errors[name].error for name in ("sparse", "sla", "sla2-topk"))
    assert errors[ORACLE].mass >= max(found.mass for found in errors.values())
    assert errors["sparse"].error == pytest.approx(errors["sla2-topk"].sparse)
    assert all(found.kept == pytest.approx(1 / 6) for found in errors.values())
    assert measure(core, layer.held_out).error == pytest.approx(errors["sla2"].error)
    low = errors["sla2-int8fp8"].error
    assert low != errors["sla2"].error and abs(low - errors["sla2"].error) < 0.05
    assert errors["sla2-qat-int8fp8"].error != low


def test_maps_are_the_mass_and_the_picked_blocks(layer, fitted):
    mass, picked = maps(fitted[1], layer.held_out[0])
    assert mass.shape == picked.shape == (2, 6, 6) and picked.sum(-1).eq(1).all()
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 6))
    assert float((mass * picked).sum(-1).mean()) == pytest.approx(fitted[0]["sla2"].mass, abs=1e-4)


def test_layers_are_joined_by_the_root_mean_square():
    together = Joined()
    for error in (0.3, 0.4):
        together.add({"x": Errors(error, 1.0, error, 0.1)})
    assert together.values() == {"x": {"rel_err": pytest.approx(math.sqrt(0.125)), "mass": 0.35, "kept": 0.1}}


def test_gradient_errors_are_small_and_differ_by_form(layer, fitted):
    core, some = fitted[1], layer.held_out
    targets = [dense(core, *(x[None] for x in s)) + 0.1 for s in some]
    found = gradient_errors(core, some, targets)
    for backward in ("drop_in", "matched"):
        assert set(found[backward]) == {"dq", "dk", "dv", "dratio"}
        assert all(0 < value < 0.2 for value in found[backward].values()), found
    assert found["drop_in"]["dq"] != found["matched"]["dq"]
    assert core.options.precision == "exact"


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention(16, 2)

    def forward(self, x):
        return x + self.attention(x)


def test_arms_are_tuned_alike_and_compared():
    torch.manual_seed(0)
    net = Toy().eval().requires_grad_(False)
    net.attention.qkv.weight *= 3
    x, said = torch.randn(2, 300, 16), []
    cores = {"attention": SparseLinearAttention(2, 8, 0.2, B64)}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rows = tune_arms(net, cores, lambda step, generator: (x,), [(x,)], 12, 3e-3, "t", "cpu", say=said.append)
    by_key = {(row["case"], row["system"], row["metric"]): row["value"] for row in rows}
    for arm in ARMS:
        losses = [value for (at, system, name), value in by_key.items() if (system, name) == (arm, "loss")]
        assert len(losses) == 12 and losses[-1] < losses[0]
        assert losses[0] == pytest.approx(by_key["t", arm, "rel_err_before"] ** 2, rel=1e-3)
        assert by_key["t", arm, "rel_err"] < by_key["t", arm, "rel_err_before"]
        assert by_key["t", arm, "skipped_steps"] == 0
    low = by_key["t", "int8fp8-matched", "rel_err_in_int8fp8"]
    assert low == pytest.approx(by_key["t", "int8fp8-matched", "rel_err"])
    assert by_key["t", "exact", "rel_err_in_int8fp8"] != by_key["t", "exact", "rel_err"]
    assert net.attention.core is None and len(said) == 3
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_picture_shows_the_least_uniform_head_of_spread_layers(tmp_path):
    pytest.importorskip("matplotlib")
    flat, peaked = np.full((4, 6), 1 / 6), np.eye(6)[:4] * 0.7 + 0.05
    found = {f"l{i}": (np.stack([flat, peaked]), np.stack([peaked, peaked]) > 0.5) for i in range(5)}
    save_maps(tmp_path / "maps.npz", found)
    with np.load(tmp_path / "maps.npz") as file:
        assert choose(dict(file), 2) == [("l0", 1), ("l2", 1)]
    said = draw(tmp_path / "maps.npz", tmp_path / "maps.png", 2)
    assert said[0] == "l0 head 1: 16.7% of blocks hold 75.0% of the mass"
    assert (tmp_path / "maps.png").read_bytes()[:4] == b"\x89PNG"


def test_windows_have_an_even_number_of_frames():
    config = PRESETS["base"]
    assert window_samples(config, 102.4) == (12_800 - 1) * 128


def test_all_layers_of_the_video_model(tmp_path):
    torch.manual_seed(0)
    config = replace(VIDEO_PRESETS["test"], frames=16, size_px=32, tile=(4, 4, 4), layers=2)  # 8 blocks of 64
    net = VideoNet(config)
    nn.init.normal_(net.leave.weight, std=0.2)
    save_weights(tmp_path / "net", net.state_dict(), {"model": "video", "config": to_dict(config)})
    given = {"video": str(tmp_path / "net"), "device": "cpu", "bands": 2, "sparsities": (0.75,), "block_q": 64}
    given |= {"mass_steps": 1, "output_steps": 1, "gradients": 0, "tune_steps": 1, "tune_sparsity": 0.75}
    assert Sla2Quality(**given, results_folder=tmp_path, commit="abc", name="v").run() == 0
    document = json.loads((tmp_path / "v.json").read_text())
    rows = {(row["case"], row["system"], row["metric"]): row["value"] for row in document["rows"]}
    for layer in ("blocks.0.attention", "blocks.1.attention"):
        assert rows[f"net s0.75, {layer}", "sla2", "kept"] == 0.25
    assert rows["tuning, net s0.75", "int8fp8-drop-in", "rel_err"] > 0
    assert document["notes"][0].startswith(
        "2 layers over space and time of net: 512 tokens, 2 heads of 16, in 2 videos"
    )
    with pytest.raises(ValueError, match="bands: 1 videos"):
        Sla2Quality(**{**given, "bands": 1}, results_folder=tmp_path).run()


def test_the_whole_run_in_small(tmp_path):
    """An untrained enhancer on noise: every row is there, the picture's data too, and the time limit is kept."""
    load_all()
    assert CASES["sla2_quality"] is Sla2Quality
    torch.manual_seed(0)
    net = EnhanceNet(PRESETS["test"])
    nn.init.normal_(net.leave.weight, std=0.3)  # an untrained network returns its input
    save_weights(tmp_path / "net", net.state_dict(), {"model": "enhance", "config": PRESETS["test"].__dict__})
    noise = np.random.default_rng(0).standard_normal(2 * window_samples(PRESETS["test"], 3.2))
    np.save(tmp_path / "noisy.npy", (3000 * noise).astype(np.int16))
    settings = {
        "noisy": tmp_path / "noisy.npy",
        "weights": str(tmp_path / "net"),
        "device": "cpu",
        "seconds": 3.2,
        "bands": 1,
        "sparsities": (0.75,),
        "block_q": 64,
        "mass_steps": 2,
        "output_steps": 2,
        "gradients": 1,
        "tune_steps": 1,
        "tune_seconds": 2.2,
        "tune_sparsity": 0.75,
        "results_folder": tmp_path,
        "commit": "abc",
    }
    assert Sla2Quality(**settings, name="x").run() == 0
    document = json.loads((tmp_path / "x.json").read_text())
    rows = {(row["case"], row["system"], row["metric"]): row["value"] for row in document["rows"]}
    one = "net s0.75, blocks.0.along_time"
    for system in ABOUT:
        assert rows["net s0.75", system, "rel_err"] == rows[one, system, "rel_err"] > 0
        assert rows[one, system, "kept"] == 0.25
    assert rows[f"gradients, {one}", "int8fp8-matched", "rel_err_dq"] > 0
    assert rows["tuning, net s0.75", "int8fp8-drop-in", "rel_err"] > 0
    assert (tmp_path / "x_maps.npz").exists() and (tmp_path / "x.png").exists()
    assert Sla2Quality(**settings, name="y", minutes=1e-6).run() == 0
    document = json.loads((tmp_path / "y.json").read_text())
    assert document["rows"] == [] and document["notes"][-1] == "blocks.0.along_time: left out, the time was over"
