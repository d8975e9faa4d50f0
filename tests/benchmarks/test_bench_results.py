import json
import math

import pytest

from allears.bench.results import portable
from benchmarks import results


def test_file_has_where_when_how_and_rows(tmp_path):
    rows = [
        results.row("test", "noisy", "pesq_wb", 1.23456789, 1.1, 1.3, 200),
        results.row("60s", "allears", "rtf", math.nan),
    ]
    path = results.write("try", rows, ["a note"], tmp_path)
    document = json.loads(path.read_text())
    assert list(document) == ["machine", "commit", "date", "command", "notes", "rows"]
    assert document["rows"][0] == {
        "case": "test",
        "system": "noisy",
        "metric": "pesq_wb",
        "value": 1.23457,
        "low": 1.1,
        "high": 1.3,
        "n": 200,
    }
    assert document["rows"][1] == {"case": "60s", "system": "allears", "metric": "rtf", "value": None}
    assert document["notes"] == ["a note"] and "cores" in document["machine"]
    assert document["command"].startswith("python -m benchmarks")
    assert [file.name for file in tmp_path.iterdir()] == ["try.json"]


def test_no_rows_is_valid_json(tmp_path):
    assert json.loads(results.write("empty", [], folder=tmp_path).read_text())["rows"] == []


def test_commit_is_unknown_outside_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.commit() == "unknown"


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("bench --corpus /home/me/data/corpus --steps 1 2", "bench --corpus data/corpus --steps 1 2"),
        ("bench arm=/a/b/export other=runs/x/export", "bench arm=b/export other=runs/x/export"),
        ("bench 1x2 /tmp", "bench 1x2 tmp"),
    ],
)
def test_a_command_names_no_folder_of_the_machine(command, wanted):
    assert portable(command) == wanted
