"""The benchmark of sparse attention: names, exact samples, the gate by a system's own formula, what a run reports."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from allears.bench import results
from allears.bench.attention import peers as packages
from allears.bench.attention.inputs import Inputs, make_inputs
from allears.bench.attention.systems import BF16, Machine, System
from allears.bench.sparse import cases, figure, formula, peers, run, systems
from allears.bench.sparse.formula import Formula, router_gap, sample_gradients, sample_output
from allears.bench.sparse.settings import Settings
from allears.bench.sparse.systems import Prepared
from allears.cli.main import main
from allears.ops.attention.sparse_linear import SparseLinear, blocks_from_map

CPU = torch.device("cpu")


def textbook(q, k, v, picked, ratio, block_q=64, block_k=64):
    """SLA2 in float64, a head at a time: picked (B, H, N_q, N_k) bool, ratio (H,), feature map softmax."""
    share = q.shape[2] // k.shape[2]
    k_smooth = k - k.mean(1, keepdim=True)
    out = torch.empty_like(q)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        keys, smooth, values = (x[b, :, h // share] for x in (k, k_smooth, v))
        exact = picked[b, h].repeat_interleave(block_q, 0)[: q.shape[1]].repeat_interleave(block_k, 1)[:, : len(keys)]
        logits = q[b, :, h] @ keys.T * q.shape[-1] ** -0.5
        near = torch.where(exact, logits, -torch.inf).softmax(-1) @ values
        weights = (q[b, :, h].softmax(-1) @ smooth.softmax(-1).T) * ~exact
        far = weights @ values / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        mixed = ratio[h] * near + (1 - ratio[h]) * far
        out[b, :, h] = torch.where(exact.all(-1, keepdim=True), near, mixed)
    return out


def random_map(shape, keep, seed=0):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(shape, dtype=torch.bool).scatter_(-1, scores.topk(keep).indices, True)


# names


@pytest.mark.parametrize("name", ["fwd 1x32760x12x128 s0.97", "bwd 1x32760x12x128 s0.95", "fwd 1x75600x40x128 s0.90"])
def test_default_cases_are_named_as_published(name):
    case = cases.parse(name)
    assert case.name == name and case in cases.select(Settings().case_names)
    assert case.keep == pytest.approx(1 - float(name[-4:]), abs=1e-12)


def test_groups_and_single_cases_come_once():
    assert {c.mode for c in cases.GROUPS["video"]} == {"fwd", "bwd"} and len(cases.GROUPS["video"]) == 6
    assert {c.mode for c in cases.GROUPS["long"]} == {"fwd"} and len(cases.GROUPS["long"]) == 3
    shapes = [c.shape for c in cases.GROUPS["shapes"]]
    assert {s.head_dim for s in shapes} == {64, 128} and {s.kv_heads for s in shapes} == {4, 12}
    assert [s.causal for s in shapes] == [False, False, True, True, False, False]
    assert cases.select(["quick", cases.GROUPS["quick"][0].name]) == list(cases.GROUPS["quick"])
    assert cases.select(Settings(quick=True).case_names) == list(cases.GROUPS["quick"])


@pytest.mark.parametrize(
    "text", ["fwd 1x2x3x4", "fwd 1x2x3x4 s1", "fwd 1x2x3x4 s-0.1", "s0.5", "fwd 1x2x3x4 s0.5 causal"]
)
def test_what_is_no_case_is_refused(text):
    with pytest.raises(ValueError, match=r"^cases: "):
        cases.select([text])


# the exact samples


@pytest.mark.parametrize(("heads", "kv_heads", "length"), [(2, 2, 300), (4, 2, 193)])
def test_samples_equal_the_textbook(monkeypatch, heads, kv_heads, length):
    monkeypatch.setattr(formula, "_CHUNK_BYTES", 4 * length * 2 * 64)  # chunks of one or two query blocks
    shape = cases.parse(f"fwd 2x{length}x{heads}/{kv_heads}x16 s0.5").shape
    inputs = make_inputs(shape, CPU, seed=2)
    blocks = -(-length // 64)
    picked = random_map((2, heads, blocks, blocks), 2)
    ratio = torch.linspace(0.3, 0.8, heads, dtype=torch.float64)
    ours = Formula(blocks_from_map(picked), SparseLinear(block_q=64), ratio=ratio.float()[None, :, None])
    q, k, v = (x.double().requires_grad_() for x in inputs.copies())
    out = textbook(q, k, v, picked, ratio)
    grads = torch.autograd.grad(out, (q, k, v), inputs.grad.double())
    sample, gradients = sample_output(inputs, ours, seed=1), sample_gradients(inputs, ours, seed=1)
    assert {0, length - 1} <= set(sample.rows.tolist()) and len(sample.rows) > 128
    assert sample.rel_err(out.detach()) < 1e-5 and max(gradients.rel_errs(*grads).values()) < 1e-5
    assert sample.rel_err(1.01 * out.detach()) == pytest.approx(0.01, rel=1e-2)
    wrong = textbook(q, k, v, picked, ratio.flip(0)).detach()
    assert sample.rel_err(wrong) > 0.05


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_causal_samples_equal_attention_on_the_blocks_seen(monkeypatch, kv_heads):
    length = 200
    monkeypatch.setattr(formula, "_CHUNK_BYTES", 4 * length * 2 * 64)  # one or two query blocks at a time
    inputs = make_inputs(cases.parse(f"fwd 1x{length}x2/{kv_heads}x16 causal s0.5").shape, CPU, seed=2)
    picked = random_map((1, 2, 4, 4), 1).tril() | torch.eye(4, dtype=torch.bool)
    q, k, v = (x.double().requires_grad_() for x in inputs.copies())
    keys, values = (x.repeat_interleave(2 // kv_heads, 2) for x in (k, v))
    logits = torch.einsum("blhd,bmhd->bhlm", q, keys) / 4
    seen = picked.repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :length, :length]
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril()
    out = torch.einsum("bhlm,bmhd->blhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), values)
    grads = torch.autograd.grad(out, (q, k, v), inputs.grad.double())
    ours = Formula(blocks_from_map(picked), SparseLinear("sparse", block_q=64), causal=True)
    sample, gradients = sample_output(inputs, ours, seed=1), sample_gradients(inputs, ours, seed=1)
    assert sample.rel_err(out.detach()) < 1e-5 and max(gradients.rel_errs(*grads).values()) < 1e-5


def test_a_ratio_of_each_query_block_is_cut_like_the_blocks(monkeypatch):
    inputs = make_inputs(cases.parse("fwd 1x300x1x16 s0.5").shape, CPU, seed=2)
    blocks = blocks_from_map(random_map((1, 1, 5, 5), 2))
    of_blocks = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.5])[None, None]
    sample = sample_output(inputs, Formula(blocks, SparseLinear(block_q=64), ratio=of_blocks), seed=4)
    for share in (0.1, 0.5):
        even = sample_output(
            inputs, Formula(blocks, SparseLinear(block_q=64), ratio=torch.full((1, 1, 1), share)), seed=4
        )
        same = (sample.exact[0, 0] == even.exact[0, 0]).all(-1)
        rows = sample.rows[same]
        assert rows.numel() and set((rows // 64).tolist()) == {0 if share == 0.1 else 4}


def test_the_router_is_held_to_the_best_blocks():
    inputs = make_inputs(cases.parse("fwd 1x640x2x16 s0.8").shape, CPU, seed=5)
    generator = torch.Generator().manual_seed(0)
    proj_q, proj_k = (torch.randn(2, 16, 16, generator=generator) for _ in range(2))
    pooled_q, pooled_k = (x.float().unflatten(1, (-1, 64)).mean(2).transpose(1, 2) for x in (inputs.q, inputs.k))
    pooled_k = pooled_k - inputs.k.float().mean(1)[:, :, None]
    scores = (pooled_q @ proj_q) @ (pooled_k @ proj_k).transpose(-1, -2)

    def gap(picked, keep=0.2):
        chosen = Formula(blocks_from_map(picked), SparseLinear(block_q=64), router=(proj_q, proj_k), keep=keep)
        return router_gap(inputs, chosen)

    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2).indices, True)
    worst = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(2, largest=False).indices, True)
    assert gap(best) < 1e-5
    assert gap(worst) > 2 and 0.5 < gap(random_map(scores.shape, 2)) < gap(worst)
    assert gap(best, keep=0.3) == float("inf") == gap(best, keep=0.1)


def test_a_causal_router_is_held_to_the_best_of_what_is_seen():
    inputs = make_inputs(cases.parse("fwd 1x640x1x16 causal s0.8").shape, CPU, seed=5)
    pooled_q, pooled_k = (x.float().unflatten(1, (-1, 64)).mean(2).transpose(1, 2) for x in (inputs.q, inputs.k))
    scores = pooled_q @ pooled_k.transpose(-1, -2)
    eye, seen = torch.eye(16)[None], torch.ones(10, 10, dtype=torch.bool).tril()
    diagonal = torch.eye(10, dtype=torch.bool)

    def gap(sign):
        ranked = (sign * scores).masked_fill(~seen, -torch.inf).masked_fill(diagonal, torch.inf)
        order = ranked.argsort(-1, descending=True)
        counts = (seen.sum(-1) * 0.2 + 1e-4).long().clamp(min=1)
        picked = torch.zeros(scores.shape, dtype=torch.bool)
        for row, count in enumerate(counts.tolist()):
            picked[:, :, row, order[0, 0, row, :count]] = True
        chosen = Formula(blocks_from_map(picked), SparseLinear(block_q=64), router=(eye, eye), keep=0.2, causal=True)
        return router_gap(inputs, chosen)

    assert gap(1) < 1e-5 and gap(-1) > 0.3
    ahead = Formula(
        blocks_from_map((~seen | diagonal)[None, None]), SparseLinear(block_q=64), router=(eye, eye), causal=True
    )
    assert router_gap(inputs, ahead) == float("inf")


# a run


BLOCKS_OF_RUN = 3  # 150 rows in blocks of 64


def sparse_attend(q, k, v, picked, ratio):
    return textbook(q.double(), k.double(), v.double(), picked, ratio).to(q.dtype)


def stand_in(name="right", change=lambda out: out, trains=True, router=None, heads_first=False):
    """A system that knows its map and may be wrong."""
    picked, ratio = random_map((1, 2, BLOCKS_OF_RUN, BLOCKS_OF_RUN), 1), torch.tensor([0.4, 0.7])

    def make(case):
        assert case.keep == 0.4
        return Prepared(
            lambda q, k, v, causal: change(sparse_attend(q, k, v, picked, ratio)),
            lambda q, k: Formula(
                blocks_from_map(picked),
                SparseLinear(block_q=64),
                ratio=ratio[None, :, None],
                router=router,
                keep=case.keep,
            ),
            heads_first,
        )

    return System(name, lambda machine: (make, f"about {name}"), trains, systems.SPARSE)


def dense(name="fa2", change=lambda out: out):
    def attend(q, k, v, causal):
        logits = torch.einsum("blhd,bmhd->bhlm", q.double(), k.double()) / q.shape[-1] ** 0.5
        return change(torch.einsum("bhlm,bmhd->blhd", logits.softmax(-1), v.double()).to(q.dtype))

    return System(name, lambda machine: (lambda case: Prepared(attend), f"about {name}"), True, BF16)


FWD, BWD = "fwd 1x150x2x16 s0.60", "bwd 1x150x2x16 s0.60"


def measure(monkeypatch, *known, **settings):
    monkeypatch.setattr(systems, "SYSTEMS", known)
    return run.measure(Settings(**{"cases": (FWD, BWD), "quick": True, "device": "cpu", "seed": 1, **settings}))


def test_a_run_reports_the_right_and_names_the_others(monkeypatch):
    eye = torch.eye(16).repeat(2, 1, 1)
    report = measure(
        monkeypatch,
        dense(),
        dense("wrong-dense", lambda out: out * 1.1),
        stand_in(),
        stand_in("forward-only", trains=False),
        stand_in("wrong", lambda out: out * 1.05),
        stand_in("wrong-router", router=(eye, eye)),
    )
    timed = {(r["case"], r["system"]): r["value"] for r in report.rows if r["metric"] == "ms"}
    assert set(timed) == {(FWD, "fa2"), (FWD, "right"), (FWD, "forward-only"), (BWD, "fa2"), (BWD, "right")}
    for row in report.rows:
        if row["metric"] == "speedup":
            ms = timed[row["case"], row["system"]]
            assert row["value"] == pytest.approx(timed[row["case"], "fa2"] / ms, rel=1e-4)
    metrics = {r["metric"] for r in report.rows if (r["case"], r["system"]) == (BWD, "right")}
    assert metrics == {"ms", "speedup", "rel_err", "rel_err_dq", "rel_err_dk", "rel_err_dv"}
    errors = [r["value"] for r in report.rows if r["system"] in ("fa2", "right") and r["metric"].startswith("rel_err")]
    assert all(1e-4 < error < 5e-3 for error in errors)  # the rounding of bfloat16
    notes = "\n".join(report.notes)
    assert f"{FWD}: wrong: no speed: rel_err 0.05" in notes and f"{FWD}: wrong-dense: no speed: rel_err 0.1" in notes
    assert f"{FWD}: wrong-router: no speed: its router's blocks fall short of the best by" in notes
    assert "right: about right" in report.notes and "forward-only" not in "".join(n for n in report.notes if BWD in n)


def test_a_system_that_cannot_be_made_is_named(monkeypatch):
    def make(case):
        raise packages.UnavailableError("not for this shape")

    known = System("odd", lambda machine: (make, "about odd"), True, BF16)
    report = measure(monkeypatch, known, stand_in())
    assert f"{FWD}: odd: no speed: UnavailableError: not for this shape" in report.notes
    assert {r["system"] for r in report.rows} == {"right"}


def test_memory_is_told_over_dense_flash_attention(monkeypatch):
    peaks = iter([1000, 400, 1000, 1600])  # right: forward; flash: forward; the same with backward
    monkeypatch.setattr(run, "peak_bytes", lambda call, device: next(peaks))
    flash = System("fa2", lambda machine: (lambda q, k, v, causal: q + k + v, ""), True, BF16)
    monkeypatch.setattr(run.dense, "SYSTEMS", (flash,))
    report = measure(monkeypatch, stand_in())
    found = {r["case"]: r["value"] for r in report.rows if r["metric"] == "extra_memory_frac"}
    size = 3 * 150 * 2 * 16 * 2
    assert found == pytest.approx({FWD: 600 / size, BWD: -600 / size}, rel=1e-4)


# the peers


class FakeSLA(torch.nn.Module):
    """Takes (B, H, L, D), as the published modules do."""

    def __init__(self, keep, block_q, block_k):
        super().__init__()
        self.proj_l = torch.nn.Linear(1, 1)
        self.keep, self.blocks, self.seen = keep, (block_q, block_k), []

    def forward(self, q, k, v):
        self.seen.append((q.shape, q.is_contiguous() and k.is_contiguous() and v.is_contiguous()))
        picked = get_block_map(q, k, self.keep, *self.blocks)[0].bool()
        turned = (x.double().transpose(1, 2) for x in (q, k, v))
        ones = torch.ones(q.shape[1], dtype=torch.float64)
        return textbook(*turned, picked, ones, *self.blocks).transpose(1, 2).to(q.dtype)


def get_block_map(q, k, topk_ratio, BLKQ, BLKK):
    pooled = [torch.stack([part.float().mean(2) for part in x.split(size, 2)], 2) for x, size in ((q, BLKQ), (k, BLKK))]
    scores = pooled[0] @ pooled[1].transpose(-1, -2)
    count = max(1, int(topk_ratio * scores.shape[-1]))
    picked = torch.zeros(scores.shape, dtype=torch.int8).scatter_(-1, scores.topk(count).indices, 1)
    return picked, None, count


class FakeSparge:
    """SpargeAttn's function and its map, which knows k and its mean apart."""

    def __init__(self, blocks):
        self.blocks, self.utils = blocks, SimpleNamespace(get_block_map_meansim_fuse_quant=self.map)

    def map(self, q, k, mean, simthreshd1, cdfthreshd, topk, BLKQ, BLKK):
        assert simthreshd1 < 0 and cdfthreshd is None and self.blocks == (BLKQ, BLKK)
        return (get_block_map(q, k - mean, topk, BLKQ, BLKK)[0].bool(), "quantised")

    def spas_sage2_attn_meansim_topk_cuda(self, q, k, v, topk):
        picked = self.map(q, k, k.mean(-2, keepdim=True), -0.1, None, topk, *self.blocks)[0]
        turned = (x.double().transpose(1, 2) for x in (q, k, v))
        return textbook(*turned, picked, torch.ones(q.shape[1]).double(), *self.blocks).transpose(1, 2).to(q.dtype)


def test_spargeattn_is_held_to_its_own_map_and_to_calls_that_it_has(monkeypatch):
    make = peers.sparge_maker(FakeSparge((64, 128)), (64, 128))
    known = System("peer", lambda machine: (lambda case: Prepared(*make(case), heads_first=True), "peer"), False, BF16)
    names = ("fwd 1x450x2x16 s0.50", "fwd 1x450x2x16 causal s0.50", "fwd 1x450x2/1x16 s0.50")
    report = measure(monkeypatch, known, cases=names)
    assert {(r["case"], r["metric"]) for r in report.rows} == {(names[0], "rel_err"), (names[0], "ms")}
    refused = [note for note in report.notes if "it has neither causal calls that mask by key nor" in note]
    assert [note.partition(": ")[0] for note in refused] == list(names[1:])


@pytest.mark.parametrize("blocks", [(64, 64), (64, 128)])
def test_a_peer_is_held_to_its_own_map_and_timed_in_its_own_layout(monkeypatch, blocks):
    made = []

    def new(case):
        made.append(FakeSLA(case.keep, *blocks))
        return made[-1]

    package = SimpleNamespace(utils=SimpleNamespace(get_block_map=get_block_map))
    make = peers.maker(new, package, blocks, CPU)
    known = System("peer", lambda machine: (lambda case: Prepared(*make(case), heads_first=True), "peer"), False, BF16)
    report = measure(monkeypatch, known, cases=("fwd 1x450x2x16 s0.50",))
    assert {r["metric"] for r in report.rows} == {"rel_err", "ms"}
    (module,) = made
    assert {shape for shape, _ in module.seen} == {torch.Size((1, 2, 450, 16))}
    check, *timed = (lies for _, lies in module.seen)
    assert not check and len(timed) > 8 and all(timed)


def test_published_systems_are_there_and_say_why_they_cannot_run_here():
    names = [s.name for s in systems.SYSTEMS]
    assert names == [
        "allears-sla2",
        "allears-sla2-int8fp8",
        "allears-sla2-int8fp8-graph",
        "allears-sla",
        "allears-sparse",
        "allears-sparse-int8fp8",
        "fa2",
        "cudnn",
        "sla-triton",
        "sagesla",
        "spargeattn",
    ]
    for name in (names[2], *names[6:]):
        with pytest.raises(packages.UnavailableError, match="CUDA GPU"):
            systems.select([name])[0].load(Machine(CPU))
    with pytest.raises(ValueError, match="systems: 'sla9' is unknown; known are allears-sla2, "):
        systems.select(["sla9"])


# ours


def test_our_modules_pass_their_own_gate_and_tell_their_kernel(monkeypatch):
    ours = ("allears-sla2", "allears-sla2-int8fp8", "allears-sla", "allears-sparse")
    names = ("bwd 1x200x2x32 s0.50", "bwd 1x300x2/1x16 causal s0.50")
    settings = Settings(cases=names, systems=ours, quick=True, device="cpu", seed=3)
    report = run.measure(settings)
    timed = {(r["case"], r["system"]) for r in report.rows if r["metric"] == "ms"}
    assert timed == set(itertools.product(names, ours)), report.notes
    assert [n for n in report.notes if n.startswith("allears-sparse: kernel ") and "1x300x2/1x16 causal with" in n]
    assert any(
        note.startswith("allears-sla2: kernel ") and "1x200x2x32 with gradients" in note for note in report.notes
    )


def test_our_modules_have_no_trivial_parameters():
    case = cases.parse("fwd 1x200x2x32 s0.50")
    make, _ = systems.select(["allears-sla2"])[0].load(Machine(CPU))
    module = make.module(case)
    assert (module.router.proj_q - torch.eye(32)).norm() > 1 and module.ratio().flatten().unique().numel() == 2
    again = make.module(case)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    sla = systems.select(["allears-sla"])[0].load(Machine(CPU))[0].module(case)
    assert sla.proj.weight.norm() > 1 and sla.proj.bias.norm() > 0


# figure and front ends


def test_the_figure_has_a_panel_for_each_direction_and_shape(tmp_path):
    rows = [
        results.row(f"{mode} 1x8x1x8 s{sparsity:.2f}", name, "ms", value)
        for mode, value in (("fwd", 1.0), ("bwd", 3.0))
        for sparsity in (0.97, 0.9)
        for name in ("allears-sla2", "fa2")
    ]
    rows += [results.row("fwd 1x16x1x8 s0.90", "fa2", "rel_err", 0.9)]  # not timed by anyone
    shown = figure.panels(rows)
    assert list(shown) == ["forward, 1x8x1x8", "backward, 1x8x1x8"]
    assert list(shown["backward, 1x8x1x8"]["fa2"].items()) == [(0.9, 3.0), (0.97, 3.0)]
    assert figure.draw(rows, tmp_path / "new" / "a.png", "a machine").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no case was timed"):
        figure.draw(rows[-1:], tmp_path / "b.png")


def test_the_repository_case_and_the_verb_write_json_and_png(monkeypatch, tmp_path):
    from benchmarks.registry import CASES, load_all

    load_all()
    monkeypatch.setattr(systems, "SYSTEMS", (stand_in(),))
    settings = Settings(cases=(FWD,), quick=True, device="cpu", seed=1)
    assert CASES["sparse_attention"](settings, results_folder=tmp_path, commit="abc").run() == 0
    document = json.loads((tmp_path / "sparse_attention.json").read_text())
    assert document["commit"] == "abc" and (tmp_path / "sparse_attention.png").exists()
    assert {(r["case"], r["metric"]) for r in document["rows"]} == {(FWD, "rel_err"), (FWD, "ms")}
    arguments = ["bench", "sparse", "--cases", FWD, "--quick", "--device", "cpu", "--out", str(tmp_path / "cli")]
    assert main(arguments) == 0
    document = json.loads((tmp_path / "cli" / "sparse_attention.json").read_text())
    assert document["rows"] and document["commit"].startswith("allears ")


def test_inputs_are_laid_out_heads_first_without_changing_them():
    inputs = make_inputs(cases.parse(FWD).shape, CPU, seed=1)
    turned = run._heads_first(inputs)
    assert isinstance(turned, Inputs) and inputs.equal(turned.q, turned.k, turned.v)
    assert torch.equal(turned.grad, inputs.grad) and turned.grad.transpose(1, 2).is_contiguous()
