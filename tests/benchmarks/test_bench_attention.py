"""The attention benchmark: names and counts, the exact samples, the gate, what a run reports, peers, the figure."""

import itertools
import json
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from allears.bench import results, timing
from allears.bench.attention import cases, check, figure, peers, reference, run, systems, table
from allears.bench.attention.inputs import OFFSET, make_input_sets, make_inputs
from allears.bench.attention.settings import Settings
from allears.bench.attention.systems import BF16, System

CPU = torch.device("cpu")


def textbook(q, k, v, causal):
    """float64, a query head at a time."""
    share = q.shape[2] // k.shape[2]
    heads = []
    for h in range(q.shape[2]):
        logits = q[:, :, h] @ k[:, :, h // share].transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            logits = logits + torch.full(logits.shape[1:], -torch.inf).triu(1)
        heads.append(logits.softmax(-1) @ v[:, :, h // share])
    return torch.stack(heads, 2)


def attend(q, k, v, causal):
    return textbook(q.double(), k.double(), v.double(), causal).to(q.dtype)


def system(name="right", function=attend, trains=True, bounds=BF16):
    return System(name, lambda machine: (function, f"about {name}"), trains, bounds)


# names and counts


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("fwd 1x32760x12x128", 4 * 12 * 32760**2 * 128),
        ("bwd 1x32760x12x128", 10 * 12 * 32760**2 * 128),
        ("fwd+bwd 4x8192x16x128 causal", 14 * 4 * 16 * 8192**2 * 128 / 2),
        ("fwd 4x8192x16x64", 4 * 4 * 16 * 8192**2 * 64),
        ("fwd 1x75600x40x128", 4 * 40 * 75600**2 * 128),
    ],
)
def test_default_cases_are_named_and_counted_as_published(name, flops):
    case = cases.parse(name)
    assert case.name == name and case.flops == flops
    assert case in cases.select(Settings().case_names)


def test_a_case_of_shared_heads_and_the_groups():
    case = cases.parse("bwd 2x100x8/2x64 causal")
    assert case.shape == cases.Shape(2, 100, 8, 64, 2, True) and case.name == "bwd 2x100x8/2x64 causal"
    assert {c.shape.batch * c.shape.length for c in cases.GROUPS["sweep"]} == {cases.SWEEP_TOKENS}
    twice = cases.select(["quick", cases.GROUPS["quick"][0].name, "quick"])
    assert twice == list(cases.GROUPS["quick"])
    assert cases.select(Settings(quick=True).case_names) == twice


@pytest.mark.parametrize(
    "text", ["fwd", "forward 1x2x3x4", "fwd 1x2x3", "fwd 1x2x3/2x4", "fwd 0x2x3x4", "fwd 1x2x3x4 c"]
)
def test_what_is_no_case_is_refused(text):
    with pytest.raises(ValueError, match=r"^cases: "):
        cases.select([text])


# inputs and the exact samples


def test_inputs_have_an_offset_in_k_alone_and_follow_the_seed():
    shape = cases.Shape(1, 4000, 2, 32, 1)
    inputs = make_inputs(shape, CPU, seed=3)
    assert 0.7 * OFFSET < inputs.k.float().mean(1).std() < 1.3 * OFFSET
    for tensor in (inputs.q, inputs.v, inputs.grad):
        assert tensor.float().mean(1).abs().max() < 0.1
    again = make_inputs(shape, CPU, seed=3)
    assert inputs.equal(again.q, again.k, again.v) and not inputs.equal(again.q, again.k + 1, again.v)
    sets = make_input_sets(shape, CPU, seed=3)
    assert len(sets) == 4 and sets[0].equal(again.q, again.k, again.v) and not torch.equal(sets[0].q, sets[1].q)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [(67, 4, 2), (300, 2, 2), (1, 2, 1)])
def test_samples_equal_the_textbook(causal, length, heads, kv_heads, monkeypatch):
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 4 * length * 13)  # chunks of 13 rows
    inputs = make_inputs(cases.Shape(2, length, heads, 16, kv_heads, causal), CPU, seed=1)
    q, k, v = (x.double().requires_grad_() for x in inputs.copies())
    out = textbook(q, k, v, causal)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs.grad.double())
    sample, gradients = reference.sample_output(inputs, causal), reference.sample_gradients(inputs, causal)
    assert {0, length - 1} <= set(sample.rows.tolist()) and len(sample.exact) == min(8, 2 * heads)
    assert sample.rel_err(out.detach()) < 2e-6
    if length > 1:
        assert max(gradients.rel_errs(dq, dk, dv).values()) < 1e-5
        assert sample.rel_err(1.01 * out.detach()) == pytest.approx(0.01, rel=1e-3)
        found = gradients.rel_errs(1.02 * dq, 0.97 * dk, 1.05 * dv)
        assert list(found.values()) == pytest.approx([0.02, 0.03, 0.05], rel=1e-3)


# the gate


def verdict(function, mode="fwd+bwd", bounds=BF16):
    inputs = make_inputs(cases.Shape(1, 50, 2, 16, 2), CPU, seed=5)
    out, grads = reference.sample_output(inputs, False), reference.sample_gradients(inputs, False)
    return check.check(system(function=function, bounds=bounds), function, inputs, False, mode, out, grads)


def test_a_right_system_passes_with_its_errors():
    found = verdict(attend)
    assert found.failure == "" and not found.spoils
    assert list(found.errors) == ["rel_err", "rel_err_dq", "rel_err_dk", "rel_err_dv"]
    assert all(1e-4 < error < 5e-3 for error in found.errors.values())  # the rounding of bfloat16
    assert list(verdict(attend, "fwd").errors) == ["rel_err"]


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def _unwritten(q, k, v, causal):
    out = attend(q, k, v, causal)
    return torch.cat([out[:, :-1], out[:, -1:] * torch.nan], 1)


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        (lambda q, k, v, c: attend(q, -k, v, c), r"rel_err [\d.]+ is above its bound 0\.01"),
        (lambda q, k, v, c: attend(q, k, _WrongGradient.apply(v), c), r"rel_err_dv 0\.\d+ is above its bound 0\.03"),
        (_unwritten, "NaN, infinity or unwritten memory in output, dq, dk, dv"),
        (lambda q, k, v, c: attend(q, k, v, c).detach(), "carries no gradient"),
        (lambda q, k, v, c: attend(q, k, v, c)[:, 1:], "output of shape"),
    ],
)
def test_a_wrong_system_fails_with_the_reason(function, failure):
    assert re.search(failure, verdict(function).failure)


def test_each_system_has_its_own_bound():
    def coarse(q, k, v, causal):
        return attend(q, k, v, causal) * 1.04

    assert "above its bound" in verdict(coarse, "fwd").failure
    assert verdict(coarse, "fwd", systems.INT8).failure == ""


def test_poison_is_what_new_memory_holds(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "full_like", lambda x, value, **kw: made.append((x.shape, value, kw)))
    check.poison_free_memory(torch.empty(2, 3))
    assert [(tuple(shape), value != value) for shape, value, _ in made] == [((2, 3), True)] * 2
    assert made[1][2] == {"dtype": torch.float32}


# a run


def measure(monkeypatch, *known, **settings):
    monkeypatch.setattr(systems, "SYSTEMS", known)
    settings = {"cases": ("fwd 1x40x2x16", "fwd+bwd 1x40x2x16"), "quick": True, "device": "cpu", "seed": 1, **settings}
    return run.measure(Settings(**settings))


def test_a_run_reports_the_right_and_names_the_others(monkeypatch):
    def broken_load(machine):
        raise RuntimeError("no such\nlibrary")

    def absent(machine):
        raise peers.UnavailableError("not installed")

    def crashes(q, k, v, causal):
        raise RuntimeError("illegal instruction")

    report = measure(
        monkeypatch,
        system("right"),
        system("forward-only", trains=False),
        system("wrong", lambda q, k, v, c: attend(q, k, v, c) * 2),
        system("crashes", crashes),
        System("broken", broken_load, True, BF16),
        System("absent", absent, True, BF16),
    )
    found = {(r["case"], r["system"]): r for r in report.rows if r["metric"] == "tflops"}
    fwd, both = "fwd 1x40x2x16", "fwd+bwd 1x40x2x16"
    assert set(found) == {(fwd, "right"), (fwd, "forward-only"), (both, "right")}
    for row in report.rows:
        if row["metric"] == "ms":
            flops = cases.parse(row["case"]).flops
            assert found[row["case"], row["system"]]["value"] == pytest.approx(flops / row["value"] / 1e9, rel=1e-4)
            assert row["low"] <= row["value"] <= row["high"] and row["n"] >= 8
    metrics = {r["metric"] for r in report.rows if r["case"] == both and r["system"] == "right"}
    assert metrics == {"ms", "tflops", "rel_err", "rel_err_dq", "rel_err_dk", "rel_err_dv"}
    wrong = [r for r in report.rows if r["system"] == "wrong"]
    assert {r["metric"] for r in wrong if r["case"] == fwd} == {"rel_err"} and wrong[0]["value"] == pytest.approx(
        1, rel=0.01
    )
    for note in (
        "right: about right",
        "broken: not available: RuntimeError: no such library",
        "absent: not available: not installed",
        "fwd 1x40x2x16: crashes: no speed: RuntimeError: illegal instruction",
    ):
        assert note in report.notes
    assert any(n.startswith("fwd+bwd 1x40x2x16: wrong: no speed: rel_err 1 ") for n in report.notes)


def test_a_system_that_spoils_its_inputs_does_not_spoil_the_others(monkeypatch):
    seen = []

    def spoils(q, k, v, causal):
        k -= k.mean(1, keepdim=True)
        return attend(q, k, v, causal)

    def looks(q, k, v, causal):
        seen.append(k.float().mean(1).abs().mean().item())
        return attend(q, k, v, causal)

    report = measure(
        monkeypatch, system("spoils", spoils, False), system("looks", looks, False), cases=("fwd 1x40x2x16",)
    )
    assert "1x40x2x16: spoils changes its inputs in place; timed on copies" in report.notes
    assert {r["system"] for r in report.rows if r["metric"] == "ms"} == {"spoils", "looks"}
    assert min(seen) > 0.5 * OFFSET


def test_the_error_of_a_forward_is_a_mean_over_inputs(monkeypatch):
    seen = []

    def scaled(q, k, v, causal):
        seen.append(q[0, 0, 0, 0].item())
        return attend(q, k, v, causal) * (1 + 0.01 * len(set(seen)))

    report = measure(monkeypatch, system("scaled", scaled, bounds=systems.INT8), error_seeds=3)
    (row,) = [r for r in report.rows if r["metric"] == "rel_err" and r["case"].startswith("fwd 1x")]
    assert (row["low"], row["value"], row["high"]) == pytest.approx((0.01, 0.02, 0.03), rel=0.05) and row["n"] == 3
    (both,) = [r for r in report.rows if r["metric"] == "rel_err" and r["case"].startswith("fwd+bwd")]
    assert "n" not in both
    with pytest.raises(ValueError, match="error_seeds: 0 given"):
        Settings(error_seeds=0)


def test_a_system_of_some_shapes_runs_there_or_where_it_is_named(monkeypatch):
    some = System("some", lambda machine: (attend, "about"), True, BF16, ("1x40x2x16",))
    names = ("fwd 1x40x2x16", "fwd 1x41x2x16")
    report = measure(monkeypatch, system(), some, cases=names)
    assert {r["case"] for r in report.rows if r["system"] == "some"} == {names[0]}
    assert {r["case"] for r in report.rows if r["system"] == "right"} == set(names)
    report = measure(monkeypatch, system(), some, cases=names, systems=("some",))
    assert {r["case"] for r in report.rows if r["system"] == "some"} == set(names)


def test_what_does_not_fit_the_time_is_named(monkeypatch):
    report = measure(monkeypatch, system(), minutes=1e-9)
    assert report.rows == [] and report.notes[-1] == ("left out after 1e-09 minutes: fwd 1x40x2x16, fwd+bwd 1x40x2x16")


def test_a_case_too_large_is_left_out_and_the_next_runs(monkeypatch):
    real = run.make_input_sets

    def sets(shape, device, seed):
        if shape.length == 41:
            raise torch.OutOfMemoryError("no memory")
        return real(shape, device, seed)

    monkeypatch.setattr(run, "make_input_sets", sets)
    report = measure(monkeypatch, system(), cases=("fwd 1x41x2x16", "bwd 1x41x2x16", "fwd 1x40x2x16"))
    assert sum("left out: inputs and reference do not fit" in note for note in report.notes) == 2
    assert {r["case"] for r in report.rows} == {"fwd 1x40x2x16"}


def test_each_shape_is_judged_by_itself(monkeypatch):
    def fails_at_41(q, k, v, causal):
        return attend(q, k, v, causal) * (2 if q.shape[1] == 41 else 1)

    names = ("fwd+bwd 1x41x2x16", "fwd+bwd 1x40x2x16", "bwd 1x40x2x16 causal")
    report = measure(monkeypatch, system(function=fails_at_41), cases=names)
    assert [r["case"] for r in report.rows if r["metric"] == "ms"] == list(names[1:])
    assert [note for note in report.notes if "no speed" in note and names[0] in note]


def test_a_broken_gpu_ends_the_run_and_keeps_what_was_measured(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("an illegal memory access")

    runner = run.Runner(CPU, {}, run.Report(), 0, True)
    runner.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(run.BrokenContextError, match="broken after RuntimeError: an illegal memory access"):
        runner.attempt(broken)
    real = run.Runner.run

    def run_one(self, case):
        if case.mode == "fwd+bwd":
            raise run.BrokenContextError("the GPU is gone")
        real(self, case)

    monkeypatch.setattr(run.Runner, "run", run_one)
    report = measure(monkeypatch, system(), cases=("fwd 1x40x2x16", "fwd+bwd 1x40x2x16", "bwd 1x40x2x16"))
    assert "stopped: the GPU is gone; left out: bwd 1x40x2x16" in report.notes
    assert {r["case"] for r in report.rows} == {"fwd 1x40x2x16"}


def test_unknown_names_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="systems: 'fa9' is unknown; known are right"):
        measure(monkeypatch, system(), systems=("fa9",))
    with pytest.raises(ValueError, match=r"peer_folders: .* is no folder"):
        measure(monkeypatch, system(), peer_folders=(tmp_path / "none",))
    with pytest.raises(ValueError, match="minutes: 0 given"):
        Settings(minutes=0)


def test_published_systems_are_there_and_say_why_they_cannot_run_here():
    names = [s.name for s in systems.SYSTEMS]
    assert {"allears-int8fp8", "allears-sagebwd", "fa2", "cudnn", "flash-attn-4"} <= set(names)
    assert {"sageattention-2.2", "sageattention-1.0.6"} <= set(names)
    for name in ("fa2", "cudnn", "flash-attn-4", "sageattention-2.2"):
        with pytest.raises(peers.UnavailableError, match="CUDA GPU"):
            systems.select([name])[0].load(systems.Machine(CPU))


def test_our_exact_attention_passes_its_own_gate_and_tells_its_kernel():
    ours, about = systems.select(["allears-exact"])[0].load(systems.Machine(CPU))
    assert about.startswith("kernel ") and verdict(ours).failure == ""
    assert {shape for shapes in ours.ran().values() for shape in shapes.split(", ")} == {"1x50x2x16 with gradients"}


# timing


def test_timings_are_medians_of_alternating_rounds(monkeypatch):
    now = {"s": 0.0}
    order = []

    def call(name, seconds):
        def work(index):
            order.append(name)
            now["s"] += seconds

        return work

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now["s"]))
    first, second = timing.Stopwatch(CPU, round_s=5 / 64).time([call("a", 1 / 64), call("b", 1 / 512)])
    assert first == timing.Timing(1000 / 64, 1000 / 64, 1000 / 64, 10)  # two rounds of 5
    assert second == timing.Timing(1000 / 512, 1000 / 512, 1000 / 512, 80)
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns == ["a", "b", "a"]  # the second round runs b before a, right after b


def test_interval_of_the_median_by_ranks():
    found = timing.summarise(list(range(100, 0, -1)))
    assert found == timing.Timing(50.5, 41, 61, 100)
    assert timing.summarise([3.0]) == timing.Timing(3.0, 3.0, 3.0, 1)


# peers


def package(folder, version, answer, broken=False):
    inside = folder / "fakeattention"
    inside.mkdir(parents=True)
    (inside / "core.py").write_text(f"def answer():\n    return {answer}\n")
    (inside / "__init__.py").write_text("import nothing_of_that_name" if broken else "from .core import answer")
    info = folder / f"fakeattention-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fakeattention\nVersion: {version}\n")
    return folder


def test_two_versions_of_a_package_live_side_by_side(tmp_path):
    folders = [package(tmp_path / "one", "1.0.6", 1), package(tmp_path / "two", "2.2.0", 2)]
    path = list(sys.path)
    (one, version_one), (two, version_two) = (peers.load("fakeattention", major, folders) for major in "12")
    assert (version_one, one.answer(), version_two, two.answer()) == ("1.0.6", 1, "2.2.0", 2)
    assert not [name for name in sys.modules if name.startswith("fakeattention")] and sys.path == path
    with pytest.raises(peers.UnavailableError, match=r"fakeattention 3\.x is not installed \(found 1\.0\.6, 2\.2\.0\)"):
        peers.load("fakeattention", "3", folders)
    assert peers.sources(one) == peers.sources(one) != peers.sources(two)
    assert peers.sources(one).startswith("2 Python files of sha256 ")
    broken = package(tmp_path / "three", "3.0", 3, broken=True)
    with pytest.raises(peers.UnavailableError, match=r"fakeattention 3\.0 does not import: ModuleNotFoundError"):
        peers.load("fakeattention", "3", [broken])
    assert sys.path == path


# results, figure, table


def rows_of(lengths, mode="fwd", system="a", heads=2):
    return [
        results.row(f"{mode} {1024 // n}x{n}x{heads}x64", system, metric, value)
        for n in lengths
        for metric, value in (("tflops", 100.0 + n), ("rel_err", 0.01), ("rel_err_dq", 0.02))
    ]


def test_the_figure_shows_the_longest_series(tmp_path):
    rows = rows_of([512, 128, 256]) + rows_of([256, 512], heads=4) + rows_of([256], mode="bwd", system="b")
    rows += [results.row("fwd 1x1024x2x64", "wrong", "rel_err", 0.9)]  # not timed by anyone
    series, about = figure.longest_series(rows)
    assert series["fwd", "tflops"] == {"a": {128: 228.0, 256: 356.0, 512: 612.0}}
    assert list(series["fwd", "tflops"]["a"]) == [128, 256, 512]
    assert series["fwd", "rel_err"]["a"][256] == 0.01 and series["bwd", "rel_err_dq"] == {"b": {256: 0.02}}
    assert about == "1024 tokens, 2 heads of size 64"
    assert figure._modes(series) == ["fwd"]
    assert figure.draw(rows, tmp_path / "new" / "a.png", "a machine").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no case was timed"):
        figure.draw([results.row("fwd 1x8x1x8", "a", "rel_err", 0.5)], tmp_path / "b.png")


def test_the_table_puts_the_fastest_first():
    rows = [
        results.row("fwd 1x8x1x8", name, metric, value)
        for name, metric, value in (("wrong", "rel_err", 0.5), ("slow", "ms", 2.0), ("fast", "ms", 1.0))
    ]
    (shown,) = table.tables(rows)
    assert list(shown.columns[0].cells) == ["fast", "slow", "wrong"]
    assert list(shown.columns[1].cells) == ["1.000", "2.000", "-"]


def test_the_machine_names_its_gpu(monkeypatch):
    gpu = SimpleNamespace(name="Card X", total_memory=80e9, multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert f"Card X (80 GB, 132 SMs, sm_90), torch {torch.__version__}, CUDA" in results.machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "SMs" not in results.machine()


def test_the_repository_case_writes_json_and_png(monkeypatch, tmp_path, caplog):
    from benchmarks.registry import CASES, load_all

    load_all()
    monkeypatch.setattr(systems, "SYSTEMS", (system(),))
    settings = Settings(cases=("fwd 1x40x2x16",), quick=True, device="cpu", seed=1)
    with caplog.at_level(logging.WARNING):
        done = CASES["attention"](settings, name="try", results_folder=tmp_path, commit="abc").run()
    document = json.loads((tmp_path / "try.json").read_text())
    assert done == 0 and document["commit"] == "abc" and (tmp_path / "try.png").exists()
    assert {r["metric"] for r in document["rows"]} == {"rel_err", "ms", "tflops"}
    assert not caplog.records
