"""A Wan transformer is changed as the plan says, gives what the plan's errors say, and comes back to the bit.

Each runs on a stand-in with the interface of diffusers' classes, and on diffusers' own where it is installed.
"""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from wan_standin import IMAGE, Pipeline, call_of, make, run

from allears import turbo
from allears.nn.attention_processors import WanProcessor
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.wan.block import FusedWanBlock

needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="diffusers: pip install 'allears[hub]'")
KINDS = ["plain", pytest.param("diffusers", marks=needs_diffusers)]
NOTHING = {"attention": None, "linear": None, "norms": False}
SPARSE = turbo.Sparse(0.3, SparseLinear(block_q=64))
LONG = (3, 12, 20)  # 180 tokens: 3 key blocks


def relative(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_restored(model, state, call, wanted):
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(run(model, call), wanted)
    assert not any(isinstance(p, (FusedWanBlock, SparseLinearAttention)) for p in model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, IMAGE, {"cross_attn_norm": False}], ids=["text", "image", "no-cross-norm"])
def test_fused_blocks_are_the_same_but_for_rounding(kind, more):
    model = make(kind=kind, **more)
    call = call_of(model, batch=2)
    wanted, state = run(model, call), snapshot(model)
    plan = turbo.accelerate(model, turbo.TurboSpec(**{**NOTHING, "norms": True}))
    assert all(isinstance(block, FusedWanBlock) for block in model.blocks) and len(plan.replaced()) == 2
    assert relative(run(model, call), wanted) < 1e-5
    turbo.restore(model)
    assert_restored(model, state, call, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_blocks_take_a_time_for_each_token(kind):
    model = make(kind=kind)
    call = call_of(model)
    call["timestep"] = torch.linspace(0, 900, 45)[None]
    wanted = run(model, call)
    turbo.accelerate(model, turbo.TurboSpec(**{**NOTHING, "norms": True}))
    assert relative(run(model, call), wanted) < 1e-5


def test_fused_blocks_in_bfloat16_round_no_worse_than_the_stock():
    model = make()
    call = call_of(model)
    exact = run(model, call)
    model.bfloat16()
    call = {n: x if n == "timestep" else x.bfloat16() for n, x in call.items()}
    stock = relative(run(model, call), exact)
    turbo.accelerate(model, turbo.TurboSpec(**{**NOTHING, "norms": True}))
    assert 1e-4 < relative(run(model, call), exact) < 1.5 * stock


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("scheme", "most"), [("fp8_row", 0.06), ("int8_tile", 0.03), ("int8_row", 0.03)])
def test_linear_layers_in_8_bits(kind, norms, scheme, most):
    model = make(kind=kind, **IMAGE)
    call = call_of(model)
    wanted, state = run(model, call), snapshot(model)
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=None, linear=scheme, norms=norms), inputs=call)
    assert len(plan.replaced("linear")) == 24 and not any(type(p) is nn.Linear for p in model.blocks.modules())
    layers = [e.error for e in plan.errors if e.kind == "linear" and e.name]
    assert len(layers) == 24 and all(1e-3 < error < most for error in layers)
    whole = [e.error for e in plan.errors if not e.name]
    assert relative(run(model, call), wanted) == pytest.approx(whole[-1], rel=1e-4) and 1e-4 < whole[-1] < 0.1
    turbo.restore(model)
    assert_restored(model, state, call, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_all_together_with_sparse_attention(kind):
    model = make(kind=kind)
    call = call_of(model, LONG)
    wanted, state = run(model, call), snapshot(model)
    spec = turbo.TurboSpec(attention=SPARSE, linear="int8_row")
    plan = turbo.accelerate(model, spec, inputs=call, video=turbo.VideoSize(9, 96, 160))
    cores = [p for p in model.modules() if isinstance(p, SparseLinearAttention)]
    assert len(cores) == 2 and {i.name for i in plan.replaced("attention")} == {"blocks.0.attn1", "blocks.1.attn1"}
    assert all(1e-3 < e.error < 1 for e in plan.errors if e.kind == "attention")
    by_kind = {e.kind: e.error for e in plan.errors if not e.name}
    assert list(by_kind) == ["attention", "linear", "norms"]
    assert relative(run(model, call), wanted) == pytest.approx(by_kind["norms"], rel=1e-4)
    text = str(plan)
    assert "blocks.*.attn1 (2): WanAttention -> sla2 attention, 0.3 of the keys exact" in text
    assert "cross-attention" in text and "not fitted" in text and "about" in text and "at the peak" in text
    turbo.restore(model)
    assert_restored(model, state, call, wanted)


def test_the_error_of_an_attention_layer_is_what_the_layer_does():
    model = make()
    call, seen = call_of(model, LONG), []
    hook = model.blocks[0].attn1.register_forward_hook(lambda layer, args, out: seen.append(out))
    run(model, call)
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=SPARSE, linear=None, norms=False), inputs=call)
    seen = seen[:1]
    run(model, call)
    hook.remove()
    (first,) = [e.error for e in plan.errors if e.name == "blocks.0.attn1"]
    assert relative(seen[1], seen[0]) == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_layers_stay_and_are_named(kind):
    model = make(kind=kind)
    skip = ("blocks.0", "blocks.1.attn1.to_q", "blocks.1.attn2")
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=SPARSE, linear="int8_row", skip=skip))
    names = {item.name for item in plan.replaced()}
    assert names == {
        *(f"blocks.1.{n}" for n in ("attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")),
        "blocks.1.attn1",
        "blocks.1",
    }
    assert {i.reason for i in plan.items if i.name == "blocks.0.ffn.net.2"} == {"named in skip"}
    assert torch.isfinite(run(model, call_of(model, LONG))).all()
    assert "named in skip" in str(plan)


def test_a_name_is_not_the_beginning_of_a_longer_number():
    spec = turbo.TurboSpec(skip=("blocks.1",))
    assert spec.skips("blocks.1.attn1") and spec.skips("blocks.1") and not spec.skips("blocks.11.attn1")


@needs_diffusers
@pytest.mark.parametrize("norms", [False, True])
def test_projections_that_the_user_fused_stay_fused(norms):
    model = make(kind="diffusers", **IMAGE)
    call = call_of(model)
    wanted = run(model, call)
    model.fuse_qkv_projections()
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=None, linear="int8_row", norms=norms))
    replaced = {item.name for item in plan.replaced("linear")}
    assert "blocks.0.attn1.to_qkv" in replaced and "blocks.0.attn1.to_q" not in replaced
    assert "blocks.0.attn2.to_q" in replaced and "fused already" in str(plan)
    assert 1e-4 < relative(run(model, call), wanted) < 0.05
    turbo.restore(model)
    assert model.blocks[0].attn1.fused_projections and type(model.blocks[0].attn1.to_qkv) is nn.Linear


@needs_diffusers
def test_a_cached_block_and_a_strange_processor_stay_with_their_reason():
    model = make(kind="diffusers")
    model.blocks[0]._diffusers_hook = object()

    class Strange:
        pass

    model.blocks[1].attn1.set_processor(Strange())
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=SPARSE, linear=None))
    assert not plan.replaced()
    assert "1 of 4 attention layers have no counterpart here" in str(plan)


def test_originals_wait_stay_or_are_dropped():
    for originals in ("cpu", "stay", "drop"):
        model = make()
        spec = turbo.TurboSpec(attention=None, linear="int8_row", originals=originals)
        layer = model.blocks[0].attn1.to_q
        turbo.accelerate(model, spec)
        assert layer.weight.numel() == (0 if originals == "drop" else 32 * 32)
        if originals == "drop":
            with pytest.raises(ValueError, match="restore: the weights that 8-bit layers replaced were dropped"):
                turbo.restore(model)
        else:
            turbo.restore(model)


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    model = make()
    call = call_of(model)
    wanted, state = run(model, call), snapshot(model)
    import allears.turbo.changes as changes

    def fails(block):
        raise KeyError("in the middle")

    monkeypatch.setattr(changes, "FusedWanBlock", fails)
    with pytest.raises(KeyError, match="in the middle"):
        turbo.accelerate(model, turbo.TurboSpec(attention=SPARSE, linear="int8_row"))
    assert_restored(model, state, call, wanted)
    with pytest.raises(ValueError, match="not accelerated"):
        turbo.restore(model)


def test_what_cannot_be_accelerated_is_refused():
    with pytest.raises(ValueError, match="pipeline_or_model: Linear given; wanted diffusers' WanTransformer3DModel"):
        turbo.accelerate(nn.Linear(2, 2))
    model = make()
    pipeline = Pipeline(model, None)
    turbo.accelerate(pipeline, turbo.TurboSpec(**NOTHING))
    for owner in (pipeline, model):
        with pytest.raises(ValueError, match="accelerated already"):
            turbo.accelerate(owner)
    turbo.restore(model)
    with pytest.raises(ValueError, match="Pipeline: not accelerated"):
        turbo.restore(pipeline)
    with pytest.raises(ValueError, match=r"group: torch.distributed is not set up"):
        turbo.accelerate(model, group=())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("linear", "int4", "linear: 'int4' given"),
        ("originals", "gone", "originals: 'gone' given"),
        ("offload", "all", "offload: 'all' given"),
        ("skip", "blocks.0", r"skip: the text 'blocks.0' given; wanted a tuple"),
    ],
)
def test_specs_that_do_not_fit(field, value, message):
    with pytest.raises(ValueError, match=message):
        turbo.TurboSpec(**{field: value})
    with pytest.raises(ValueError, match="keep: 0 given"):
        turbo.Sparse(keep=0)


def test_training_through_a_fused_block_is_refused():
    model = make()
    turbo.accelerate(model, turbo.TurboSpec(**{**NOTHING, "norms": True}))
    call = call_of(model)
    call["hidden_states"].requires_grad_()
    with pytest.raises(ValueError, match=r"fused blocks have none; call turbo.restore to train"):
        model(**call)


def test_attention_of_a_checkpoint_with_slas_projections():
    model = make()
    eye = {"weight": 0.5 * torch.eye(16).bfloat16(), "bias": torch.zeros(16).bfloat16()}
    cores = turbo.sla_cores({"blocks.1.attn1": eye}, model, keep=0.34, options=SparseLinear(form="sla", block_q=64))
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=None, linear="int8_row", norms=True), cores=cores)
    assert {item.name for item in plan.replaced("attention")} == {"blocks.1.attn1"}
    assert type(model.blocks[1].attn1.sparse_core.proj) is nn.Linear, "the projection stays in 16 bits"
    assert torch.isfinite(run(model, call_of(model, LONG))).all()
    with pytest.raises(ValueError, match="form 'sparse' given"):
        turbo.sla_cores({"blocks.1.attn1": eye}, model, options=SparseLinear(form="sparse"))


def test_fitted_attention_is_read_from_its_file(tmp_path):
    from allears.turbo.sparse import SparseSettings, sparsify

    model = make()
    call = call_of(model, LONG)
    settings = SparseSettings(keeps=(0.34,), max_error=10.0, options=SparseLinear(block_q=64), steps=1)
    sparsify(model, [call], tmp_path / "fit", settings, call=run)
    fitted = turbo.Sparse(fitted=str(tmp_path / "fit"), options=SparseLinear(precision="exact"))
    plan = turbo.accelerate(model, turbo.TurboSpec(attention=fitted, linear=None, norms=True), inputs=call)
    replaced = {item.name for item in plan.replaced("attention")}
    assert replaced >= {"blocks.0.attn1", "blocks.1.attn1"} and not any("not fitted" in note for note in plan.notes)
    assert all(e.error < 1 for e in plan.errors if e.kind == "attention")


def test_dense_attention_runs_on_ours_where_fused_blocks_need_it():
    model = make()
    turbo.accelerate(model, turbo.TurboSpec(**{**NOTHING, "norms": True}))
    assert isinstance(model.blocks[0].attn1.processor, WanProcessor)
