"""Gradients by the Triton kernels: in the interpreter, with float32, against autograd of the reference in float64; on a
GPU at real sizes.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed: T tokens.
"""

import math
import os
from itertools import product

import pytest
import torch
from tests.ops.lowbit.conftest import poisoned
from tests.ops.lowbit.textbook import rel
from tests.ops.sparse_linear.sparse_textbook import operands, plain, random_blocks, random_map, random_ratio
from torch.utils.checkpoint import checkpoint

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.attention.sparse_linear import (  # noqa: E402
    Blocks,
    Geometry,
    SparseLinear,
    blocks_from_map,
    map_from_blocks,
    sla_blocks,
    sparse_linear_attention,
)
from allears.ops.attention.sparse_linear.blocks import columns_of  # noqa: E402
from allears.ops.attention.sparse_linear.ops_backward import sparse_linear_attention_triton  # noqa: E402
from allears.ops.attention.sparse_linear.triton_bwd_host import (  # noqa: E402
    BackwardLaunch,
    column_lists,
    gather_call,
    sparse_linear_backward_triton,
)
from allears.ops.attention.sparse_linear.triton_host import sparse_linear_forward_triton  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = 4e-6 if not ON_GPU else 2e-5


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is full of NaN."""
    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)


class Problem:
    """Tensors of a call, and its gradients by a kernel."""

    def __init__(self, options, queries, keys, heads=2, groups=1, size=16, batch=1, linear=None, **how):
        self.options, self.how = options, how
        causal = how.get("causal", False)
        shape = {"heads": heads, "groups": groups, "size": size, "batch": batch, "dtype": torch.float32}
        self.tensors = dict(zip("qkv", operands(queries, keys, **shape), strict=True))
        q, k, _ = self.tensors.values()
        self.map = random_map(q, k, options, causal)
        if not causal and self.map.shape[2] > 1:
            self.map[:, 0, 1] = True  # a query block without linear blocks
        self.blocks = blocks_from_map(self.map) if linear is None else linear(q, k, self.map)
        if options.form == "sla2":
            self.tensors["ratio"] = random_ratio(q, options)
        if options.form == "sla":
            self.tensors |= {"weight": torch.randn(size, size) / math.sqrt(size), "bias": torch.randn(size)}
        self.d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))

    def pack(self, starts_q, starts_k, blocks):
        for name, x in self.tensors.items():
            self.tensors[name] = x[0] if name in "qkv" else x
        self.d_out, self.blocks = self.d_out[0], blocks
        self.how["cu_seqlens_q"] = torch.tensor(starts_q, dtype=torch.int32, device=DEVICE)
        self.how["cu_seqlens_k"] = torch.tensor(starts_k, dtype=torch.int32, device=DEVICE)
        return self

    def run(self, kernel, dtype=torch.float32, wrap=lambda run: run):
        """Output, and the gradients of all tensors."""
        leaves = [x.to(DEVICE, dtype).requires_grad_() for x in self.tensors.values()]
        blocks = Blocks(*(x.to(DEVICE) if x is not None else None for x in self.blocks))

        def call(*leaves):
            given = dict(zip(self.tensors, leaves, strict=True))
            proj = (given.pop("weight"), given.pop("bias")) if "weight" in given else None
            return sparse_linear_attention(
                **given, blocks=blocks, options=self.options, proj=proj, kernel=kernel, **self.how
            )

        out = wrap(call)(*leaves)
        return out, *torch.autograd.grad(out, leaves, self.d_out.to(DEVICE, dtype))

    def check(self, tolerance=TOLERANCE, dtype=torch.float64):
        got, wanted = self.run("triton"), self.run("reference", dtype)
        for name, a, b in zip(("out", *self.tensors), got, wanted, strict=True):
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert (a - b).norm() < tolerance * max(b.norm(), 0.1 * self.d_out.norm()), name


@pytest.mark.parametrize(
    ("form", "queries", "keys", "heads", "groups", "size", "batch", "block_q", "causal"),
    [
        ("sla2", 40, 150, 4, 2, 24, 1, 64, False),
        ("sla2", 100, 150, 1, 1, 16, 1, 64, True),
        ("sla2", 140, 100, 1, 1, 32, 1, 128, True),
        ("sla2", 1, 1, 1, 1, 16, 2, 64, False),
        ("sla", 70, 100, 2, 1, 16, 1, 64, False),
        ("sla", 100, 70, 1, 1, 16, 1, 64, True),
        ("sparse", 70, 100, 2, 1, 16, 1, 64, False),
        ("sparse", 70, 100, 1, 1, 24, 1, 64, True),
    ],
)
def test_all_inputs_equal_autograd(form, queries, keys, heads, groups, size, batch, block_q, causal):
    """Odd lengths; L_q below and above L_k, where causal alignment leaves queries without keys; grouped heads; a head
    size that is padded; more than one group of heads."""
    options = plain(form=form, block_q=block_q)
    Problem(options, queries, keys, heads, groups, size, batch, causal=causal).check()


@pytest.mark.parametrize(
    ("feature_map", "smooth_k"), [("elu", True), ("relu", True), ("softmax", False), ("elu", False)]
)
def test_feature_maps_and_the_mean_of_the_keys(feature_map, smooth_k):
    Problem(plain(feature_map=feature_map, smooth_k=smooth_k), 40, 140, 1, scale=0.4).check()


def test_skipped_blocks_have_no_gradient():
    options = plain(form="sla")

    def marginal(q, k, map):
        return sla_blocks(torch.randn(*map.shape), 0.3, 0.4, geometry=Geometry.of(q, k, options, False))

    problem = Problem(options, 60, 300, 1, linear=marginal)
    problem.check()
    skipped = ~(problem.blocks.linear | map_from_blocks(problem.blocks, 5)).any(2)
    assert skipped.any()
    d_k, d_v = problem.run("triton")[2:4]
    of_keys = skipped[0, 0].repeat_interleave(64)[:300].to(DEVICE)
    assert not d_v[0, of_keys].any() and d_v[0, ~of_keys].any()
    assert d_k[0, of_keys].std(0).max() < 1e-6  # what is left is the gradient of the mean of the keys


@pytest.mark.parametrize("backward", ["drop_in", "matched"])
@pytest.mark.parametrize(
    ("form", "causal", "smooth_k"), [("sla2", False, True), ("sparse", True, True), ("sparse", False, False)]
)
def test_8_bit_forward(backward, form, causal, smooth_k):
    """Against the reference of the same roundings, in float32."""
    options = plain(form=form, precision="int8_fp8", backward=backward, smooth_k=smooth_k)
    Problem(options, 70, 140, 1, 1, 32, causal=causal).check(1e-5, torch.float32)


@pytest.mark.parametrize("choices", [{}, {"feature_map": "elu"}, {"precision": "int8_fp8", "backward": "matched"}])
def test_float16(choices):
    """As near to the gradients of float32 as the format is, also where it is coarse: below 2^-14 its step is 2^-24."""
    problem = Problem(plain(**choices), 70, 200, 1, 1, 32)
    problem.tensors |= {name: x.half().float() for name, x in problem.tensors.items() if name in "qkv"}
    problem.d_out *= 2.0**-10
    got, wanted = problem.run("triton", torch.float16), problem.run("reference", torch.float32)
    for name, a, b in zip(("out", *problem.tensors), got, wanted, strict=True):
        steps = (a.float() - b).abs() / torch.clamp(b.abs() * 2.0**-10, min=2.0**-24)
        assert steps.mean() < 2, name


def test_the_backwards_of_8_bits_differ_from_each_other_and_from_exact():
    def gradients(**choices):
        return Problem(plain(**choices), 20, 70, 1, 1, 32).run("triton")[1]

    exact, eight = gradients(), [gradients(precision="int8_fp8", backward=way) for way in ("drop_in", "matched")]
    assert all(1e-4 < rel(one, exact) < 0.1 for one in eight)
    assert rel(*eight) > 1e-4


@pytest.mark.parametrize(
    ("form", "precision", "causal"), [("sla2", "exact", False), ("sla", "exact", True), ("sla2", "int8_fp8", False)]
)
def test_packed_sequences(form, precision, causal):
    """Among them one without queries and one without keys."""
    starts_q, starts_k = [0, 3, 3, 6, 71], [0, 10, 20, 20, 90]
    options = plain(form=form, precision=precision)
    problem = Problem(options, 71, 90, 1, causal=causal)
    lengths = [torch.tensor(starts).diff() for starts in (starts_q, starts_k)]
    geometry = Geometry(*lengths, 64, 64, causal, 65, 70)
    drawn = torch.rand(4, 1, geometry.n_q, geometry.n_k) < 0.4
    map = (drawn | geometry.forced() | (torch.arange(geometry.n_k) == 0)) & geometry.visible()
    problem.pack(starts_q, starts_k, blocks_from_map(map))
    if form == "sla2":
        problem.tensors["ratio"] = torch.rand(4, 1, geometry.n_q) * 0.7 + 0.2
    problem.check(*((1e-5, torch.float32) if precision != "exact" else ()))


def test_strides_broadcast_ratio_and_unchanged_inputs():
    problem = Problem(plain(), 33, 140, batch=2)
    problem.tensors["ratio"] = torch.rand(2, 1)
    problem.tensors |= {
        name: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        for name, x in problem.tensors.items()
        if name != "ratio"
    }
    problem.d_out = torch.ones(2, 33, 1, 1).expand(2, 33, 2, 16)
    assert problem.d_out.stride()[2:] == (0, 0)
    kept = [x.clone() for x in problem.tensors.values()]
    problem.check()
    assert all(torch.equal(a, b) for a, b in zip(kept, problem.tensors.values(), strict=True))


@pytest.mark.parametrize(
    ("size", "launch"),
    [(64, BackwardLaunch(64, 4, 1, 32, 4, 1, 32, 4)), (16, BackwardLaunch(128, 8, 2, 128, 8, 2, 16, 8))],
)
def test_tiles_and_groups_of_any_size_give_the_same(size, launch):
    """Twice bit for bit the same, too."""
    options = SparseLinear()
    q, k, v = (x.to(DEVICE) for x in operands(130, 70, 2, 1, size, dtype=torch.float32))
    blocks = Blocks(*(x.to(DEVICE) if x is not None else None for x in random_blocks(q.cpu(), k.cpu(), options)))
    ratio = random_ratio(q.cpu(), options).to(DEVICE)
    made = sparse_linear_forward_triton(q, k, v, blocks, ratio, options, scale=0.2)
    call = gather_call(q, k, v, blocks, options, False, None, None, None, None, made.k_mean)
    given = (torch.randn_like(q), None, call, made.out, made.lse, ratio, 0.2)
    plainly = sparse_linear_backward_triton(*given)
    again = sparse_linear_backward_triton(*given)
    other = sparse_linear_backward_triton(*given, launch=launch, scratch_fraction=9.0)
    assert all(torch.equal(a, b) for a, b in zip(plainly, again, strict=True))
    assert all(rel(a, b) < 1e-5 for a, b in zip(other, plainly, strict=True))
    with pytest.raises(ValueError, match="rows and tile must divide block_q, 128"):
        sparse_linear_backward_triton(*given, launch=BackwardLaunch(96, 4, 1, 64, 4, 1, 32, 4))


def test_no_keys_no_queries_and_zero_gradients():
    for queries, keys in ((5, 0), (0, 5)):
        problem = Problem(plain(), queries, keys)
        assert all(not x.any() for x in problem.run("triton"))
    problem = Problem(plain(), 5, 70)
    problem.d_out *= 0
    assert all(not x.any() for x in problem.run("triton")[1:])


def test_a_wide_range_of_ratio_and_logits_stays_finite():
    problem = Problem(plain(), 70, 100, 1)
    problem.tensors["q"] *= 30
    problem.tensors["ratio"][..., :1] = 1e-3
    problem.tensors["ratio"][..., 1:] = 1 - 1e-6
    problem.check(2e-4)


@pytest.mark.parametrize(("n_q", "n_k", "density"), [(1, 1, 1.0), (130, 40, 0.2), (5, 70, 0.5), (3, 0, 0.0)])
def test_lists_by_column(n_q, n_k, density):
    blocks = blocks_from_map(torch.rand(2, 3, n_q, n_k) < density)
    blocks.rows[blocks.rows < 0] = 0  # what is behind the count is not read
    index, lengths = column_lists(Blocks(*(x.to(DEVICE) for x in blocks[:2])), n_k)
    wanted = columns_of(blocks, n_k)
    assert torch.equal(lengths.cpu(), wanted.start.diff())
    for at, (first, last) in zip(product(range(2), range(3), range(n_k)), starts(wanted), strict=True):
        assert index[at][: last - first].tolist() == wanted.index[first:last].tolist()


def starts(columns):
    return torch.stack((columns.start[..., :-1], columns.start[..., 1:]), -1).flatten(0, 2).tolist()


@pytest.mark.parametrize("form", ["sla2", "sla"])
def test_compile_and_checkpoints_change_nothing(form):
    problem = Problem(plain(form=form), 5, 70, 1)
    wanted = problem.run("triton")
    ways = (
        lambda run: torch.compile(run, fullgraph=True, backend="aot_eager"),
        lambda run: lambda *x: checkpoint(run, *x, use_reentrant=False),
    )
    for wrap in ways:
        for a, b in zip(problem.run("triton", wrap=wrap), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_opcheck():
    q, k, v = (x.float().to(DEVICE) for x in operands(5, 70, 1, 1))
    parts = ("test_schema", "test_faketensor", "test_autograd_registration")
    for form, precision, smooth in (("sla2", "exact", True), ("sla", "exact", False), ("sparse", "int8_fp8", True)):
        options = plain(form=form)
        rows, count, _ = random_blocks(q.cpu(), k.cpu(), options)
        ratio = random_ratio(q.cpu(), options).to(DEVICE) if form == "sla2" else None
        leaves = [x.requires_grad_() if x is not None else None for x in (q, k, v, ratio)]
        lists = (rows.to(DEVICE), count.to(DEVICE), None)
        given = (
            *leaves[:3],
            *lists,
            leaves[3],
            *(None,) * 5,
            form,
            64,
            64,
            "elu",
            smooth,
            precision,
            "matched",
            False,
            0.2,
        )
        torch.library.opcheck(sparse_linear_attention_triton, given, test_utils=parts)


def test_the_gradient_of_the_log_sum_exp_is_refused():
    problem = Problem(plain(), 5, 7)
    problem.how["return_lse"] = True
    with pytest.raises(ValueError, match="no gradient of the log-sum-exp"):
        problem.run("triton")
    q, k, v = (problem.tensors[name].to(DEVICE).requires_grad_() for name in "qkv")
    rows, count, _ = (x.to(DEVICE) if x is not None else None for x in problem.blocks)
    fixed = ("sparse", 64, 64, "softmax", True, "exact", "drop_in", False, 0.2)
    _, lse, _, _ = sparse_linear_attention_triton(q, k, v, rows, count, None, None, None, *(None,) * 4, *fixed)
    with pytest.raises(ValueError, match="lse: its gradient is asked for"):
        lse.sum().backward()


# --- on a GPU

needs_gpu = pytest.mark.gpu


@needs_gpu
def test_large_heads_of_float32_are_refused():
    with pytest.raises(ValueError, match="head sizes above 128; 256 given"):
        Problem(SparseLinear(), 70, 140, 1, 1, 256).run("triton")


SHAPES = [
    (1000, 1000, 4, 4, 128, False),
    (1000, 777, 4, 2, 64, True),
    (640, 1000, 2, 1, 100, False),
    (513, 600, 2, 2, 256, True),
]


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("form", "precision", "backward", "block_q"),
    [
        ("sla2", "exact", "drop_in", 128),
        ("sla2", "exact", "drop_in", 64),
        ("sla", "exact", "drop_in", 128),
        ("sparse", "exact", "drop_in", 128),
        ("sla2", "int8_fp8", "drop_in", 128),
        ("sla2", "int8_fp8", "matched", 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_on_a_gpu(form, precision, backward, block_q, dtype, shape):
    """As far from the reference in float32 as 16-bit numbers are."""
    *sizes, causal = shape
    options = SparseLinear(form=form, precision=precision, backward=backward, block_q=block_q)
    problem = Problem(options, *sizes, 2, causal=causal)
    problem.tensors |= {name: x.to(dtype).float() for name, x in problem.tensors.items() if name in "qkv"}
    got, wanted = problem.run("triton", dtype), problem.run("reference", torch.float32)
    bound = 0.02 if dtype == torch.bfloat16 else 0.004
    for name, a, b in zip(("out", *problem.tensors), got, wanted, strict=True):
        assert rel(a.float(), b) < bound * (2 if precision == "int8_fp8" else 1), name


@needs_gpu
@pytest.mark.parametrize(("form", "feature_map"), product(["sla2"], ["softmax", "elu", "relu"]))
def test_float32_on_a_gpu(form, feature_map):
    Problem(SparseLinear(form=form, feature_map=feature_map), 500, 700, 4, 2, 128).check(1e-4)


@needs_gpu
def test_packed_sequences_of_16_bits_on_a_gpu():
    starts_q, starts_k = [0, 400, 400, 403, 1000], [0, 300, 320, 320, 900]
    problem = Problem(SparseLinear(), 1000, 900, 4, 2, 64)
    geometry = Geometry(*(torch.tensor(x).diff() for x in (starts_q, starts_k)), 128, 64, False, 597, 580)
    drawn = torch.rand(4, 4, geometry.n_q, geometry.n_k) < 0.3
    map = (drawn | (torch.arange(geometry.n_k) == 0)) & geometry.visible()
    problem.pack(starts_q, starts_k, blocks_from_map(map))
    problem.tensors["ratio"] = torch.rand(4, 4, geometry.n_q) * 0.7 + 0.2
    got, wanted = problem.run("triton", torch.bfloat16), problem.run("reference", torch.float32)
    for name, a, b in zip(("out", *problem.tensors), got, wanted, strict=True):
        assert rel(a.float(), b) < 0.02, name


@needs_gpu
def test_graphs_on_a_gpu():
    """No part of a step waits for the GPU."""
    problem = Problem(SparseLinear(), 700, 900, 4, 2, 64)
    wanted = problem.run("triton", torch.bfloat16)
    leaves = [x.cuda().bfloat16().requires_grad_() for x in problem.tensors.values()]
    blocks = Blocks(*(x.cuda() if x is not None else None for x in problem.blocks))
    d_out = problem.d_out.cuda().bfloat16()

    def step():
        out = sparse_linear_attention(*leaves[:3], blocks, leaves[3], SparseLinear(), kernel="triton")
        return torch.autograd.grad(out, leaves, d_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for x in held:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(rel(a, b) < 5e-3 for a, b in zip(held, wanted[1:], strict=True))
