"""Training of the echo canceller in stages, from a small corpus to weights that load."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from echo_parts import SMALL, half, small_data, write_corpus

from allears.core.weights import load_weights
from allears.models.echo import EchoCanceller
from allears.models.echo.config import PRESETS
from allears.models.echo.loss import LossWeights
from allears.models.echo.model import EchoNet
from allears.recipes import RECIPES, echo
from allears.recipes.echo import DEFAULT_LOSS, EchoObjective, WithLoss, train_echo
from allears.recipes.echo_data import STAGES, TRAIN_MIX, Clips, Stage, stage_mix
from allears.train import TrainResult
from allears.train.ahead import Ahead

SHORT = stage_mix(TRAIN_MIX, Stage("short", 1.0, 64.0, 0.5), 0)


def test_recipe_trains_all_stages_saves_and_loads(tmp_path):
    corpus, out = write_corpus(tmp_path / "corpus"), tmp_path / "run"
    result = RECIPES["echo"]([corpus], str(out), steps=5, rirs=0, mix={"noisy": 0.5}, **SMALL)
    assert result.step == 5 and result.stop == "steps" and 0 <= result.metrics["voice"] <= 1
    record = json.loads((out / "export.json").read_text())
    assert record["dtype"] == "float16" and record["validation"] == result.metrics
    training = record["training"]
    assert [stage["name"] for stage in training["stages"]] == ["linear", "short", "middle", "long", "voice"]
    assert [stage["steps"] for stage in training["stages"]] == [1] * 5
    assert [stage["longest_delay_ms"] for stage in training["stages"]] == [64, 64, 500, 1000, 1000]
    assert training["speakers"] == 4 and training["licences"] == ["CC0"] and training["mix"]["noisy"] == 0.5
    assert not record["config"]["linear_input"] and record["config"]["voice"]
    for name in STAGES:
        rows = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "validate"] == [0, 1]
        (trained,) = [row for row in rows if row["kind"] == "train"]
        assert np.isfinite(trained["loss"]) and ("voice" in trained) == (name == "voice")
    canceller = EchoCanceller.from_pretrained(out / "export", device="cpu")
    mic = 0.1 * torch.randn(4000)
    near = canceller(mic, mic.roll(900), 16_000)
    assert near.shape == mic.shape and float(near.abs().max()) > 1e-4 and not torch.equal(near, mic)


@pytest.fixture
def without_training(monkeypatch):
    """``train`` that notes what it is given, adds 1 to every bias of a batch norm, and says that it took a minute."""
    calls = []

    def train(model, objective, config):
        before = {name: value.clone() for name, value in model.net.state_dict().items()}
        with torch.no_grad():
            for name, value in model.net.named_parameters():
                if name.endswith("norm.bias"):
                    value.add_(1.0)
        calls.append((model, config, before, {name: value.clone() for name, value in model.net.state_dict().items()}))
        return TrainResult(config.steps, 60.0, "steps", {"erle_db": 1.0}, "", 0)

    monkeypatch.setattr(echo, "train", train)
    return calls


def test_weights_pass_from_stage_to_stage(tmp_path, without_training):
    out = tmp_path / "run"
    result = train_echo([], str(out), minutes=10.0, steps=103, linear=half, data=small_data(), lr=2e-3, **SMALL)
    assert len(without_training) == 5 and result.step == 103 and result.elapsed_s == 300.0
    configs = [config for _, config, _, _ in without_training]
    assert sum(config.minutes for config in configs) == pytest.approx(10.0)
    assert [config.minutes for config in configs] == pytest.approx([2.0, 1.5, 2.0, 3.0, 1.5])
    assert [config.lr for config in configs] == pytest.approx([2e-3, 2e-3, 2e-3, 1.4e-3, 0.8e-3])
    models = [model for model, _, _, _ in without_training]
    assert [model.weights.quiet / DEFAULT_LOSS.quiet for model in models] == pytest.approx([0.0, 0.0, 0.3, 1.0, 1.0])
    assert [model.net.config.linear_input for model in models] == [True] + [False] * 4
    assert [model.net.voice is not None for model in models] == [False] * 4 + [True]
    assert models[0].linear is half and all(model.linear is None for model in models[1:])
    for (_, _, _, last), (_, _, first, _) in pairwise(without_training):
        assert set(last) <= set(first) and all(torch.equal(first[name], last[name]) for name in last)
    exported, _ = load_weights(out / "export")
    final = without_training[-1][3]
    assert set(exported) == set(final)
    for name, value in exported.items():
        torch.testing.assert_close(value, final[name], atol=1e-3, rtol=1e-3)
    bias = "last.down.0.norm.bias"
    assert float((exported[bias] - without_training[0][2][bias]).mean()) == pytest.approx(5.0)


def test_stages_and_sizes_can_be_chosen(tmp_path, without_training):
    settings = SMALL | {"data": small_data(), "steps": 40}
    train_echo([], str(tmp_path / "a"), stages={"long": 3, "short": 1}, config={"hidden": 10}, **settings)
    names = [config.out.rsplit("/", 1)[1] for _, config, _, _ in without_training]
    assert names == ["short", "long"] and [config.steps for _, config, _, _ in without_training] == [10, 30]
    record = json.loads((tmp_path / "a" / "export.json").read_text())
    assert record["config"]["hidden"] == 10 and not record["config"]["voice"]
    start = str(tmp_path / "a" / "export")
    train_echo([], str(tmp_path / "b"), stages=["voice"], start=start, config={"hidden": 10}, **settings)
    exported, _ = load_weights(start)
    first = without_training[-1][2]
    assert all(torch.equal(first[name], value) for name, value in exported.items())
    train_echo([], str(tmp_path / "c"), stages=["short"], loss={"alignment": 0.0, "stages": [0.0, 1.0]}, **settings)
    weights = without_training[-1][0].weights
    assert (weights.alignment, weights.stages, weights.voice) == (0.0, (0.0, 1.0), DEFAULT_LOSS.voice)


class Broken(Exception):
    pass


def test_a_run_that_broke_off_equals_an_unbroken_one(tmp_path, monkeypatch):
    settings = SMALL | {"data": small_data(), "steps": 4, "save_every_minutes": 0}
    settings["stages"] = {"long": 1, "voice": 1}
    whole = train_echo([], str(tmp_path / "whole"), **settings)
    loss, calls = EchoObjective.loss, []

    def breaks(self, model, step, generator):
        calls.append(step)
        if len(calls) == 4:
            raise Broken
        return loss(self, model, step, generator)

    monkeypatch.setattr(EchoObjective, "loss", breaks)
    with pytest.raises(Broken):
        train_echo([], str(tmp_path / "parts"), **settings)
    parts = train_echo([], str(tmp_path / "parts"), **settings)
    assert calls == [0, 1, 0, 1, 1]  # the stage that was complete is not trained again
    assert parts.metrics == whole.metrics and parts.step == whole.step == 4
    (one, record_one), (two, record_two) = (load_weights(tmp_path / name / "export") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for a, b in zip(record_one["training"]["stages"], record_two["training"]["stages"], strict=True):
        assert a | {"seconds_of_training": 0} == b | {"seconds_of_training": 0}
    again = train_echo([], str(tmp_path / "parts"), **settings)
    assert len(calls) == 5 and again.metrics == whole.metrics


def test_the_loss_falls():
    torch.manual_seed(0)
    model = WithLoss(EchoNet(PRESETS["test"]), LossWeights(voice=0.3), half).train()
    objective = EchoObjective(small_data(), SHORT, 2, 5, 3)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(9):
        objective._clips._ahead = Ahead(objective._clips.draw)  # the same clips each time
        loss, terms = objective.loss(model, 0, torch.Generator())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert set(terms) == {"stage_1", "stage_2", "quiet_db", "alignment", "voice"}
    wanted = 0.3 * terms["stage_1"] + 0.7 * terms["stage_2"] + 0.0003 * terms["quiet_db"]
    wanted = wanted + 0.1 * terms["alignment"] + 0.3 * terms["voice"]
    assert losses[-1] == pytest.approx(float(wanted), rel=1e-4)


def test_the_linear_canceller_is_heard_in_its_stage_alone():
    heard = []

    def spy(mic, reference):
        assert not torch.is_grad_enabled()
        heard.append(mic.shape)
        return half(mic, reference)

    data, batch = small_data(), Clips(small_data(), SHORT, 2, 0)(0)
    for linear_input in (False, True):
        config = replace(PRESETS["test"], linear_input=linear_input)
        model = WithLoss(EchoNet(config), LossWeights(), spy)
        loss, _ = model.train()(*batch)
        assert np.isfinite(float(loss.detach()))
        assert heard == ([batch.mic.shape] if linear_input else [])
        objective = EchoObjective(data, SHORT, 2, 0, 3)
        with torch.no_grad():
            untrained = objective.validate(model.eval())
        # an untrained network returns what it filters, and a canceller that halves all takes off 6 dB
        assert untrained["erle_db"] == pytest.approx(6.02 if linear_input else 0.0, abs=0.5)


def test_unknown_names_are_told(tmp_path):
    for given, match in (
        ({"preset": "big"}, "preset: 'big'"),
        ({"stages": ["first"]}, "stages: 'first'"),
        ({"mix": {"echo": 1.0}}, "mix: unknown key 'echo'"),
        ({"loss": {"quite": 1.0}}, "loss: unknown key 'quite'"),
        ({"config": {"depth": 1}}, "config: unknown key 'depth'"),
    ):
        with pytest.raises(ValueError, match=match):
            train_echo([], str(tmp_path), steps=1, **{**SMALL, **given})


@pytest.mark.gpu
def test_a_captured_step_equals_an_eager_one():
    data = small_data("cuda")
    models = []
    for graphs in (False, True):
        torch.manual_seed(0)
        model = WithLoss(EchoNet(PRESETS["test"]), LossWeights(voice=0.3), None).cuda().train()
        objective = EchoObjective(data, SHORT, 2, 0, 2, graphs)
        for step in range(2):
            model.zero_grad()
            loss, terms = objective.loss(model, step, torch.Generator("cuda"))
            loss.backward()
        models.append((model, float(loss), terms))
    (eager, loss, terms), (captured, same_loss, same_terms) = models
    assert same_loss == pytest.approx(loss, rel=1e-4)
    for name in terms:
        torch.testing.assert_close(same_terms[name], terms[name], atol=1e-4, rtol=1e-3)
    for a, b in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-2)
    for (name, a), b in zip(captured.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-4, rtol=1e-3)
