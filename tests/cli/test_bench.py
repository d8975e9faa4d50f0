"""``allears bench``: a tiny run on the CPU writes its rows and figure; wrong names are one line of error."""

import json

import pytest

from allears.cli.main import main

TINY = ["--cases", "fwd+bwd 1x64x2x32 causal", "--systems", "allears-exact", "fa2", "--quick", "--device", "cpu"]


def test_a_run_checks_times_and_writes(tmp_path, capsys):
    assert main(["bench", "attention", *TINY, "--seed", "7", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "attention.json").read_text())
    values = {r["metric"]: r["value"] for r in document["rows"]}
    assert {(r["case"], r["system"]) for r in document["rows"]} == {("fwd+bwd 1x64x2x32 causal", "allears-exact")}
    assert set(values) == {"ms", "tflops", "rel_err", "rel_err_dq", "rel_err_dk", "rel_err_dv"}
    assert 0 < values["rel_err"] < 0.01 and 0 < values["rel_err_dq"] < 0.03
    assert values["tflops"] == pytest.approx(3.5 * 4 * 64**2 * 2 * 32 / 2 / values["ms"] / 1e9, rel=1e-4)
    assert any("seed 7" in note for note in document["notes"])
    assert "fa2: not available: needs a CUDA GPU" in document["notes"]
    assert document["commit"].startswith("allears ") and document["command"].startswith("allears bench")
    assert (tmp_path / "attention.png").read_bytes()[:4] == b"\x89PNG"
    out = capsys.readouterr().out
    assert "fwd+bwd 1x64x2x32 causal" in out and "fa2: not available: needs a CUDA GPU" in out


def test_without_a_timed_case_there_are_notes_and_no_figure(tmp_path, capsys):
    arguments = ["--quick", "--systems", "fa2", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", "attention", *arguments]) == 0
    assert json.loads((tmp_path / "attention.json").read_text())["rows"] == []
    assert not (tmp_path / "attention.png").exists()
    assert "no figure: rows: no case was timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--cases", "fwd 12"], "cases: 'fwd 12' is neither a group"),
        (["--systems", "fa9"], "systems: 'fa9' is unknown"),
        (["--minutes", "0"], "minutes: 0.0 given; it must be positive"),
        (["--device", "tpu9"], "device: 'tpu9' is not a device"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, error, capsys):
    assert main(["bench", "attention", "--quick", *arguments]) == 2
    text = capsys.readouterr().err
    assert error in text and text.count("\n") == 1
