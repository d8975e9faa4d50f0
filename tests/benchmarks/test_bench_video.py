"""The ladder: names, the gate before any speed, what the rows add up to, and the front ends."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from allears import turbo
from allears.bench import results
from allears.bench.attention.run import Report
from allears.bench.video import figure, run, rungs, shares
from allears.bench.video.settings import QUICK, SYSTEMS, Settings
from allears.cli.main import main
from allears.nn.attention_processors import WanProcessor
from allears.ops.attention import AttentionSpec
from allears.turbo.wan.shapes import WanShape

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers: pip install 'allears[hub]'")


class Net(nn.Module):
    """As little of a transformer as the runner asks for; ``off`` is how wrong it is."""

    def __init__(self):
        super().__init__()
        self.off, self.calls = 0.0, 0

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.calls += 1
        return (hidden_states * (1 + self.off),)


def change(off):
    def prepare(net):
        net.off = off
        return lambda: setattr(net, "off", 0.0)

    return prepare


def climb(monkeypatch, *known, **settings):
    """Rows and notes of a run of these rungs."""
    net = Net()
    net.config, net.blocks = type("Config", (), {"out_channels": 4}), nn.ModuleList()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 2, 2),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 3, 8),
    }
    monkeypatch.setattr(run, "rungs", lambda settings: list(known))
    monkeypatch.setattr(run, "make_model", lambda *arguments: net)
    monkeypatch.setattr(run, "random_inputs", lambda *arguments, **more: dict(inputs))
    return run.measure(Settings(quick=True, device="cpu", **{"seconds": 1e-6, **settings})), net


def value(report, system, metric):
    (found,) = [r["value"] for r in report.rows if (r["system"], r["metric"]) == (system, metric)]
    return found


def test_what_was_published_is_measured_at_its_size():
    shape, size = rungs.SIZES["1.3B-480p"]
    assert (shape.layers, shape.width, shape.heads, shape.ffn_dim, size.tokens()) == (30, 1536, 12, 8960, 32_760)
    shape, size = rungs.SIZES["14B-720p"]
    assert (shape.layers, shape.width, shape.heads, shape.ffn_dim, size.tokens()) == (40, 5120, 40, 13_824, 75_600)
    known = {rung.name: rung for rung in rungs.rungs(Settings())}
    assert tuple(known) == SYSTEMS and known["diffusers"].calls == 100 and known["diffusers"].spec is None
    assert (known["allears-4step"].calls, known["allears-3step"].calls, known["steps"].calls) == (4, 3, 4)
    together = known["allears-4step"].spec
    assert together.attention.keep == 0.03 and together.linear == "fp8_row" and together.norms
    alone = [known[name].spec for name in ("norms", "w8a8", "sla2")]
    assert [(s.attention is not None, s.linear is not None, s.norms) for s in alone] == [
        (False, False, True),
        (False, True, False),
        (True, False, False),
    ]
    assert [rung.name for rung in rungs.rungs(Settings(systems=("sla2", "diffusers")))] == ["sla2", "diffusers"]


@pytest.mark.parametrize(
    ("field", "given", "message"),
    [
        ("cases", ("2B",), r"cases: \['2B'\] given; known are 1.3B-480p, 14B-720p"),
        ("systems", (), "systems: nothing given"),
        ("minutes", 0, "minutes: 0 given"),
    ],
)
def test_settings_that_do_not_fit(field, given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{field: given})


def test_the_wrong_get_no_speed_and_the_right_are_counted_in_calls(monkeypatch):
    report, net = climb(
        monkeypatch,
        rungs.Rung("diffusers"),
        rungs.Rung("near", calls=4, most=0.02, prepare=change(0.01)),
        rungs.Rung("far", most=0.02, prepare=change(0.05)),
        rungs.Rung("nan", prepare=change(float("nan"))),
        rungs.Rung("fails", prepare=lambda net: 1 / 0),
    )
    assert {r["system"] for r in report.rows if r["metric"] == "total_s"} == {"diffusers", "near"}
    assert value(report, "near", "rel_err") == pytest.approx(0.01, rel=1e-3)
    for system, calls in (("diffusers", 100), ("near", 4)):
        assert value(report, system, "total_s") == pytest.approx(calls * value(report, system, "step_ms") / 1e3)
    ratio = value(report, "diffusers", "total_s") / value(report, "near", "total_s")
    assert value(report, "near", "speedup") == pytest.approx(ratio, rel=1e-4)
    notes = "\n".join(report.notes)
    assert "tiny: far: no speed: rel_err 0.05 above 0.02" in notes and "nan: no speed: NaN or infinity" in notes
    assert "tiny: fails: no speed: ZeroDivisionError" in notes and net.off == 0.0


def test_few_steps_are_timed_as_whole_videos(monkeypatch):
    monkeypatch.setattr(run, "summarise", lambda samples: run.Timing(1e3 * len(samples), 1.0, 2.0, len(samples)))
    report, net = climb(monkeypatch, rungs.Rung("allears-3step", calls=3, sampled=turbo.Steps(3)))
    assert net.calls == 1 + 1 + 3 + 1  # the check, a step, a video, the shares
    assert value(report, "allears-3step", "total_s") == 1.0
    assert not net._forward_pre_hooks


def test_what_time_leaves_out_is_named(monkeypatch):
    clock = iter([0.0, *[100.0] * 9])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    report, _ = climb(monkeypatch, rungs.Rung("diffusers"), minutes=1)
    assert not report.rows and "tiny: diffusers: left out after 1 minutes" in report.notes


def test_shares_add_up_and_leave_nothing_behind(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(shares.time, "perf_counter", lambda: next(ticks))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q, self.processor = nn.Linear(4, 4), WanProcessor(AttentionSpec())

    net = nn.Module()
    net.blocks = nn.ModuleList([Layer(), Layer()])
    x = torch.randn(1, 3, 1, 4)

    def call():
        for layer in net.blocks:
            layer.processor.attend(layer, x, x, x, AttentionSpec(), None)
            layer.to_q(x)

    found, how = shares.shares_ms(net, call, CPU)
    assert not how and found == {"attention_ms": 2e3, "linear_ms": 2e3, "other_ms": (9 - 4) * 1e3}
    assert all(layer.processor.attend is None and "forward" not in vars(layer.to_q) for layer in net.blocks)


@needs_diffusers
def test_random_weights_are_alike_and_of_the_right_kind():
    shape = WanShape(layers=1, heads=2, ffn_dim=32, head_dim=16, text_dim=8, freq_dim=16)
    first, again = (rungs.make_model(shape, CPU, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    block = first.blocks[0]
    assert block.attn1.to_q.weight.dtype == torch.bfloat16 and block.norm2.weight.dtype == torch.float32
    assert block.attn1.to_q.weight.float().std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert first.rope.freqs_cos.abs().sum() > 0


def test_the_figure_sorts_by_time(tmp_path):
    rows = [results.row("1.3B-480p", name, "total_s", s) for name, s in (("allears-4step", 0.6), ("diffusers", 62.0))]
    rows += [results.row("1.3B-480p", "decode", "total_s", 9.0), results.row("14B-720p", "sla2", "step_ms", 3.0)]
    assert figure.panels(rows) == {"1.3B-480p": {"diffusers": 62.0, "allears-4step": 0.6}}
    assert figure.draw(rows, tmp_path / "new" / "a.png", "a machine").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no case was timed"):
        figure.draw(rows[2:], tmp_path / "b.png")


def test_without_diffusers_the_case_is_named(monkeypatch):
    def missing(shape):
        raise ImportError("diffusers is not here")

    monkeypatch.setattr(rungs, "build_wan", missing)
    report = run.measure(Settings(quick=True, device="cpu"))
    assert report.rows == [] and "tiny: left out: diffusers is not here" in report.notes


@needs_diffusers
def test_the_repository_case_and_the_verb_run_the_ladder(tmp_path):
    from benchmarks.registry import CASES, load_all

    load_all()
    systems = ("diffusers", "allears-4step", "norms", "w8a8-norms")
    settings = Settings(systems=systems, quick=True, device="cpu", seconds=1e-6)
    assert CASES["video"](settings, results_folder=tmp_path, commit="abc").run() == 0
    document = json.loads((tmp_path / "video.json").read_text())
    assert document["commit"] == "abc" and (tmp_path / "video.png").exists()
    rows = {(r["system"], r["metric"]): r["value"] for r in document["rows"]}
    assert {system for system, metric in rows if metric == "speedup"} == set(systems)
    assert rows["norms", "rel_err"] < 0.02 < rows["allears-4step", "rel_err"] < 0.5
    assert any("blocks.*.attn1 (2): WanAttention -> sla2" in note for note in document["notes"])
    arguments = ["bench", "video", "--systems", "diffusers", "--quick", "--device", "cpu", "--seconds", "0.000001"]
    assert main([*arguments, "--out", str(tmp_path / "cli")]) == 0
    document = json.loads((tmp_path / "cli" / "video.json").read_text())
    assert {r["case"] for r in document["rows"]} == {QUICK} and document["commit"].startswith("allears ")


@needs_diffusers
def test_encoder_and_decoder_are_timed_or_named():
    from allears.bench.video.whole import measure_whole

    report = Report()
    measure_whole(QUICK, rungs.SIZES[QUICK][1], CPU, 0, report, tiny=True)
    named = {row["system"] for row in report.rows} | {note.split(": ")[1] for note in report.notes}
    assert named == {"encode", "decode"} and all(row["value"] > 0 for row in report.rows)
