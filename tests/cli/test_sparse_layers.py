import json
from dataclasses import asdict

import pytest

from allears.cli.main import main
from allears.core.weights import save_weights
from allears.turbo.sparse import LayerReport, Trial, read_reports
from allears.turbo.sparse.install import KIND

TRIALS = (
    Trial(0.05, 0.06, 0.4, 0.5, 0.3, 0.2, "learned"),
    Trial(0.1, 0.11, 0.6, 0.4, 0.25, 0.08, "learned"),
)
WORSE = Trial(0.1, 0.11, 0.5, 0.6, 0.3, 0.3, "pooled")
REPORTS = [
    LayerReport("blocks.0", 0.1, "", TRIALS, 2.0),
    LayerReport("blocks.1", None, "error 0.200 is above 0.1", (TRIALS[0], WORSE), 3.0),
    LayerReport("cross", None, "it attends with a mask", (), 0.0),
]


@pytest.fixture
def fitted(tmp_path):
    layers = {report.name: {**asdict(report), "facts": {"heads": 2}} for report in REPORTS}
    save_weights(tmp_path / "model-sparse", {}, {"kind": KIND, "settings": {}, "layers": layers}, dtype=None)
    return tmp_path / "model-sparse"


def test_a_table_of_layers(fitted, capsys):
    assert read_reports(fitted) == REPORTS
    assert main(["bench", "sparse-layers", str(fitted)]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "layer" and "mass kept" in head and "why dense" in head
    assert lines[0].split() == ["blocks.0", "89.0%", "0.600", "0.080", "0.400", "0.250", "learned"]
    assert lines[1].split(maxsplit=7) == [
        *("blocks.1", "dense", "0.400", "0.200", "0.500", "0.300", "learned"),
        "error 0.200 is above 0.1 (best at keep 0.05)",
    ]
    assert lines[2].split(maxsplit=7) == ["cross", "dense", "-", "-", "-", "-", "-", "it attends with a mask"]
    assert last == "1 of 3 layers are sparse, 89.0% on average; the others stay dense"


def test_the_same_as_json(fitted, capsys):
    assert main(["bench", "sparse-layers", f"{fitted}.json", "--json"]) == 0
    first, second, third = json.loads(capsys.readouterr().out)["layers"]
    assert first == {
        "layer": "blocks.0",
        "sparse": True,
        "sparsity": pytest.approx(0.89),
        "tried_keep": 0.1,
        "mass": 0.6,
        "error": 0.08,
        "error_sparse": 0.4,
        "error_pooled": 0.25,
        "router": "learned",
        "reason": "",
        "seconds": 2.0,
    }
    assert (second["sparse"], second["tried_keep"], second["error"]) == (False, 0.05, 0.2)
    assert third["mass"] is None and third["reason"] == "it attends with a mask" and third["sparsity"] == 0


def test_files_of_other_kinds_are_refused(tmp_path, capsys):
    save_weights(tmp_path / "model", {}, {"kind": "enhance"}, dtype=None)
    assert main(["bench", "sparse-layers", str(tmp_path / "model")]) == 2
    assert "of kind 'enhance', wanted 'sparse-linear attention'" in capsys.readouterr().err
    assert main(["bench", "sparse-layers", str(tmp_path / "nothing")]) == 2
    assert "no such file" in capsys.readouterr().err
