import json
import sys

import pytest
import torch
from tests.small_models import small_llama
from torch import nn

from allears.core.errors import WeightsError
from allears.nn.attention import CrossAttention, SelfAttention
from allears.ops.attention import AttentionSpec, attention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.sparse import Recording, SparseSettings, apply, read_reports, record, sparsify
from allears.turbo.sparse.fit import dense

SETTINGS = SparseSettings(
    keeps=(0.15, 0.3), max_error=1.5, options=SparseLinear(block_q=64), steps=6, query_blocks=2, ratio_of_query=False
)


class Layers(nn.Module):
    """Self-attention, masked self-attention, and a look at a short context."""

    def __init__(self):
        super().__init__()
        self.first = SelfAttention(16, 2)
        self.masked = SelfAttention(16, 2, rope=False)
        self.cross = CrossAttention(16, 2)

    def forward(self, x, context):
        x = x + self.first(x)
        x = x + self.masked(x, torch.ones(x.shape[1], x.shape[1], dtype=torch.bool))
        return x + self.cross(x, context)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Layers().eval().requires_grad_(False)


def batches(count=3, length=450):
    draws = torch.Generator().manual_seed(1)
    return [
        (torch.randn(2, length, 16, generator=draws), torch.randn(2, 20, 16, generator=draws)) for _ in range(count)
    ]


def test_what_is_recorded_gives_the_layers_output(model):
    seen = {}
    model.first.out.register_forward_pre_hook(lambda _, given: seen.setdefault("rows", []).append(given[0]))
    events = []
    found = record(model, batches(), samples=6, on_progress=events.append)
    facts = found.layers["first"]
    assert (facts.heads, facts.head_dim, facts.causal, facts.seen, facts.kept) == (2, 8, False, 6, 6)
    outputs = torch.cat(seen["rows"])
    for row, sample in enumerate(found.samples("first")):
        q, k, v = (x[None] for x in sample)
        torch.testing.assert_close(attention(q, k, v).flatten(2)[0], outputs[row], atol=1e-6, rtol=1e-5)
    assert found.layers["masked"].dense_because == "it attends with a mask" and found.samples("masked") == []
    assert found.samples("cross")[0].k.shape == (20, 2, 8)
    assert [event.done for event in events] == [1, 2, 3] and model.first.core is None


def test_memory_is_bounded_and_the_draw_is_even(model, tmp_path):
    """Of 12 sequences 3 are kept; which, changes with the seed; on disk they are the same as in memory."""
    held = record(model, batches(6, 64), samples=3, seed=4)
    written = record(model, batches(6, 64), samples=3, seed=4, folder=tmp_path)
    assert held.layers == written.layers and held.layers["first"].seen == 12 and held.layers["first"].kept == 3
    for a, b in zip(held.samples("first"), written.samples("first"), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(list((tmp_path / "first").iterdir())) == 3
    again = record(model, [], samples=3, folder=tmp_path)  # finished: nothing runs
    assert again.layers == held.layers
    picks = set()
    for seed in range(40):
        rows = record(model, batches(6, 64), samples=3, seed=seed).samples("first")
        everyone = record(model, batches(6, 64), samples=12).samples("first")
        picks |= {i for row in rows for i, other in enumerate(everyone) if torch.equal(row.q, other.q)}
        if len(picks) == 12:
            break
    assert picks == set(range(12))
    with pytest.raises(WeightsError, match="not there or not finished"):
        Recording.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no attention layer ran"):
        record(model, [])
    with pytest.raises(ValueError, match="samples: 0 given"):
        record(model, batches(1), samples=0)


def test_a_model_is_made_sparse_and_dense_again(model, tmp_path):
    x, context = batches(1)[0]
    before = model(x, context)
    reports = sparsify(model, batches(), tmp_path / "toy-sparse", SETTINGS, samples=4)
    assert torch.equal(model(x, context), before)  # fitting changes nothing
    by_name = {report.name: report for report in reports}
    assert by_name["first"].keep is not None and by_name["first"].trials[-1].error <= 1.5
    assert by_name["masked"].reason == "it attends with a mask"
    assert by_name["cross"].reason.startswith("too short")
    record_json = json.loads((tmp_path / "toy-sparse.json").read_text())
    assert record_json["layers"]["first"]["trials"][-1]["mass"] == by_name["first"].trials[-1].mass
    assert read_reports(tmp_path / "toy-sparse") == reports
    installed = apply(model, tmp_path / "toy-sparse")
    assert list(installed.cores) == ["first"] and model.first.core is installed.cores["first"]
    core = installed.cores["first"]
    q, k, v = (part.detach() for part in model.first._project(x, 0))
    error = float((core(q, k, v).detach() - dense(core, q, k, v)).norm() / dense(core, q, k, v).norm())
    assert error == pytest.approx(by_name["first"].trials[-1].error, rel=0.3) and error > 1e-3
    assert not torch.equal(model(x, context), before)
    assert "first.core.ratio.logit" in model.state_dict()
    with pytest.raises(ValueError, match="layer 'first' has a core already"):
        apply(model, tmp_path / "toy-sparse")
    with pytest.raises(ValueError, match="layer 'first' has a core"):
        record(model, batches(1))
    installed.restore()
    installed.restore()
    assert torch.equal(model(x, context), before) and model.masked.core is None
    with apply(model, tmp_path / "toy-sparse", precision="int8_fp8", backward="matched") as low:
        assert low.cores["first"].options.precision == "int8_fp8"
        low.set_stage("soft")
        assert low.cores["first"].router.proj_q.requires_grad
    assert torch.equal(model(x, context), before)
    with pytest.raises(ValueError, match="block_q: given, but the layers were fitted"):
        apply(model, tmp_path / "toy-sparse", block_q=128)


def test_an_interrupted_call_goes_on_after_the_finished_layers(model, tmp_path, monkeypatch):
    module = sys.modules["allears.turbo.sparse.sparsify"]
    plain, fitted = module.search_layer, []

    def counted(name, *rest):
        if name == "cross" and "cross" not in fitted:
            fitted.append(name)
            raise KeyboardInterrupt
        fitted.append(name)
        return plain(name, *rest)

    monkeypatch.setattr(module, "search_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, batches(), tmp_path / "toy", SETTINGS, samples=4)
    assert not (tmp_path / "toy.json").exists()
    events = []
    reports = sparsify(model, batches(), tmp_path / "toy", SETTINGS, samples=4, on_progress=events.append)
    assert fitted == ["first", "masked", "cross", "cross"]
    assert events[-1].done == events[-1].total == 3 and events[-1].message == "cross: stays dense"
    unbroken = sparsify(model, batches(), tmp_path / "whole", SETTINGS, samples=4)
    assert [report.trials for report in reports] == [report.trials for report in unbroken]
    other = SparseSettings(keeps=(0.5,), steps=1)
    with pytest.raises(ValueError, match="was fitted with other settings"):
        sparsify(model, batches(), tmp_path / "toy", other, samples=4)


def test_models_that_do_not_fit_are_refused(model, tmp_path):
    sparsify(model, batches(), tmp_path / "toy", SETTINGS, samples=2)
    other = nn.ModuleDict({"second": SelfAttention(16, 2)})
    with pytest.raises(WeightsError, match="ModuleDict has no attention layer 'first'"):
        apply(other, tmp_path / "toy")
    with pytest.raises(WeightsError, match=r"layer 'first' has \(H, G, D\) = \(4, 4, 4\)"):
        apply(nn.ModuleDict({"first": SelfAttention(16, 4)}), tmp_path / "toy")
    with pytest.raises(ValueError, match="Linear has no hook for attention"):
        record(nn.Linear(2, 2), [torch.zeros(2)])


def test_a_transformers_model(tmp_path):
    """Grouped causal heads; the cores are submodules, and the model is itself again afterwards."""
    model = small_llama().requires_grad_(False)
    tokens = torch.randint(50, (2, 400))
    before = model(tokens).logits
    settings = SparseSettings(keeps=(0.3,), max_error=2.0, options=SparseLinear(block_q=64), steps=2, query_blocks=2)
    reports = sparsify(model, [tokens], tmp_path / "llama", settings, samples=2)
    assert [r.name for r in reports] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    found = json.loads((tmp_path / "llama.json").read_text())["layers"]["model.layers.0.self_attn"]["facts"]
    assert (found["heads"], found["kv_heads"], found["causal"]) == (4, 2, True)
    with apply(model, tmp_path / "llama"):
        sparse = model(tokens).logits
        torch.testing.assert_close(sparse[:, :64], before[:, :64], atol=1e-4, rtol=1e-3)  # one block: nothing to leave
        assert (sparse - before).abs().max() > 1e-3
        assert "model.layers.0.self_attn.sparse_core.ratio.logit" in model.state_dict()
    assert torch.equal(model(tokens).logits, before) and not any("core" in name for name in model.state_dict())


def test_a_diffusers_model(tmp_path):
    processors = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    layer = processors.Attention(query_dim=16, heads=2, dim_head=8)
    model = nn.ModuleDict({"a": layer})
    model.forward = lambda x: x + layer(x)
    x = torch.randn(2, 450, 16)
    before = model(x)
    sparsify(model, [x], tmp_path / "dit", SparseSettings(keeps=(0.3,), max_error=2.0, steps=2), samples=2)
    with apply(model, tmp_path / "dit") as installed:
        assert list(installed.cores) == ["a"] and (model(x) - before).abs().max() > 1e-4
    torch.testing.assert_close(model(x), before)


def test_specs_of_the_model_are_kept(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(SelfAttention(16, 2, spec=AttentionSpec(scale=0.7), causal=True))
    facts = record(model, [torch.randn(1, 100, 16)]).layers["0"]
    assert facts.causal and facts.scale == 0.7
