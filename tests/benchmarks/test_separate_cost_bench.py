"""The benchmark of separators' cost: its cases, checks, ratios and growth, and a run of tiny nets on the CPU."""

import json
import time

import pytest
import torch

from allears.bench.growth import exponent, power_law
from allears.bench.separate import figure, nets, run
from allears.bench.separate.settings import SIZES, Case, Settings, parse
from allears.bench.timing import summarise
from allears.cli.main import main

CPU = torch.device("cpu")


class OneCall:
    """A stopwatch that times each call once."""

    def __init__(self, device, round_s):
        pass

    def time(self, calls):
        found = []
        for call in calls:
            start = time.perf_counter()
            call(0)
            found.append(summarise([(time.perf_counter() - start) * 1e3]))
        return found


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SIZES, "T", "test")
    monkeypatch.setattr(run, "Stopwatch", OneCall)


def rows_of(values, system="allears-fla", metric="ms"):
    return [{"case": case, "system": system, "metric": metric, "value": value} for case, value in values.items()]


def test_growth_is_the_slope_of_the_logarithms():
    assert exponent({10: 3.0, 100: 300.0, 1000: 30_000.0}) == pytest.approx(2)
    assert exponent({2: 5.0, 8: 10.0}) == pytest.approx(0.5)
    points = {5: 1.0, 30: 1.0, 60: 2.0, 120: 4.0}
    assert power_law(points, 30, "s") == "5 to 120 s: length^0.40; 30 to 120 s: length^1.00"
    assert power_law({30: 1.0, 60: 4.0, 120: 16.0}, 30, "s") == "30 to 120 s: length^2.00"
    assert power_law({30: 1.0, 60: 2.0}, 30, "s") == ""


def test_the_published_length_comes_first_then_short_before_long():
    settings = Settings(lengths=(60, 30, 5), sizes=("T", "L", "locoformer-m"), precision=("float32", "bf16"))
    names = [case.name for case in settings.cases(gpu=True)]
    assert names[:6] == ["T 30s", "L 30s", "locoformer-m 30s", "T 30s bf16", "L 30s bf16", "locoformer-m 30s bf16"]
    assert names[6:12] == ["T 600s", "L 600s", "T 600s bf16", "L 600s bf16", "T 5s", "L 5s"]
    assert names[12:15] == ["locoformer-m 5s", "T 60s", "L 60s"] and "locoformer-m 60s" not in names
    assert "T 600s" not in [case.name for case in settings.cases(gpu=False)]
    assert settings.attentions(Case("T", 60)) == ["published", "optimised", "fla"]
    assert settings.attentions(Case("T", 600)) == ["fla"]
    assert [case.seconds for case in Settings(quick=True).cases(gpu=False)] == [0.1, 0.2, 0.4]


def test_names_are_read_back():
    for case in (Case("T", 30), Case("locoformer-m", 0.5, "bf16")):
        assert parse(case.name) == case
    assert parse("T check") is None and Case("L", 30, "tf32").group == "L tf32" and Case("L", 30).group == "L"


def test_systems_are_named_by_their_family():
    assert [nets.system_name("B", a) for a in ("published", "optimised", "fla")] == [
        "sepreformer",
        "sepreformer-optimised",
        "allears-fla",
    ]
    assert nets.system_name("locoformer-m", "optimised") == "locoformer-optimised"


def test_nets_are_drawn_alike_and_away_from_their_start():
    first, again, other = (nets.make_net("T", "published", CPU, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    moved = [name for name in first if first[name].is_floating_point() and not torch.equal(first[name], other[name])]
    assert all(first[name].std() > 0.005 for name in moved if first[name].numel() > 8)
    pair = nets.make_nets("T", ("published", "optimised"), CPU, 0)
    states = [net.state_dict() for net in pair.values()]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    mixture = nets.make_mixture(pair["published"], 0.1, 0)
    assert mixture.shape == (1, 1600) and not pair["published"].training


def test_products_are_set_and_put_back():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    a = torch.ones(4, 4)
    for precision, matmul, conv, dtype in (
        ("float32", "highest", False, torch.float32),
        ("tf32", "high", True, torch.float32),
        ("bf16", "highest", False, torch.bfloat16),
    ):
        with nets.products(precision, CPU):
            assert torch.get_float32_matmul_precision() == matmul and torch.backends.cudnn.allow_tf32 == conv
            assert (a @ a).dtype == dtype
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_ratios_are_against_the_published_net_of_the_same_case():
    rows = rows_of({"T 30s": 30.0, "T 60s": 99.0}, "sepreformer") + rows_of({"T 30s": 12.0})
    rows += rows_of({"T 30s": 8.0}, "sepreformer", "peak_gb") + rows_of({"T 30s": 2.0}, metric="peak_gb")
    rows += rows_of({"T 30s": 6.0}, metric="graph_ms")
    found = {row["metric"]: row["value"] for row in run.ratios(rows, "T 30s", "sepreformer")}
    assert found == {"speedup": 2.5, "memory_frac": 0.25}
    assert run.ratios(rows, "T 60s", "sepreformer") == []


def test_growth_is_told_for_each_system_size_and_precision():
    rows = rows_of({f"T {n}s": float(n) for n in (30, 60, 5, 120)})
    rows += rows_of({f"T {n}s bf16": n**2.0 for n in (30, 60, 120)}, "sepreformer", "peak_gb")
    rows += rows_of({"T check": 1e-6}, metric="rel_err")
    assert run.growth(rows) == [
        "allears-fla, T, ms: 5 to 120 s: length^1.00; 30 to 120 s: length^1.00",
        "sepreformer, T bf16, peak_gb: 30 to 120 s: length^2.00",
    ]
    assert list(run.series(rows)["allears-fla", "T", "ms"]) == [5, 30, 60, 120]


def test_a_run_checks_times_and_draws(tmp_path, capsys):
    assert main(["bench", "separate", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "separate_cost.json").read_text())
    found = {(r["case"], r["system"], r["metric"]): r["value"] for r in document["rows"]}
    for case in ("T 0.1s", "T 0.2s", "T 0.4s"):
        base, ours = (found[case, system, "ms"] for system in ("sepreformer", "allears-fla"))
        assert found[case, "allears-fla", "speedup"] == pytest.approx(base / ours, rel=1e-3)
        assert (case, "sepreformer", "speedup") not in found
    assert 0 <= found["T check", "sepreformer-optimised", "rel_err"] < 1e-3
    assert any(note.startswith("allears-fla, T, ms: 0.1 to 0.4 s: length^") for note in document["notes"])
    assert (tmp_path / "separate_cost.png").read_bytes()[:4] == b"\x89PNG"
    assert "T 0.1s" in capsys.readouterr().out


def test_a_wrong_net_gets_no_speed(monkeypatch):
    monkeypatch.setattr(nets, "rel_err", lambda out, wanted: 0.01)
    report = run.measure(Settings(quick=True, device="cpu"))
    assert {r["system"] for r in report.rows if r["metric"] == "ms"} == {"sepreformer", "allears-fla"}
    assert "T: sepreformer-optimised: no speed: its error 0.01 is above 0.001" in report.notes


def test_what_finds_no_memory_is_told_and_not_tried_on_longer_inputs(monkeypatch):
    tried = []

    def peak(call, device):
        seconds = call(0).shape[-1] / 16_000
        tried.append(seconds)
        if len(tried) > 3 and len(tried) % 2 == 0 and seconds < 0.3:  # of two systems the first, at 0.2 s
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return int(seconds * 1e9)

    monkeypatch.setattr(run, "peak_bytes", peak)
    settings = Settings(quick=True, device="cpu", attention=("published", "fla"))
    tried.append(0)  # calls 2 and 3 are at 0.1 s, 4 and 5 at 0.2 s
    report = run.measure(settings)
    assert tried == [0, 0.1, 0.1, 0.2, 0.2, 0.4]
    assert "T 0.2s: sepreformer: no speed: out of memory: CUDA out of memory." in report.notes
    assert "T 0.4s: sepreformer: no speed: memory was too small at 0.2 s already" in report.notes
    peaks = {(r["case"], r["system"]): r["value"] for r in report.rows if r["metric"] == "peak_gb"}
    assert peaks["T 0.1s", "sepreformer"] == 0.1 and peaks["T 0.4s", "allears-fla"] == 0.4
    assert ("T 0.2s", "sepreformer") not in peaks


def test_the_run_ends_in_time_and_names_what_is_left_out(monkeypatch):
    runner = run.Runner(Settings(quick=True, device="cpu"), CPU)
    runner.took["T", "fla", "float32"], runner.took["T", "published", "float32"] = (0.1, 0.2), (0.2, 0.3)
    assert runner.guess_s(Case("T", 0.4)) == pytest.approx(30 * (0.8 + 0.6)) and runner.guess_s(Case("B", 0.4)) == 0
    report = run.measure(Settings(quick=True, device="cpu", minutes=1e-9))
    assert [row for row in report.rows if row["metric"] == "ms"] == []
    assert "left out, to end after 1e-09 minutes: T 0.1s, T 0.2s, T 0.4s" in report.notes


def test_bad_settings_and_empty_figures_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"sizes: \['XL'\] given; known are T, B, L, locoformer-m"):
        Settings(sizes=("XL",))
    with pytest.raises(ValueError, match="attention: nothing given"):
        Settings(attention=())
    with pytest.raises(ValueError, match=r"lengths: .0,. given; positive"):
        Settings(lengths=(0,))
    with pytest.raises(ValueError, match="minutes: 0 given"):
        Settings(minutes=0)
    with pytest.raises(ValueError, match="rows: no case was timed"):
        figure.draw([], tmp_path / "none.png")


@pytest.mark.gpu
def test_a_graph_replays_the_call_and_refuses_what_it_cannot():
    from allears.bench.separate.graph import GraphError, captured

    device = torch.device("cuda")
    x = torch.arange(8.0, device=device)
    captured(lambda index: 2 * x, device)(0)
    with pytest.raises(GraphError):
        captured(lambda index: x * float(x.sum()), device)
