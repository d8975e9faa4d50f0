from pathlib import Path

import pytest
import tyro

import allears.recipes
from allears.cli.train import COMMAND, parse_setting
from allears.train import TrainResult

calls = []


def sample_recipe(**settings):
    calls.append(settings)
    return TrainResult(7, 90.0, "time", {"si_sdr_db": 6.25}, Path("out/ema"), 0)


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    calls.clear()
    table = {"direct": sample_recipe, "lazy": f"{__name__}:sample_recipe"}
    monkeypatch.setattr(allears.recipes, "RECIPES", table, raising=False)


def test_options_reach_the_recipe_and_the_result_is_printed(capsys):
    command = tyro.cli(
        COMMAND,
        args=[
            "lazy",
            "--out",
            "run",
            "--corpus",
            "a",
            "b",
            "--minutes",
            "2.5",
            "--preset",
            "small",
            "--seed",
            "3",
            "--set",
            "lr=1e-3",
            "name=x",
        ],
    )
    assert command.run() == 0
    assert calls == [
        {
            "corpus": ["a", "b"],
            "out": "run",
            "minutes": 2.5,
            "steps": None,
            "device": "auto",
            "preset": "small",
            "seed": 3,
            "lr": 0.001,
            "name": "x",
        }
    ]
    printed = capsys.readouterr().out
    assert "step 7, 1.5 min, ended by time" in printed and "si_sdr_db 6.25" in printed


def test_preset_is_left_to_the_recipe():
    assert tyro.cli(COMMAND, args=["direct", "--out", "run"]).run() == 0
    assert "preset" not in calls[0] and calls[0]["corpus"] == []


def test_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match=r"recipe: 'nope' is unknown; there are direct, lazy"):
        COMMAND(recipe="nope", out="run").run()


def test_settings():
    assert parse_setting("a-b=[1, 2]") == ("a_b", [1, 2])
    assert parse_setting("note=x=y") == ("note", "x=y")
    assert parse_setting("fast=true") == ("fast", True)
    for text in ("lr", "=3", "1x=2"):
        with pytest.raises(ValueError, match=r"--set: got .* wanted NAME=VALUE"):
            parse_setting(text)
    with pytest.raises(ValueError, match=r"--set: minutes has an option of its own; use --minutes"):
        COMMAND(recipe="direct", out="run", set=("minutes=3",)).run()
