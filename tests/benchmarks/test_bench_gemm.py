"""The benchmark of 8-bit layers: its cases, inputs and sums, and a tiny run on the CPU."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from allears.bench.gemm import cases, figure, run, systems
from allears.bench.gemm.cases import Case
from allears.bench.gemm.inputs import make_inputs
from allears.bench.gemm.settings import Settings
from allears.cli.main import main

CPU = torch.device("cpu")


def values(rows, metric):
    return {(row["case"], row["system"]): row["value"] for row in rows if row["metric"] == metric}


def test_cases_have_names_that_give_them_back():
    for group in cases.GROUPS.values():
        assert [cases.parse(case.name) for case in group] == list(group)
    assert Case("linear", 3, 5, 7).flops == 210 and Case("gelu", 3, 5).flops == 0
    assert cases.select(["quick", "linear 70x48x33", "norm 2x3"])[-1] == Case("norm", 2, 3)
    assert len(cases.select(["quick", "linear 70x48x33"])) == 4
    blocks = {name: sum(count * case.flops for case, count in parts) for name, parts in cases.BLOCKS.items()}
    assert blocks["1.3B"] == 2 * 32_760 * (6 * 1536**2 + 2 * 1536 * 8960)
    assert blocks["14B"] == 2 * 75_600 * (6 * 5120**2 + 2 * 5120 * 13_824)
    for bad in ("gemm 3x4x5", "linear 3x4", "norm 3x4x5", "linear 3x0x5", ""):
        with pytest.raises(ValueError, match="is neither a group"):
            cases.parse(bad)


def test_inputs_are_drawn_again_alike_and_hold_the_exact_answer():
    first, again = (make_inputs(Case("linear", 300, 96, 40), CPU, 3) for _ in range(2))
    assert torch.equal(first.x, again.x) and torch.equal(first.rows, again.rows) and first.exact.shape == (256, 40)
    assert first.linear is not None
    out = F.linear(first.x.double(), first.linear.weight.double(), first.linear.bias.double())
    assert first.error(out) < 1e-12 and first.error(1.1 * out) == pytest.approx(0.1)
    out[5, 5] = float("nan")
    assert first.error(out) != first.error(out)
    sizes = first.x.float().std(0)
    assert int((sizes > 5 * sizes.median()).sum()) in (3, 4, 5)


@pytest.mark.parametrize("case", cases.GROUPS["quick"], ids=lambda case: case.name)
def test_every_system_that_runs_here_is_right(case):
    inputs = make_inputs(case, CPU, 0)
    ran = []
    for system in systems.SYSTEMS:
        if case.kind not in system.kinds:
            continue
        try:
            with torch.no_grad():
                out = system.prepare(inputs)()
        except (ValueError, systems.UnavailableError):
            continue
        assert inputs.error(run._plain(out)) <= system.bound, system.name
        ran.append(system.name)
    assert len(ran) >= 5 and {"allears-int8_tile", "allears-fp8_row"} <= set(ran)


def test_a_wrong_system_gets_no_speed(monkeypatch):
    wrong = systems.System("allears-fp8_row", "", lambda inputs: lambda: 1.2 * inputs.linear(inputs.x))
    monkeypatch.setattr(run, "select_systems", lambda names: [systems.SYSTEMS[0], wrong])
    report = run.measure(Settings(quick=True, device="cpu", cases=("linear 70x48x33",)))
    assert values(report.rows, "rel_err")["linear 70x48x33", "allears-fp8_row"] == pytest.approx(0.2, rel=0.05)
    assert [system for _, system in values(report.rows, "ms")] == ["cublas-bf16"]
    assert any("allears-fp8_row: no speed: its error 0.2" in note for note in report.notes)


def test_what_is_left_at_the_limit_is_named_and_the_rest_is_kept(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(inputs):
        now[0] += 59.0
        return lambda: inputs.linear(inputs.x)

    made = [systems.System(name, "", slow) for name in ("a", "b", "c")]
    monkeypatch.setattr(run, "select_systems", lambda names: made)
    kept = []
    shapes = ("linear 70x48x33", "linear 70x48x32", "linear 70x48x31")
    settings = Settings(quick=True, device="cpu", cases=shapes, minutes=1.0)
    report = run.measure(settings, keep=lambda report: kept.append(len(report.rows)))
    assert list(values(report.rows, "ms")) == [(shapes[0], "a"), (shapes[0], "b")]
    assert "linear 70x48x33: left out for lack of time: c" in report.notes
    assert "left out after 1 minutes: linear 70x48x32, linear 70x48x31" in report.notes
    assert "linear 70x48x33: a: 59.0 s until its first result" in report.notes
    assert kept == [len(report.rows)]


def test_a_block_is_the_sum_of_its_layers():
    times = {case.name: 2.0**n for n, (case, _) in enumerate(cases.BLOCKS["1.3B"])}
    rows = [
        {"case": case, "system": system, "metric": "ms", "value": ms / factor}
        for case, ms in times.items()
        for system, factor in (("cublas-bf16", 1), ("allears-fp8_row", 2))
    ]
    rows.append({"case": next(iter(times)), "system": "torchao-fp8", "metric": "ms", "value": 1.0})
    found = run.block_rows(rows)
    assert values(found, "ms") == {
        ("block 1.3B", "cublas-bf16"): 1 + 3 * 2 + 4 + 8,
        ("block 1.3B", "allears-fp8_row"): 9.5,
    }
    assert values(found, "speedup")["block 1.3B", "allears-fp8_row"] == 2
    assert figure.speedups(found) == {"block 1.3B": {"cublas-bf16": 1, "allears-fp8_row": 2}}


def test_the_verb_writes_rows_and_a_figure(tmp_path, capsys):
    arguments = ["--quick", "--device", "cpu", "--systems", "cublas-bf16", "allears-int8_row", "torch", "torchao-int8"]
    assert main(["bench", "gemm", *arguments, "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "gemm.json").read_text())
    times, faster = values(document["rows"], "ms"), values(document["rows"], "speedup")
    name = "linear 70x256x64"
    wanted = times[name, "cublas-bf16"] / times[name, "allears-int8_row"]
    assert faster[name, "allears-int8_row"] == pytest.approx(wanted, rel=1e-3)
    assert 0 < values(document["rows"], "rel_err")["gelu 70x48", "allears-int8_row"] < 0.05
    assert values(document["rows"], "quantise_ms")[name, "allears-int8_row"] > 0
    assert any("torchao-int8: not available: needs a CUDA GPU" in note for note in document["notes"])
    assert (tmp_path / "gemm.png").read_bytes()[:4] == b"\x89PNG"
    assert "linear 70x256x64" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--cases", "linear 12"], "cases: 'linear 12' is neither a group"),
        (["--systems", "deepgemm"], "systems: 'deepgemm' is unknown"),
        (["--minutes", "0"], "minutes: 0.0 given; it must be positive"),
        (["--tune"], "device: tile sizes are tuned on a CUDA GPU"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, error, capsys):
    assert main(["bench", "gemm", "--quick", "--device", "cpu", *arguments]) == 2
    text = capsys.readouterr().err
    assert error in text and text.count("\n") == 1
