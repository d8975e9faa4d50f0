"""Arms of the echo canceller's ablation."""

import json

import pytest
from echo_parts import SMALL, half, write_corpus

from allears.recipes import echo_ablation
from allears.recipes.echo_ablation import ARMS, train_echo_ablation
from allears.train import TrainResult


def test_an_arm_leaves_out_one_part(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    settings = SMALL | {"steps": 4, "rirs": 0, "linear": half, "validation_clips": 2}
    results = train_echo_ablation([corpus], str(tmp_path / "arms"), arms=("no-voice",), **settings)
    assert {arm: result.step for arm, result in results.items()} == {"no-voice": 4}
    record = json.loads((tmp_path / "arms" / "no-voice" / "export.json").read_text())
    assert [stage["name"] for stage in record["training"]["stages"]] == ["linear", "short", "middle", "long"]
    assert not record["config"]["voice"] and list(ARMS["no-transfer"]["stages"]) == ["short", "middle", "long", "voice"]


def test_arms_have_one_budget_and_the_same_data(tmp_path, monkeypatch):
    calls = []

    def train_echo(corpus, out, **settings):
        calls.append((out.rsplit("/", 1)[1], settings))
        return TrainResult(1, 1.0, "signal" if len(calls) == 4 else "time", {}, "", 0)

    monkeypatch.setattr(echo_ablation, "train_echo", train_echo)
    monkeypatch.setattr(echo_ablation, "load_data", lambda *given: given)
    results = train_echo_ablation(["c"], str(tmp_path), minutes=3.0, device="cpu", batch=7)
    assert list(results) == ["full", "no-progressive", "no-transfer", "no-alignment-loss"]  # stopped in the fourth
    assert all(settings["minutes"] == 3.0 and settings["batch"] == 7 for _, settings in calls)
    assert all(settings["data"] is calls[0][1]["data"] for _, settings in calls)
    assert calls[1][1]["loss"]["stages"][0] == 0.0 and calls[3][1]["loss"] == {"alignment": 0.0}
    assert "loss" not in calls[0][1] and "stages" not in calls[1][1]


def test_unknown_arms_and_settings_of_an_arm_are_told(tmp_path):
    with pytest.raises(ValueError, match="arms: 'no-echo' is unknown; known are full, no-progressive"):
        train_echo_ablation([], str(tmp_path), arms=("no-echo",))
    with pytest.raises(ValueError, match="stages: given for all arms"):
        train_echo_ablation([], str(tmp_path), stages=["long"])
    assert set(ARMS) == {"full", "no-progressive", "no-transfer", "no-alignment-loss", "no-voice"}
