"""Every low-bit numerics through the door: errors against exact attention, gradients, refusals, compile, autocast,
checkpoints; and the GPU kernels against the references.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed T tokens.
"""

import math
import os

import pytest
import torch
from tests.ops.lowbit.plain_autograd import fake_quantised_attention, sagebwd_attention
from tests.ops.lowbit.textbook import dense, inputs, rel
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from allears import AttentionSpec, attention, explain
from allears.ops.attention import LowBit, backends, dispatch
from allears.ops.attention.call import Facts
from allears.ops.attention.lowbit import ops_reference, ops_sagebwd_reference
from allears.ops.attention.lowbit.backends import BACKENDS

# Relative L2 of the output, and of dQ, dK, dV; q and k Gaussian of deviation 1 with a channel offset in k.
ERRORS = {"int8_fp8": 0.045, "int8_fp16": 0.015, "sagebwd": 0.025, "nvfp4": 0.21}
GRADIENT_ERRORS = {"int8_fp8": 0.06, "sagebwd": 0.05, "nvfp4": 0.4}
TRAINED = {"int8_fp8": LowBit(backward="matched"), "sagebwd": LowBit(), "nvfp4": LowBit(backward="matched")}
NUMERICS = tuple(BACKENDS)


@pytest.fixture(autouse=True)
def one_thread_and_no_choices(monkeypatch):
    """Choices are kept; TRITON_INTERPRET changes them."""
    monkeypatch.setattr(dispatch, "_decisions", {})
    torch.manual_seed(0)


def spec_of(numerics, kernel="auto", causal=False, **how):
    options = how.pop("lowbit", TRAINED.get(numerics, LowBit()))
    return AttentionSpec(kernel, causal, numerics=numerics, lowbit=options, **how)


def leaves_of(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "size", "causal"),
    [(1, 1, 1, 1, 16, False), (63, 300, 4, 2, 64, True), (140, 100, 2, 1, 40, True), (100, 130, 2, 2, 128, False)],
)
def test_close_to_exact_attention(numerics, queries, keys, heads, groups, size, causal):
    q, k, v = inputs(queries, keys, heads, groups, size, batch=2, dtype=torch.bfloat16)
    kept = [x.clone() for x in (q, k, v)]
    out, lse = attention(q, k, v, spec_of(numerics, causal=causal), return_lse=True)
    wanted, wanted_lse = dense(q, k, v, causal)
    assert out.dtype == q.dtype and out.shape == q.shape and lse.dtype == torch.float32
    assert rel(out, wanted) < ERRORS[numerics]
    torch.testing.assert_close(lse.double(), wanted_lse, atol=0.4 if numerics == "nvfp4" else 0.05, rtol=0)
    assert torch.equal(out, attention(q, k, v, spec_of(numerics, causal=causal)))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize("numerics", TRAINED)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_close_to_exact_ones(numerics, causal):
    q, k, v = inputs(150, 140, heads=4, groups=2, size=32, batch=2)
    d_out, d_lse = torch.randn_like(q), torch.randn(2, 4, 150)
    leaves = leaves_of(q, k, v)
    results = attention(*leaves, spec_of(numerics, causal=causal), return_lse=True)
    got = torch.autograd.grad(results, leaves, (d_out, d_lse))
    _, _, wanted = dense(q, k, v, causal, d_out=d_out, d_lse=d_lse)
    for a, b in zip(got, wanted, strict=True):
        assert rel(a, b) < GRADIENT_ERRORS[numerics]


def reference_of(numerics, options):
    if numerics == "sagebwd":
        return lambda *x, **how: sagebwd_attention(*x, options=options, **how)
    return lambda *x, **how: fake_quantised_attention(*x, numerics=numerics, options=options, **how)


@pytest.mark.parametrize(
    ("numerics", "options"),
    [
        ("sagebwd", LowBit(grad_scales="tile")),
        ("sagebwd", LowBit(smooth_k=False)),
        ("sagebwd", LowBit(smooth_q=True)),
        ("int8_fp8", LowBit(backward="drop_in", smooth_q=True)),
        ("nvfp4", LowBit(backward="drop_in")),
        ("nvfp4", LowBit(backward="matched", smooth_q=False, two_level_p=False)),
    ],
)
@pytest.mark.parametrize("used", [(1, 0), (0, 1), (1, 1)])
def test_options_and_both_results_reach_the_reference(numerics, options, used):
    q, k, v = inputs(70, 140, heads=4, groups=2)
    weights = [w * on for w, on in zip((torch.randn_like(q), torch.randn(1, 4, 70)), used, strict=True)]
    spec = spec_of(numerics, "reference", causal=True, scale=0.3, lowbit=options)

    def run(function):
        leaves = leaves_of(q, k, v)
        results = function(*leaves)
        loss = sum((x * w).sum() for x, w, on in zip(results, weights, used, strict=True) if on)
        return results, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    got, wanted = (
        run(lambda *x: attention(*x, spec, return_lse=True)),
        run(lambda *x: reference_of(numerics, options)(*x, causal=True, scale=0.3)),
    )
    for a, b in zip((*got[0], *got[1]), (*wanted[0], *wanted[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("numerics", NUMERICS)
def test_packed_sequences_run_one_by_one(numerics):
    """Among them an empty one, one without keys, and one with more queries than keys."""
    ends_q, ends_k = [0, 5, 5, 8, 41], [0, 140, 143, 143, 163]
    q, k, v = (x[0] for x in inputs(41, 163, heads=4, groups=2))
    offsets = {"cu_seqlens_q": torch.tensor(ends_q).int(), "cu_seqlens_k": torch.tensor(ends_k).int()}
    spec = spec_of(numerics, causal=True)
    leaves = leaves_of(q, k, v)
    with torch.set_grad_enabled(numerics in TRAINED):
        out, lse = attention(*leaves, spec, **offsets, return_lse=True)
    assert out.shape == q.shape and lse.shape == (4, 41)
    singles, grads = [], [torch.zeros_like(x) for x in leaves]
    d_out, d_lse = torch.randn_like(q), torch.randn(4, 41)
    for i in range(4):
        of_q, of_k = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        alone = leaves_of(q[None, of_q], k[None, of_k], v[None, of_k])
        with torch.set_grad_enabled(numerics in TRAINED):
            singles.append(attention(*alone, spec, return_lse=True))
        if numerics in TRAINED:
            found = torch.autograd.grad(singles[-1], alone, (d_out[None, of_q], d_lse[None, :, of_q]))
            for grad, part, place in zip(grads, found, (of_q, of_k, of_k), strict=True):
                grad[place] = part[0]
    assert torch.equal(out, torch.cat([x[0][0] for x in singles]))
    assert torch.equal(lse, torch.cat([x[1][0] for x in singles], dim=1))
    assert not out[5:8].any() and lse[:, 5:8].eq(-math.inf).all()
    if numerics in TRAINED:
        got = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
        assert all(torch.equal(a, b) for a, b in zip(got, grads, strict=True))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_compiles_whole_with_its_gradient(numerics):
    q, k, v = inputs(40, 140, heads=4, groups=2, dtype=torch.bfloat16)
    spec = spec_of(numerics, causal=True)
    compiled = torch.compile(lambda *x: attention(*x, spec, return_lse=True), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(q, k, v), attention(q, k, v, spec, return_lse=True), strict=True):
            assert torch.equal(a, b)
    if numerics in TRAINED:
        made, wanted = (
            torch.autograd.grad((x := f(*(leaves := leaves_of(q, k, v))))[0].square().sum() + x[1].sum(), leaves)
            for f in (compiled, lambda *x: attention(*x, spec, return_lse=True))
        )
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


def test_packed_sequences_compile_whole():
    q, k, v = (x[0] for x in inputs(41, 163, heads=4, groups=2))
    packing = {
        "cu_seqlens_q": torch.tensor([0, 8, 41]).int(),
        "cu_seqlens_k": torch.tensor([0, 143, 163]).int(),
        "max_seqlen_q": 33,
        "max_seqlen_k": 143,
    }
    compiled = torch.compile(
        lambda *x: attention(*x, spec_of("sagebwd"), **packing), fullgraph=True, backend="aot_eager"
    )
    made, wanted = (
        torch.autograd.grad(f(*(leaves := leaves_of(q, k, v))).square().sum(), leaves)
        for f in (compiled, lambda *x: attention(*x, spec_of("sagebwd"), **packing))
    )
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_autocast_narrows_the_inputs_and_nothing_inside(numerics):
    q, k, v = inputs(40, 140, heads=4, groups=2)
    spec = spec_of(numerics)
    narrow = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(q, k, v, spec, return_lse=True)
    assert out.dtype == torch.bfloat16
    wanted, wanted_lse = attention(*narrow, spec, return_lse=True)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    if numerics in TRAINED:
        leaves = leaves_of(*narrow)
        wanted = torch.autograd.grad(attention(*leaves, spec).sum(), leaves)
        with torch.autocast("cpu", torch.bfloat16):  # the backward too
            got = torch.autograd.grad(attention(*leaves, spec).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("numerics", TRAINED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_change_nothing(numerics, reentrant):
    q, k, v = inputs(20, 30)
    spec = spec_of(numerics, causal=True)

    def gradients(function):
        leaves = leaves_of(q, k, v)
        function(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    kept = gradients(lambda *x: checkpoint(lambda *y: attention(*y, spec), *x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(lambda *x: attention(*x, spec)), strict=True))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_strides_do_not_matter(numerics):
    def mixed(x):
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    q, k, v = inputs(30, 140, heads=4, groups=2, batch=2)
    spec = spec_of(numerics, causal=True)
    assert rel(attention(mixed(q), mixed(k), mixed(v), spec), attention(q, k, v, spec)) < 2e-3  # means in another order


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(numerics, bad):
    for broken in range(3):
        tensors = list(inputs(20, 140, dtype=torch.float16))
        tensors[broken][0, 3, 0, 2] = bad
        out = attention(*tensors, spec_of(numerics))
        hit = out[0, 3, 0] if broken == 0 else out[0, ..., 2]
        assert not hit.isfinite().any()


@pytest.mark.parametrize("numerics", NUMERICS)
def test_nothing_to_do(numerics):
    q, k, v = inputs(9, 4)
    spec = spec_of(numerics, causal=True)
    out, lse = attention(q, k, v, spec, return_lse=True)
    assert out[:, :5].eq(0).all() and lse[..., :5].eq(-math.inf).all() and lse[..., 5:].isfinite().all()
    out, lse = attention(q, k[:, :0], v[:, :0], spec, return_lse=True)
    assert out.eq(0).all() and lse.eq(-math.inf).all()
    assert attention(q[:, :0], k, v, spec).shape == (1, 0, 2, 16)
    assert attention(q[:0], k[:0], v[:0], spec).shape == (0, 9, 2, 16)


# --- what is refused


def facts(**changes):
    known = {
        "device": "cuda",
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "head_dim": 128,
        "grouped": False,
        "mask": "none",
        "causal": False,
        "square": True,
        "blind": False,
        "empty": False,
        "packed": False,
        "lse": False,
        "grad": False,
        "tracing": False,
    }
    return Facts(**(known | changes))


def backend(numerics, name):
    return next(backend for backend in BACKENDS[numerics] if backend.name == name)


def test_the_kernels_of_each_numerics_in_order():
    names = {numerics: [b.name for b in backends(numerics)] for numerics in NUMERICS}
    assert names == {
        "int8_fp8": ["hopper", "triton", "reference"],
        "int8_fp16": ["triton", "reference"],
        "sagebwd": ["hopper", "triton", "reference"],
        "nvfp4": ["triton", "reference"],
    }


@pytest.mark.parametrize(
    ("numerics", "changes", "reason"),
    [
        ("int8_fp8", {}, ""),
        ("sagebwd", {"grad": True, "blind": True, "causal": True, "square": False, "head_dim": 40}, ""),
        ("int8_fp8", {"capability": (10, 0)}, "needs compute capability 9.0; this GPU has 10.0"),
        ("int8_fp8", {"device": "cpu", "capability": None}, "runs on CUDA GPUs; the tensors are on cpu"),
        ("int8_fp8", {"dtype": torch.float32}, "takes float16 and bfloat16, torch.float32 given"),
        ("sagebwd", {"head_dim": 129}, "takes head sizes up to 128; 129 given"),
        ("sagebwd", {"packed": True}, "takes no packed sequences"),
        ("sagebwd", {"empty": True}, "there are no queries or no keys"),
        ("int8_fp8", {"mask": "bool"}, "takes no mask; use numerics='exact'"),
        ("sagebwd", {"lse": True, "grad": True}, "has no gradient of the log-sum-exp"),
    ],
)
def test_what_hopper_refuses(numerics, changes, reason):
    given = backend(numerics, "hopper").refuses(facts(**changes), spec_of(numerics))
    assert given.startswith(reason) and bool(given) == bool(reason)


@pytest.mark.parametrize(
    ("numerics", "changes", "reason"),
    [
        ("int8_fp8", {"packed": True, "dtype": torch.float32, "head_dim": 256}, ""),
        ("int8_fp16", {"capability": (8, 0)}, ""),
        ("nvfp4", {"capability": (12, 0)}, ""),
        (
            "int8_fp8",
            {"capability": (8, 6)},
            "FP8 products need compute capability 8.9; this GPU has 8.6; use",
        ),
        ("sagebwd", {"capability": (7, 5)}, "INT8 products need compute capability 8.0; this GPU has 7.5"),
        ("nvfp4", {}, "FP4 products need compute capability 10.0; this GPU has 9.0"),
        ("nvfp4", {"capability": (10, 0), "packed": True}, "takes no packed sequences"),
        ("nvfp4", {"capability": (10, 0), "dtype": torch.float32}, "takes float16 and bfloat16"),
        ("nvfp4", {"capability": (10, 0), "mask": "bool"}, "takes no mask"),
        ("sagebwd", {"head_dim": 257}, "takes head sizes up to 256"),
        ("sagebwd", {"dtype": torch.float64}, "takes float16, bfloat16 and float32"),
        ("int8_fp16", {"mask": "float"}, "takes no mask; use numerics='exact'"),
        ("int8_fp16", {"device": "cpu", "capability": None}, "runs on CUDA GPUs"),
    ],
)
def test_what_triton_refuses(monkeypatch, numerics, changes, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = backend(numerics, "triton").refuses(facts(**changes), spec_of(numerics))
    assert given.startswith(reason) and bool(given) == bool(reason)


def test_scales_of_tiles_stop_where_registers_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton = backend("sagebwd", "triton")
    row, tile = (AttentionSpec(numerics="sagebwd", lowbit=LowBit(grad_scales=grain)) for grain in ("row", "tile"))
    assert triton.refuses(facts(grad=True, head_dim=160), tile).startswith("has grad_scales='tile' up to head size 128")
    assert not triton.refuses(facts(grad=True, head_dim=160), row)
    assert not triton.refuses(facts(head_dim=160), tile) and not triton.refuses(facts(grad=True), tile)


def test_options_that_a_kernel_lacks_are_refused():
    tile = AttentionSpec(numerics="sagebwd", lowbit=LowBit(grad_scales="tile"))
    assert backend("sagebwd", "hopper").refuses(facts(), tile).startswith("has grad_scales='row' only, 'tile' given")


def test_who_smooths_q(monkeypatch):
    """Each that does not names one that does."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def reason(numerics, name, **changes):
        spec = AttentionSpec(numerics=numerics, lowbit=LowBit(smooth_q=True))
        return backend(numerics, name).refuses(facts(**changes), spec)

    assert reason("sagebwd", "hopper").startswith("does not smooth Q; kernel='triton' does")
    assert not reason("sagebwd", "triton", grad=True, lse=True) and not reason("sagebwd", "reference", packed=True)
    packed = reason("sagebwd", "triton", packed=True)
    assert packed.startswith("smooths Q of dense batches alone; kernel='reference' takes packed")
    for numerics, name in (("int8_fp8", "hopper"), ("int8_fp8", "triton"), ("int8_fp16", "triton")):
        assert reason(numerics, name).startswith("does not smooth Q; kernel='reference' does")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
@pytest.mark.parametrize("numerics", NUMERICS)
def test_named_kernels_run_or_say_why_not(monkeypatch, numerics):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = inputs(4, 4)
    others = [b.name for b in BACKENDS[numerics] if b.name != "reference"]
    choice = explain(q, k, v, spec_of(numerics))
    assert choice.kernel == "reference" and list(choice.refused) == others and choice.able == ()
    for name in others:
        with pytest.raises(ValueError, match=f"kernel: '{name}' cannot run this call: .+; or use kernel='auto'"):
            attention(q, k, v, spec_of(numerics, name))
    assert torch.equal(attention(q, k, v, spec_of(numerics, "reference")), attention(q, k, v, spec_of(numerics)))


@pytest.mark.parametrize("numerics", NUMERICS)
def test_masks_and_float64_are_refused_by_all(numerics):
    q, k, v = inputs(4, 4)
    with pytest.raises(ValueError, match="reference: takes no mask; use numerics='exact'"):
        attention(q, k, v, spec_of(numerics), mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"reference: takes float16, bfloat16 and float32, torch\.float64 given"):
        attention(q.double(), k.double(), v.double(), spec_of(numerics))


def test_gradients_without_a_backward_are_refused():
    q, k, v = leaves_of(*inputs(4, 4))
    for numerics in ("int8_fp8", "int8_fp16", "nvfp4"):
        with pytest.raises(ValueError, match="reference: it has no backward and gradients are asked for"):
            attention(q, k, v, AttentionSpec(numerics=numerics))
        with torch.no_grad():
            attention(q, k, v, AttentionSpec(numerics=numerics))
    for numerics in ("int8_fp8", "nvfp4"):
        for b in BACKENDS[numerics]:
            assert b.trains(spec_of(numerics)) == (b.name == "reference")
    assert all(b.trains(spec_of("sagebwd")) for b in BACKENDS["sagebwd"])


# --- the operators


@pytest.mark.parametrize("numerics", NUMERICS)
def test_opcheck_of_references(numerics):
    q, k, v = inputs(10, 140, heads=4, groups=2)
    if numerics in TRAINED:
        q, k, v = leaves_of(q, k, v)
    if numerics == "sagebwd":
        torch.library.opcheck(
            ops_sagebwd_reference.sagebwd_reference, (q, k, v, None, None, True, 0.3, True, True, "row")
        )
        return
    how = (numerics, True, 0.3, True, None, True, TRAINED.get(numerics, LowBit()).backward)
    torch.library.opcheck(ops_reference.lowbit_attention_reference, (q, k, v, None, None, *how))
