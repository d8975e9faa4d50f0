import json
from types import SimpleNamespace

import pytest
import torch
from benchmarks.clips import from_folder, spread
from benchmarks.enhance_ablation import EnhanceAblationCase, parse_weights

from benchmarks import registry


@pytest.fixture
def stand_in(monkeypatch, clip_folder):
    """``noisy``, and an ``allears`` that gives the reference with noise of 0.1 / steps of the noisy one's."""
    registry.load_all()
    pairs = {clip.noisy.tobytes(): clip for clip in from_folder(clip_folder)}
    asked = []
    net = torch.nn.Linear(1000, 1000, bias=False)
    net.config = SimpleNamespace(prior="noisy", sigma=0.5)

    def make(name_or_folder, steps, solver):
        asked.append((name_or_folder, steps, solver))

        def enhance(audio):
            clip = pairs.get(audio.tobytes())
            return audio if clip is None else clip.reference + (audio - clip.reference) * 0.1 / steps

        enhance.enhancer = SimpleNamespace(net=net)
        return enhance

    table = {
        "noisy": registry.SYSTEMS["enhance"]["noisy"],
        "allears": registry.System("allears", make, (), "a stand-in"),
    }
    monkeypatch.setitem(registry.SYSTEMS, "enhance", table)
    monkeypatch.setattr("benchmarks.enhance_ablation.from_manifest", lambda corpus, clips: from_folder(clip_folder))
    return asked


def test_rows_of_each_arm_and_step_count(stand_in, tmp_path):
    case = EnhanceAblationCase(
        ("a=one", "b=two"),
        steps=(1, 10),
        metrics=("si_sdr_db",),
        workers=1,
        out=tmp_path / "csv",
        results_folder=tmp_path / "json",
    )
    assert case.run() == 0
    document = json.loads((tmp_path / "json" / "enhance_ablation.json").read_text())
    found = {(row["case"], row["system"], row["metric"]): row for row in document["rows"]}
    for arm in "ab":
        assert found["steps_1", arm, "si_sdr_db_gain"]["value"] == pytest.approx(20, abs=0.3)
        assert found["steps_10", arm, "si_sdr_db_gain"]["value"] == pytest.approx(40, abs=0.3)
        assert found["steps_10", arm, "si_sdr_db"]["n"] == 3
        assert f"{arm}: 1.00 M parameters, noisy prior, sigma 0.5" in document["notes"]
    assert found["steps_1", "noisy", "si_sdr_db"] == found["steps_10", "noisy", "si_sdr_db"] | {"case": "steps_1"}
    assert stand_in == [("one", 1, "euler"), ("one", 10, "euler"), ("two", 1, "euler"), ("two", 10, "euler")]
    assert len((tmp_path / "csv" / "enhance_ablation.csv").read_text().splitlines()) == 1 + 3 * 5


@pytest.mark.parametrize("text", ["name", "=path", "name="])
def test_weights_without_name_or_path_are_refused(text):
    with pytest.raises(ValueError, match="wanted NAME=PATH"):
        parse_weights(text)


def test_the_name_of_the_input_is_taken():
    with pytest.raises(ValueError, match="none of them named noisy"):
        EnhanceAblationCase(("noisy=x",)).run()


def test_a_limit_spreads_over_the_set():
    assert spread(72, None) == list(range(72)) and spread(3, 9) == [0, 1, 2]
    assert spread(72, 4) == [0, 18, 36, 54]
    with pytest.raises(ValueError, match="limit: got 0"):
        spread(5, 0)
