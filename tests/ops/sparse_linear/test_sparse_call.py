import pytest
import torch
from tests.ops.sparse_linear.sparse_textbook import operands, plain, random_blocks, random_ratio

from allears.ops.attention import (
    AttentionSpec,
    LowBit,
    SparseLinear,
    Sparsity,
    attention,
    backends,
    explain,
    explain_sparse_linear,
    sparse_linear_attention,
)
from allears.ops.attention.sparse_linear import (
    Blocks,
    Geometry,
    blocks_from_map,
    pooled_scores,
    select_top_k,
    spargeattn_blocks,
)
from allears.ops.attention.sparse_linear import (
    backends as family,
)
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def call(queries=150, keys=200, dtype=torch.float32, **choices):
    q, k, v = operands(queries, keys, size=16, dtype=dtype)
    options = plain(**choices)
    ratio = random_ratio(q, options) if options.form == "sla2" else None
    return q, k, v, random_blocks(q, k, options), ratio, options


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("form", ["sla2", "sla", "sparse"])
def test_the_door_runs_the_kernel(kernel, form):
    arguments = call(form=form)
    proj = (torch.randn(16, 16), torch.randn(16)) if form == "sla" else None
    wanted = sparse_linear_reference(*arguments, proj=proj, scale=0.25)
    got = sparse_linear_attention(*arguments, proj=proj, kernel=kernel, return_lse=True)
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, want)
    torch.testing.assert_close(sparse_linear_attention(*arguments, proj=proj), wanted[0])


def test_a_named_kernel_gives_what_the_reference_gives():
    """Triton interprets its kernels here, or runs them on a GPU; its own tests look closer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, blocks, ratio, options = call(100, 130)
    moved = [x.to(device) for x in (q, k, v)]
    out = sparse_linear_attention(
        *moved, Blocks(*(x.to(device) for x in blocks[:2])), ratio.to(device), options, kernel="triton"
    )
    wanted = sparse_linear_attention(q, k, v, blocks, ratio, options, kernel="reference")
    torch.testing.assert_close(out.cpu(), wanted, atol=1e-4, rtol=1e-4)
    spec = AttentionSpec(sparse=Sparsity(keep=0.4, block_q=64), kernel="triton")
    wanted = attention(q, k, v, AttentionSpec(sparse=spec.sparse, kernel="reference"))
    torch.testing.assert_close(attention(*moved, spec).cpu(), wanted, atol=1e-4, rtol=1e-4)


def test_explain_says_why_not():
    arguments = call()
    choice = explain_sparse_linear(*arguments)
    assert choice.kernel == "gathered" and choice.able == ("reference",)
    assert set(choice.refused) == {"hopper", "triton"} and all(choice.refused.values())
    assert explain_sparse_linear(*arguments, kernel="gathered") == choice
    with pytest.raises(ValueError, match="kernel: 'triton' cannot run this call"):
        explain_sparse_linear(*call(dtype=torch.float64), kernel="triton")


def facts_of(**changes):
    made = family.Facts(
        "cuda", (9, 0), torch.bfloat16, 128, False, "none", False, True, False, False, False, False, False, False
    )
    return made._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "choices", "reason"),
    [
        ({}, {}, ""),
        ({"head_dim": 96}, {}, "head size 128"),
        ({"capability": (10, 0)}, {}, "9.0; this GPU has 10.0"),
        ({"dtype": torch.float32}, {}, "float16 and bfloat16"),
        ({"causal": True}, {}, "neither causal nor packed"),
        ({"packed": True}, {}, "neither causal nor packed"),
        ({"empty": True}, {}, "no queries"),
        ({}, {"block_q": 64}, "block_q=64"),
        ({}, {"form": "sla"}, "form='sla'"),
        ({}, {"precision": "exact"}, "precision='exact'"),
        ({}, {"feature_map": "elu"}, "feature_map='elu'"),
        ({"device": "cpu", "capability": None}, {}, "tensors are on cpu"),
    ],
)
def test_hopper_takes_what_it_has(changes, choices, reason):
    kernel = family.KERNELS[0]
    said = kernel.refuses(facts_of(**changes), SparseLinear(**{"precision": "int8_fp8", **choices}), True)
    assert reason in said and bool(reason) == bool(said)
    assert not kernel.trains


@pytest.mark.parametrize(
    ("changes", "choices", "reason"),
    [
        ({}, {}, ""),
        ({"grad": True, "causal": True, "packed": True}, {"form": "sla"}, ""),
        ({"capability": (8, 6)}, {}, ""),
        ({"capability": (8, 6)}, {"precision": "int8_fp8"}, "needs compute capability 8.9; this GPU has 8.6"),
        ({"capability": (7, 5)}, {}, "needs compute capability 8.0"),
        ({"dtype": torch.float64}, {}, "float64 given"),
        ({"head_dim": 300}, {}, "up to 256"),
        ({"grad": True, "lse": True}, {}, "no gradient of the log-sum-exp"),
        ({"device": "cpu", "capability": None}, {}, "tensors are on cpu"),
    ],
)
def test_triton_takes_what_it_has(changes, choices, reason, monkeypatch):
    monkeypatch.setattr(family, "interpreted", lambda: False)
    said = family.KERNELS[1].refuses(facts_of(**changes), SparseLinear(**choices), True)
    assert reason in said and bool(reason) == bool(said)


def test_interpreted_triton_has_to_be_asked_for(monkeypatch):
    monkeypatch.setattr(family, "interpreted", lambda: True)
    kernel, facts = family.KERNELS[1], facts_of(device="cpu", capability=None, dtype=torch.float32)
    assert "only kernel='triton' asks" in kernel.refuses(facts, SparseLinear(), False)
    assert kernel.refuses(facts, SparseLinear(), True) == ""
    assert "bfloat16" in kernel.refuses(facts._replace(dtype=torch.bfloat16), SparseLinear(), True)


def test_a_kernel_without_backward_refuses_gradients():
    kernel = family.Kernel("forward", sparse_linear_reference, lambda *_: "", trains=False)
    assert "no backward" in kernel.objection(facts_of(grad=True), SparseLinear(), True)
    assert kernel.objection(facts_of(), SparseLinear(), True) == ""


def test_a_learned_ratio_counts_as_a_gradient(monkeypatch):
    seen = []
    spy = family.Kernel("spy", sparse_linear_reference, lambda facts, *_: seen.append(facts.grad) or "")
    monkeypatch.setattr(family, "KERNELS", (spy,))
    q, k, v, blocks, ratio, options = call()
    sparse_linear_attention(q, k, v, blocks, ratio, options)
    sparse_linear_attention(q, k, v, blocks, ratio.requires_grad_(), options)
    with torch.no_grad():
        sparse_linear_attention(q, k, v, blocks, ratio, options)
    assert seen == [False, True, False]


def test_autocast_narrows_and_strides_are_honoured():
    q, k, v, blocks, ratio, options = call()
    with torch.autocast("cpu", torch.bfloat16):
        out = sparse_linear_attention(q, k, v, blocks, ratio, options)
    assert out.dtype == torch.bfloat16
    wanted = sparse_linear_attention(*(x.bfloat16() for x in (q, k, v)), blocks, ratio, options)
    torch.testing.assert_close(out, wanted, atol=0, rtol=0)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    kept = [x.clone() for x in strided]
    torch.testing.assert_close(
        sparse_linear_attention(*strided, blocks, ratio, options),
        sparse_linear_attention(q, k, v, blocks, ratio, options),
    )
    assert all(torch.equal(a, b) for a, b in zip(strided, kept, strict=True))


def test_arguments_that_do_not_fit_are_named():
    q, k, v, blocks, ratio, options = call()

    def says(message, **changes):
        given = {"q": q, "k": k, "v": v, "blocks": blocks, "ratio": ratio, "options": options, **changes}
        with pytest.raises(ValueError, match=message):
            sparse_linear_attention(**given)

    other = SparseLinear(block_q=128)
    says(r"blocks: rows of shape \(1, 4, 3, 4\) given; it must be .*\(1, 4, 2\).*block_q=128", options=other)
    says("4 wide given, but there are 2 key blocks", k=k[:, :100], v=v[:, :100])
    says("count of shape", blocks=Blocks(blocks.rows, blocks.count[..., :1]))
    says("both must be int32", blocks=Blocks(blocks.rows.long(), blocks.count))
    marked = blocks._replace(linear=torch.zeros(1, 4, 3, 3).bool())
    says("linear given; form='sla2' has all", blocks=marked)
    says(r"linear of torch\.bool and shape", blocks=marked, options=plain(form="sparse"), ratio=None)
    says("count 0", blocks=Blocks(blocks.rows, torch.zeros_like(blocks.count)))
    says("ratio: None given", ratio=None)
    says(r"ratio: shape \(4,\) does not broadcast to .* = \(1, 4, 3\); \(H, 1\)", ratio=torch.rand(4))
    says("ratio: torch.int64", ratio=torch.ones(4, 1).long())
    says("ratio: given with form 'sparse'", options=plain(form="sparse"))
    says("proj: None given; form='sla'", options=plain(form="sla"), ratio=None)
    says("proj: given with form 'sla2'", proj=(torch.eye(16), None))
    says(r"proj: weight \(8, 8\)", options=plain(form="sla"), ratio=None, proj=(torch.eye(8), None))
    says(r"bias \(8,\)", options=plain(form="sla"), ratio=None, proj=(torch.eye(16), torch.ones(8)))
    says("scale: -1", scale=-1.0)
    says("kernel: 'cuda' is unknown; known are auto, hopper, triton, gathered, reference", kernel="cuda")
    says("v: shape", v=v[:, :5])
    says("cu_seqlens_k: one given without the other", q=q[0], k=k[0], v=v[0], cu_seqlens_q=torch.tensor([0, 150]).int())
    says("no kernel can run this call", q=q.double(), k=k.double(), v=v.double(), options=plain(precision="int8_fp8"))


@pytest.mark.parametrize("precision", ["exact", "int8_fp8"])
def test_compiles_in_one_graph(precision):
    q, k, v, _, ratio, options = call(precision=precision)
    ratio = torch.rand(4, 1, requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)] + [ratio]

    def run(q, k, v, ratio):
        scores = pooled_scores(q.detach(), k.detach(), options, scale=0.25)
        blocks = select_top_k(scores, 0.5, geometry=Geometry.of(q, k, options, False))
        return sparse_linear_attention(q, k, v, blocks, ratio, options)

    wanted, got = run(*leaves), torch.compile(run, fullgraph=True, backend="eager")(*leaves)
    torch.testing.assert_close(got, wanted)
    pairs = zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (got, wanted)), strict=True)
    for mine, want in pairs:
        torch.testing.assert_close(mine, want)


# --- training-free, through the door of attention(...)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("numerics", ["exact", "int8_fp8"])
@pytest.mark.parametrize("rule", [{"keep": 0.4}, {"mass": 0.7}, {"keep": 0.4, "similarity": 0.1, "block_q": 64}])
def test_a_spec_with_sparsity_reads_the_blocks_of_the_rule(causal, numerics, rule):
    q, k, v, *_ = call()
    spec = AttentionSpec(causal=causal, numerics=numerics, sparse=Sparsity(**rule))
    options = SparseLinear("sparse", rule.get("block_q", 128), precision=numerics)
    asked = {name: rule.get(name) for name in ("keep", "mass", "similarity")}
    blocks = spargeattn_blocks(q, k, options=options, causal=causal, **asked)
    wanted, wanted_lse = sparse_linear_reference(q, k, v, blocks, None, options, causal=causal)
    out, lse = attention(q, k, v, spec, return_lse=True)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    torch.testing.assert_close(attention(q, k, v, spec), wanted)


def test_keeping_everything_is_dense_attention():
    q, k, v, *_ = call()
    spec = AttentionSpec(sparse=Sparsity(keep=1.0))
    torch.testing.assert_close(attention(q, k, v, spec), attention(q, k, v))
    packed = {"cu_seqlens_q": torch.tensor([0, 70, 150]).int(), "cu_seqlens_k": torch.tensor([0, 70, 200]).int()}
    rows = q[0], k[0], v[0]
    torch.testing.assert_close(attention(*rows, spec, **packed), attention(*rows, **packed))


def test_sparsity_in_the_spec_is_explained_and_trains_only_exactly():
    q, k, v, *_ = call()
    exact, low = (AttentionSpec(sparse=Sparsity(keep=0.5), numerics=n) for n in ("exact", "int8_fp8"))
    choice = explain(q, k, v, exact)
    assert choice.kernel == "gathered" and set(choice.refused) == {"hopper", "triton"}
    assert [b.name for b in backends("exact", sparse=True)] == ["hopper", "triton", "gathered", "reference"]
    assert "sdpa" in [b.name for b in backends("exact")]
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(attention(q, k, v, exact).sum(), q)
    assert gradient.isfinite().all() and gradient.any()
    with pytest.raises(ValueError, match="no backward and gradients are asked for"):
        attention(q, k, v, low)
    with torch.no_grad():
        attention(q, k, v, low)


def test_sparsity_says_what_is_wrong():
    for rule in ({}, {"keep": 0.1, "mass": 0.1}):
        with pytest.raises(ValueError, match="give exactly one"):
            Sparsity(**rule)
    with pytest.raises(ValueError, match=r"keep: 0\.0 given"):
        Sparsity(keep=0.0)
    with pytest.raises(ValueError, match="similarity: -1"):
        Sparsity(keep=0.5, similarity=-1)
    with pytest.raises(ValueError, match="block_q must be 64 or 128"):
        Sparsity(keep=0.5, block_q=32)
    with pytest.raises(ValueError, match="smooth_k: 1"):
        Sparsity(keep=0.5, smooth_k=1)
    for numerics in ("sagebwd", "nvfp4", "int8_fp16"):
        with pytest.raises(ValueError, match="sparse kernels have 'exact' and 'int8_fp8'"):
            AttentionSpec(numerics=numerics, sparse=Sparsity(keep=0.5))
    q, k, v, *_ = call()
    spec = AttentionSpec(sparse=Sparsity(keep=0.5), kernel="reference", lowbit=LowBit())
    with pytest.raises(ValueError, match="takes no mask"):
        attention(q, k, v, spec, torch.ones(150, 200).bool())
    with pytest.raises(ValueError, match="'sdpa' is unknown; known for 'exact' are auto, hopper"):
        attention(q, k, v, AttentionSpec(sparse=Sparsity(keep=0.5), kernel="sdpa"))
    assert blocks_from_map(torch.ones(1, 1, 1, 1).bool()).count.item() == 1
