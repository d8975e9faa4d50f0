"""The benchmark of linear attention: what it counts, what it fits, and a tiny run on the CPU."""

import json

import pytest
import torch

from allears.bench.linear import figure, run
from allears.bench.linear.settings import Settings
from allears.cli.main import main

CPU = torch.device("cpu")


def rows_of(values, metric="ms", system="allears"):
    return [{"case": case, "system": system, "metric": metric, "value": value} for case, value in values.items()]


def test_a_case_is_a_token_count_and_moves_four_tensors():
    assert run.case_name(1024, 8, 64) == "1024" and run.case_name(1024, 8, 16) == "1024 8x16"
    inputs = run.make_inputs(10, 8, 64, CPU, 0)
    assert inputs.bytes_moved == 4 * 10 * 8 * 64 * 2
    again = run.make_inputs(10, 8, 64, CPU, 0)
    assert torch.equal(inputs.q, again.q) and not torch.equal(inputs.q, inputs.k) and bool((inputs.scale > 0).all())


def test_notes_say_how_each_shape_grows():
    times = {str(2**n): 2.0**n for n in range(14, 20)} | {str(2**n) + " 8x16": 4.0**n for n in range(14, 20)}
    times["copy"] = 7.0
    notes = run.growth(rows_of(times) + rows_of({"1024": 2.0}, "peak_gb"))
    assert notes == [
        "allears, heads and size 8x64, ms: 16384 to 524288 tokens: length^1.00; 32768 to 524288 tokens: length^1.00",
        "allears, heads and size 8x16, ms: 16384 to 524288 tokens: length^2.00; 32768 to 524288 tokens: length^2.00",
    ]


def test_a_wrong_kernel_gets_no_speed(monkeypatch):
    right = run.attend

    def wrong(system, inputs, q, k, v):
        return right("allears-reference", inputs, q, k, v) * (1.1 if system == "allears" else 1)

    monkeypatch.setattr(run, "attend", wrong)
    report = run.measure(Settings(quick=True, device="cpu", backward=False))
    timed = {row["system"] for row in report.rows if row["metric"] == "ms"}
    assert timed == {"allears-reference", "softmax"}
    errors = [row["value"] for row in report.rows if row["metric"] == "rel_err"]
    assert errors == pytest.approx([0.1] * 4, rel=0.05)
    assert sum("allears: no speed: its error 0.1" in note for note in report.notes) == 4
    assert "allears-graph: not available: CUDA graphs need a CUDA GPU; this is cpu" in report.notes


def test_the_graph_is_checked_and_told_beside_the_kernel(monkeypatch):
    made = []

    class Fake:
        def __init__(self, function, *inputs):
            self.inputs, self.output = inputs, function(*inputs) * (1.5 if inputs[0].shape[-1] == 16 else 1)
            made.append(inputs[0].shape[1])

        def __call__(self, *inputs):
            assert all(a is b for a, b in zip(inputs, self.inputs, strict=True))
            return self.output

    monkeypatch.setattr(run, "Replayed", Fake)
    monkeypatch.setattr(run, "attend", lambda system, inputs, q, k, v: q + k + v)
    report = run.Report()
    for size in (64, 16):
        sets = [run.make_inputs(64, 8, size, CPU, seed) for seed in (0, 1)]
        run._run(str(size), sets, Settings(systems=(run.GRAPH,)), run.Stopwatch(CPU, 0.001), 1e9, report)
    found = {(row["case"], row["metric"]): row["value"] for row in report.rows}
    assert set(found) == {("64", "rel_err"), ("64", "ms"), ("64", "bandwidth_frac"), ("16", "rel_err")}
    assert found["64", "rel_err"] == 0 and found["16", "rel_err"] == pytest.approx(0.5, rel=1e-3) and made == [64] * 4
    assert report.notes == [f"16: {run.GRAPH}: no speed: its error 0.5 is above {run.BOUND}"]


def test_bandwidth_is_four_tensors_over_time_over_copies(monkeypatch):
    monkeypatch.setattr(run, "attend", lambda system, inputs, q, k, v: q + k + v)
    report = run.measure(Settings(quick=True, device="cpu", backward=False))
    found = {(row["case"], row["system"], row["metric"]): row["value"] for row in report.rows}
    bandwidth = found["copy", "torch", "gb_per_s"] * 1e9
    for case, tokens, size in (("64", 64, 64), ("128 8x16", 128, 16)):
        seconds = found[case, "allears", "ms"] / 1e3
        wanted = 4 * 2 * tokens * 8 * size / seconds / bandwidth
        assert found[case, "allears", "bandwidth_frac"] == pytest.approx(wanted, rel=1e-3)
    assert ("64", "softmax", "bandwidth_frac") not in found


def test_a_run_writes_rows_and_figure(tmp_path):
    systems = ["--systems", "allears-reference", "softmax"]
    assert main(["bench", "linear", "--quick", "--device", "cpu", *systems, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "linear_attention.json").read_text())
    cases = {row["case"] for row in document["rows"]}
    assert cases == {"copy", "64", "128", "64 8x16", "128 8x16"}
    metrics = {row["metric"] for row in document["rows"] if row["system"] == "allears-reference"}
    assert metrics == {"ms", "fwd_bwd_ms", "bandwidth_frac"}
    assert (tmp_path / "linear_attention.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_settings_and_empty_figures_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"systems: .'fast'. given; known are allears"):
        Settings(systems=("fast",))
    with pytest.raises(ValueError, match=r"lengths: .0,. given"):
        Settings(lengths=(0,))
    with pytest.raises(ValueError, match="rows: no case was timed"):
        figure.draw(rows_of({"copy": 1.0}, "gb_per_s"), tmp_path / "none.png")
