import json

import pytest
from benchmarks.sagebwd_pretrain import SageBwdPretrain, draw, notes, read_study, study_rows


def _arm(setting, system, seed, losses, **more):
    metrics = dict(zip(("val_loss", "val_loss_exact", "val_bits_per_byte"), losses, strict=True))
    large = setting.endswith("large")
    return {
        "setting": setting,
        "system": system,
        "seed": seed,
        "large": large,
        "status": "done",
        "metrics": metrics,
        "device": "a card",
        "trace": False,
    } | more


@pytest.fixture
def study(tmp_path):
    """Two seeds of a pair, of which the second system misses a third; one diverged; one left."""
    trace = [
        {"layer": 0, "grad_scales": None, "tensor": "Q", "metric": "sigma", "value": 1.5},
        {"layer": 0, "grad_scales": "row", "tensor": "dQ", "metric": "rel_l2", "value": 0.02},
        {"layer": 0, "grad_scales": "tile", "tensor": "dQ", "metric": "rel_l2", "value": 0.05},
    ]
    arms = {
        "a": _arm("qk-norm small", "exact", 0, (3.0, 3.0, 1.0), trace=trace),
        "b": _arm("qk-norm small", "sagebwd", 0, (3.1, 3.05, 1.1)),
        "c": _arm("qk-norm small", "exact", 1, (3.4, 3.4, 1.3)),
        "d": _arm("qk-norm small", "sagebwd", 1, (3.3, 3.35, 1.2)),
        "e": _arm("qk-norm small", "exact", 2, (9.0, 9.0, 3.0)),
        "f": {"setting": "no-qk-norm large", "system": "sagebwd", "seed": 0, "status": "diverged", "reason": "nan"},
        "g": {"setting": "no-qk-norm large", "system": "exact", "seed": 0, "status": "left"},
    }
    settings = {"preset": "study", "token_budget": 800, "tokens_per_step": 10, "lr": 0.01}
    (tmp_path / "study.json").write_text(json.dumps({"settings": settings, "arms": arms}))
    for name in "abcde":
        (tmp_path / name).mkdir()
        rows = [{"kind": "train", "step": s, "loss": 5 - s / 50} for s in (20, 40, 60, 80)]
        rows += [{"kind": "validate", "step": s, "val_loss": 5 - s / 50} for s in (0, 40, 80)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_losses_gaps_and_traces(study):
    found = {(r["case"], r["system"], r["metric"]): (r["value"], r.get("n")) for r in study_rows(read_study(study))}
    assert found["qk-norm small", "exact", "val_loss"] == (pytest.approx(15.4 / 3, abs=1e-4), 3)
    assert found["qk-norm small", "sagebwd", "val_loss_min"] == (3.1, 2)
    assert found["qk-norm small", "sagebwd", "val_loss_max"] == (3.3, 2)
    assert found["qk-norm small", "sagebwd", "val_loss_std"][0] == pytest.approx(0.2 / 2**0.5, abs=1e-4)
    # within a seed, and not over the seed that one of them lacks: +0.1 and -0.1
    assert found["qk-norm small", "sagebwd", "val_loss_gap"] == (pytest.approx(0.0, abs=1e-9), 2)
    assert found["qk-norm small", "sagebwd", "val_loss_gap_max"][0] == pytest.approx(0.1)
    assert found["qk-norm small", "sagebwd", "val_loss_exact_gap"][0] == pytest.approx(0.0, abs=1e-9)
    assert ("qk-norm small", "exact", "val_loss_gap") not in found
    assert found["no-qk-norm large", "sagebwd", "diverged"] == (1.0, 1)
    assert found["trace qk-norm small layer 0", "sagebwd-tile", "dQ_rel_l2"][0] == 0.05
    assert found["trace qk-norm small layer 0", "exact", "Q_sigma"][0] == 1.5


def test_notes_name_the_arms_without_a_result(study):
    said = notes(read_study(study))
    assert "10 (small) or 80 (large) a step" in said[0] and "peak learning rate 0.01" in said[0]
    assert said[2] == "trained on a card"
    assert said[-2:] == ["f: diverged (nan)", "g: left"]


def test_case_writes_rows_and_a_picture(study, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks", "sagebwd_pretrain"])
    folder = tmp_path / "results"
    assert SageBwdPretrain(study, results_folder=folder, commit="abc").run() == 0
    document = json.loads((folder / "sagebwd_pretrain.json").read_text())
    assert document["commit"] == "abc" and document["rows"] == study_rows(read_study(study))
    assert (folder / "sagebwd_pretrain.png").read_bytes().startswith(b"\x89PNG")


def test_the_curves_are_those_of_the_logs(study, tmp_path, monkeypatch):
    """Tokens in millions: small batches of 10 tokens a step."""
    import matplotlib.axes

    drawn = []
    plain = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes, "plot", lambda self, *a, **k: (drawn.append((a, k)), plain(self, *a, **k))[1]
    )
    draw(read_study(study), study, tmp_path / "x.png")
    curves = [(list(x), list(y)) for (x, y, *style), _ in drawn if not style]
    assert ([0.0, 0.0004, 0.0008], [5.0, 4.2, 3.4]) in [
        ([round(v, 9) for v in x], [round(v, 9) for v in y]) for x, y in curves
    ]
    labels = {options["label"] for _, options in drawn if options.get("label")}
    assert labels == {"exact", "sagebwd", "dQ"}


def test_where_logs_are_missing_the_last_losses_are_drawn(study, tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "plot", lambda self, *a, **k: drawn.append(a))
    (study / "b" / "log.jsonl").unlink()
    monkeypatch.setattr("benchmarks.sagebwd_pretrain._draw_trace", lambda panel, trace: None)
    draw(read_study(study), study, tmp_path / "x.png")
    assert sorted(drawn) == [(3.0, 0, "o"), (3.1, 1, "o"), (3.3, 1, "o"), (3.4, 0, "o"), (9.0, 0, "o")]


def test_a_folder_without_a_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no study\.json"):
        read_study(tmp_path)
    (tmp_path / "study.json").write_text('{"arms": {"a": {"status": "left"}}}')
    with pytest.raises(ValueError, match="no arm of"):
        read_study(tmp_path)
