import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from allears.core.errors import WeightsError
from allears.core.weights import save_weights
from allears.nn.attention import SelfAttention
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.recipes import RECIPES
from allears.recipes.enhance_data import load_data
from allears.recipes.sparse_tune import MatchDense, load_tuned, tune_enhancer, tune_sparse
from allears.train import TrainConfig, TrainResult
from allears.train.logs import read_log
from allears.turbo.sparse import SparseSettings, apply, sparsify

SETTINGS = SparseSettings(
    keeps=(0.3,), max_error=3.0, options=SparseLinear(block_q=64), steps=8, query_blocks=2, ratio_of_query=False
)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SelfAttention(16, 2)
        self.last = nn.Linear(16, 16)

    def forward(self, x):
        return self.last(x + self.attention(x))


def draw(step, generator):
    return (_windows(generator),)


def _windows(generator):
    x = torch.randn(2, 300, 16, generator=generator)
    return x + 2 * torch.randn(2, 5, 16, generator=generator).repeat_interleave(64, 1)[:, :300]


@pytest.fixture
def toy(tmp_path):
    torch.manual_seed(0)
    model = Toy().eval()
    with torch.no_grad():
        model.attention.qkv.weight *= 3
    held_out = [draw(0, torch.Generator().manual_seed(9))]
    sparsify(model, held_out, tmp_path / "toy-sparse", SETTINGS, samples=2)
    return model, MatchDense(copy.deepcopy(model), draw, held_out), tmp_path / "toy-sparse"


def config(out, **more):
    settings = {"steps": 30, "lr": 3e-3, "precision": "fp32", "device": "cpu", "log_every": 5, "ema_decay": 0.0}
    return TrainConfig(**{"out": str(out), **settings, **more})


@pytest.mark.parametrize(
    ("precision", "backward"), [("exact", "drop_in"), ("int8_fp8", "drop_in"), ("int8_fp8", "matched")]
)
def test_tuning_brings_the_sparse_model_towards_the_dense_one(toy, tmp_path, precision, backward):
    model, objective, stem = toy
    objective.draw = lambda step, generator: objective.held_out[0]  # that it can be learnt, not that it generalises
    before = copy.deepcopy(model)
    result, installed = tune_sparse(model, stem, objective, config(tmp_path / "run"), precision, backward)
    core = installed.cores["attention"]
    assert (core.options.precision, core.options.backward, core.stage) == (precision, backward, "hard")
    rows = read_log(tmp_path / "run" / "log.jsonl")
    errors = [row["rel_err"] for row in rows if row["kind"] == "validate"]
    assert result.metrics["rel_err"] == errors[-1] < 0.9 * errors[0]
    assert all(row["grad_norm"] > 0 for row in rows if row["kind"] == "train")
    fitted = apply(before, stem).cores["attention"]
    assert torch.equal(core.router.proj_q, fitted.router.proj_q)  # frozen
    assert not torch.equal(core.ratio.logit, fitted.ratio.logit)
    assert not torch.equal(model.attention.qkv.weight, before.attention.qkv.weight)
    again = Toy()
    load_tuned(again, stem, tmp_path / "run", precision=precision)
    x = objective.held_out[0][0]
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))


def test_the_error_against_the_dense_model_is_that_of_the_definition(toy):
    model, objective, _ = toy
    other = Toy()
    with torch.no_grad():
        wanted, found = model(*objective.held_out[0]), other(*objective.held_out[0])
        loss, _ = MatchDense(model, lambda step, generator: objective.held_out[0], []).loss(other, 0, None)
        assert float(loss) == pytest.approx(float((found - wanted).square().sum() / wanted.square().sum()))
        assert objective.validate(other)["rel_err"] == pytest.approx(float(loss) ** 0.5, rel=1e-5)
        assert objective.validate(model)["rel_err"] == 0


def test_the_recipe_is_reached_by_its_name_and_takes_no_preset(monkeypatch, tmp_path):
    from allears.cli.main import main

    assert RECIPES["sparse-tune"] is tune_enhancer
    with pytest.raises(ValueError, match="preset: 'test' given; the tuned model has the size of the dense one"):
        tune_enhancer([], str(tmp_path), preset="test", start="dense", sparse="fitted")
    asked = {}
    done = TrainResult(step=7, elapsed_s=1.0, stop="steps", metrics={}, weights=tmp_path, skipped=0)
    monkeypatch.setattr("allears.recipes.sparse_tune.tune_enhancer", lambda **given: asked.update(given) or done)
    line = [
        "train",
        "sparse-tune",
        "--corpus",
        "c",
        "--out",
        "o",
        "--set",
        "start=runs/mine",
        "sparse=runs/mine-sparse",
    ]
    assert main(line) == 0
    assert (asked["start"], asked["sparse"], asked["corpus"], asked["out"]) == (
        "runs/mine",
        "runs/mine-sparse",
        ["c"],
        "o",
    )


def test_a_run_of_other_blocks_is_refused_and_the_model_left_dense(toy, tmp_path):
    model, objective, stem = toy
    tune_sparse(model, stem, objective, config(tmp_path / "run", steps=1))
    other, fresh = tmp_path / "other", Toy()
    sparsify(
        fresh,
        [draw(0, torch.Generator().manual_seed(9))],
        other,
        SparseSettings(keeps=(0.3,), max_error=3.0, steps=1, ratio_of_query=False),
        samples=2,
    )
    with pytest.raises(WeightsError, match="trained with block_q=64, this module has block_q=128"):
        load_tuned(fresh, other, tmp_path / "run")
    assert fresh.attention.core is None


def test_the_enhancer_trains_with_sparse_attention_on_long_windows(small_corpus, tmp_path):
    from allears.models.enhance.config import PRESETS
    from allears.models.enhance.model import EnhanceNet

    torch.manual_seed(0)
    net = EnhanceNet(PRESETS["test"]).eval()
    save_weights(tmp_path / "dense", net.state_dict(), {"config": PRESETS["test"].__dict__, "training": "before"})
    states = torch.randn(1, 300, 256, 2)
    settings = SparseSettings(keeps=(0.34,), max_error=9.0, options=SparseLinear(block_q=64), steps=2, query_blocks=1)
    reports = sparsify(net, [(states, states, torch.ones(1))], tmp_path / "sparse", settings, samples=2)
    assert {r.name: r.keep for r in reports} == {"blocks.0.along_time": 0.34, "blocks.0.along_frequency": None}
    data = load_data([str(small_corpus)], torch.device("cpu"), rirs=0, validation_clips=1)
    data = replace(data, noisy=data.noisy[:, :8000], clean=data.clean[:, :8000])
    result = tune_enhancer(
        [],
        str(tmp_path / "run"),
        steps=1,
        device="cpu",
        start=str(tmp_path / "dense"),
        sparse=str(tmp_path / "sparse"),
        batch=1,
        seconds=1.1,
        data=data,
    )
    record = json.loads((tmp_path / "run" / "export.json").read_text())
    assert result.step == 1 and record["sparse"]["keeps"] == [0.34] and record["training"]["started_from"] == "before"
    tuned = EnhanceNet(PRESETS["test"])
    core = load_tuned(tuned, tmp_path / "sparse", tmp_path / "run").cores["blocks.0.along_time"]
    assert isinstance(core, SparseLinearAttention) and core.keep == 0.34
    assert not torch.equal(tuned.blocks[0].along_time.qkv.weight, net.blocks[0].along_time.qkv.weight)
