import json

import numpy as np
import pytest
import soundfile as sf

from allears.cli.eval import Enhance, Files, interval_text, pair_files
from allears.cli.main import main

RATE = 16_000
RNG = np.random.default_rng(0)
CLEAN = (0.1 * RNG.standard_normal(RATE)).astype(np.float32)
NOISE = (0.01 * RNG.standard_normal(RATE)).astype(np.float32)


@pytest.fixture
def folders(tmp_path):
    for name, gain in (("a", 1.0), ("b", 10.0)):
        for kind, audio in (("out", CLEAN + gain * NOISE), ("ref", CLEAN)):
            (tmp_path / kind).mkdir(exist_ok=True)
            sf.write(tmp_path / kind / f"{name}.wav", audio, RATE, "FLOAT")
    return tmp_path


def test_files_pair_by_name_and_score_as_json(folders, capsys):
    command = Files((folders / "out",), folders / "ref", metrics=("si_sdr_db",), json=True)
    assert command.run() == 0
    found = json.loads(capsys.readouterr().out)
    values = {name.rsplit("/", 1)[-1]: row["si_sdr_db"] for name, row in found["files"].items()}
    assert values == {"a.wav": pytest.approx(20, abs=0.3), "b.wav": pytest.approx(0, abs=0.3)}
    assert found["unscored"] == {}


def test_table_has_a_row_a_file_and_the_mean(folders, capsys):
    Files((folders / "out",), folders / "ref", metrics=("si_sdr_db",)).run()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "si_sdr_db"] and len(lines) == 4
    label, numbers = lines[3].split("   ", 1)
    assert label == "mean (95 % interval)"
    mean, low, high = (float(word.strip("()")) for word in numbers.split() if word != "to")
    assert (
        mean == pytest.approx(10, abs=0.3) and low == pytest.approx(0, abs=0.3) and high == pytest.approx(20, abs=0.3)
    )


def test_a_delay_is_taken_off_when_asked(folders, capsys):
    late = np.concatenate([np.zeros(160, np.float32), CLEAN + NOISE])
    sf.write(folders / "late.wav", late, RATE, "FLOAT")
    reference = folders / "ref" / "a.wav"
    values = []
    for max_lag_ms in (0.0, 20.0):
        Files((folders / "late.wav",), reference, metrics=("si_sdr_db",), max_lag_ms=max_lag_ms, json=True).run()
        values.append(next(iter(json.loads(capsys.readouterr().out)["files"].values()))["si_sdr_db"])
    assert values[0] < -10 and values[1] == pytest.approx(20, abs=0.3)


def test_an_unscored_metric_is_null_with_its_reason(folders, capsys):
    sf.write(folders / "silent.wav", 0 * CLEAN, RATE, "FLOAT")
    Files((folders / "out" / "a.wav",), folders / "silent.wav", metrics=("si_sdr_db",), json=True).run()
    found = json.loads(capsys.readouterr().out)
    assert list(found["files"].values()) == [{"si_sdr_db": None}]
    assert list(found["unscored"].values()) == [{"si_sdr_db": "the reference is silent"}]


@pytest.mark.parametrize(
    ("estimates", "reference", "message"),
    [
        ((), None, "no audio file given"),
        (("out",), "ref/a.wav", "one file cannot be the reference of 2 files"),
        (("out",), "nowhere", "nowhere' does not exist"),
        (("ref", "odd.wav"), "ref", "holds no file named odd"),
    ],
)
def test_bad_pairs_are_refused(folders, estimates, reference, message):
    sf.write(folders / "odd.wav", CLEAN, RATE)
    with pytest.raises(ValueError, match=message):
        pair_files([folders / e for e in estimates], None if reference is None else folders / reference)


def test_rates_that_differ_are_one_line_on_the_command_line(folders, capsys):
    sf.write(folders / "wide.wav", CLEAN, 48_000)
    status = main(["eval", "files", str(folders / "wide.wav"), "-r", str(folders / "ref" / "a.wav")])
    assert status == 2
    assert "1 channels at 16000 Hz" in capsys.readouterr().err


def test_enhance_scores_before_and_after_and_the_gain(tmp_path, monkeypatch, capsys):
    """With a made-up model and test set: the model takes nine tenths of the noise off."""

    class Model:
        @classmethod
        def from_pretrained(cls, device):
            return cls()

        def __call__(self, audio, sample_rate_hz, steps):
            assert (sample_rate_hz, steps) == (RATE, 3)
            return CLEAN[None] + 0.1 * (audio - CLEAN[None])

    def render(corpus, manifest):
        for i in range(3):
            yield f"clip{i}", CLEAN + (i + 1) * NOISE, CLEAN, {}

    monkeypatch.setattr("allears.models.enhance.Enhancer", Model)
    monkeypatch.setattr("allears.data.render.render_test_set", render)
    (tmp_path / "test.jsonl").write_text("")
    command = Enhance(tmp_path / "test.jsonl", steps=3, metrics=("si_sdr_db",), limit=2, json=True)
    assert command.run() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clips"] == 2
    gain = found["scores"]["gain"]["si_sdr_db"]
    assert gain["mean"] == pytest.approx(20, abs=0.1) and gain["n"] == 2
    assert found["scores"]["noisy"]["si_sdr_db"]["mean"] == pytest.approx(17, abs=0.3)
    command.json = False
    command.run()
    assert capsys.readouterr().out.splitlines()[0] == "2 clips, mean and 95 % interval"


def test_interval_text_without_clips():
    from allears.audio.metrics import bootstrap_interval

    assert interval_text(bootstrap_interval([])) == "-"
    assert interval_text(bootstrap_interval([2.5, 2.5])) == "2.50 (2.50 to 2.50)"
