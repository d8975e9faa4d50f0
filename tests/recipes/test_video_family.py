"""All versions of the video model in one run: which parts run, for how long, and what is left of them."""

import json
from pathlib import Path

import pytest

from allears.recipes import RECIPES, video_family
from allears.recipes.video_family import Family, train_video_family
from allears.train import TrainResult

SHARES = {"judge": 0.25, "few": 0.5, "cut": 0.5}


@pytest.fixture
def parts(monkeypatch):
    """Parts that write what they were given, and a list of those that ran."""
    ran = []

    def part(name, needs=None, stop="steps"):
        def run(family, budget):
            ran.append((name, budget))
            told = family.told(name, teacher=family.model(needs) if needs else None)
            export = Path(told["out"]) / "export"
            export.parent.mkdir(parents=True, exist_ok=True)
            export.with_suffix(".safetensors").write_text(name)
            export.with_suffix(".json").write_text(json.dumps(told))
            return TrainResult(1, 1.0, stop, {}, export, 0)

        return run

    made = {
        "judge": (0.25, part("judge")),
        "few": (0.5, part("few", "judge")),
        "cut": (0.5, part("cut", stop="signal")),
    }
    monkeypatch.setattr(video_family, "PARTS", made)
    return ran


def test_each_part_runs_once_with_its_share_and_is_kept(parts, tmp_path):
    assert RECIPES["video-family"] is train_video_family
    train_video_family([], str(tmp_path), minutes=8.0, parts=["judge"])
    result = train_video_family(
        [], str(tmp_path), minutes=8.0, parts=["judge", "few"], settings={"few": {"lr": 5e-4, "seed": 3}}
    )
    assert parts == [("judge", {"minutes": 2.0, "steps": None}), ("few", {"minutes": 4.0, "steps": None})]
    assert result.stop == "steps" and (tmp_path / "models/few.safetensors").read_text() == "few"
    told = json.loads((tmp_path / "models/few.json").read_text())
    assert told["lr"] == 5e-4 and told["seed"] == 3 and told["teacher"] == str(tmp_path / "models/judge")


def test_a_part_that_was_cut_is_not_kept(parts, tmp_path):
    assert train_video_family([], str(tmp_path), steps=2, parts=["cut", "judge"]).stop == "signal"
    assert [name for name, _ in parts] == ["cut"] and not Family(tmp_path).has("cut")


def test_what_cannot_run_is_refused(parts, tmp_path):
    for given, said in (
        ({"parts": ["other"], "steps": 1}, "parts: 'other' is unknown; known are judge"),
        ({"parts": ["few"], "steps": 1}, "parts: 'judge' is needed first"),
        ({"parts": ["judge"]}, "minutes, steps: give one of them"),
        ({"parts": ["judge"], "steps": 1, "minutes": 1.0}, "minutes, steps: give one of them"),
        ({"parts": ["judge"], "steps": 1, "corpus": ["x"]}, "corpus: 'x' given"),
    ):
        with pytest.raises(ValueError, match=said):
            train_video_family(**{"corpus": [], "out": str(tmp_path), **given})
    train_video_family([], str(tmp_path), steps=1, parts=["judge"])
    with pytest.raises(ValueError, match=r"are in .* already"):
        train_video_family([], str(tmp_path), steps=1, parts=["judge"])
