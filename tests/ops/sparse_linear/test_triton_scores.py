"""Scores of blocks by the kernels against float64, in Triton's interpreter (whose TF32 is float32) or on a GPU."""

import pytest
import torch
from tests.ops.sparse_linear.triton_calls import DEVICE, rel

from allears.ops.attention.sparse_linear import ops
from allears.ops.attention.sparse_linear.blocks import Geometry
from allears.ops.attention.sparse_linear.ops import sparse_linear_scores
from allears.ops.attention.sparse_linear.routers import block_scores, select_top_k
from allears.ops.attention.sparse_linear.scores import projected_scores
from allears.ops.attention.sparse_linear.triton_scores import scores_triton

pytestmark = pytest.mark.usefixtures("poison")


def pools_of(entries=1, heads=2, groups=2, n_q=5, n_k=7, size=24, seed=0):
    """Pools of queries and of keys with an offset, the mean of the keys, and projections near the identity."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=made)

    k_pool = normal(entries, groups, n_k, size) + 3 * normal(size)
    near = [torch.eye(size) + 0.3 * size**-0.5 * normal(n, size, size) for n in (heads, groups)]
    given = (normal(entries, heads, n_q, size), k_pool, k_pool.mean(2), *near)
    return [x.to(DEVICE) for x in given]


def exact(q, k, mean, proj_q, proj_k, scale):
    q, k = q.double(), k.double() - (0 if mean is None else mean.double()[:, :, None])
    if proj_q is not None:
        q, k = q @ proj_q.double(), k @ proj_k.double()
    return block_scores(q, k, scale)


@pytest.mark.parametrize(
    ("entries", "heads", "groups", "n_q", "n_k", "size"),
    [(2, 4, 2, 3, 5, 40), (1, 2, 2, 70, 130, 24), (1, 3, 1, 1, 1, 128)],
)
def test_equals_float64(entries, heads, groups, n_q, n_k, size):
    """Grouped heads, odd numbers of blocks, more than a tile of them, padded head sizes."""
    q, k, mean, proj_q, proj_k = pools_of(entries, heads, groups, n_q, n_k, size)
    for given in ((q, k, mean, proj_q, proj_k), (q, k, None, proj_q, proj_k), (q, k, mean, None, None)):
        if n_k == 1 and given[2] is not None:
            continue  # all zeros
        got = scores_triton(*given, 0.3)
        assert got.shape == (entries, heads, n_q, n_k) and got.dtype == torch.float32
        bound = 1e-3 if DEVICE == "cuda" else 1e-6
        assert rel(got, exact(*given, 0.3)) < bound
        assert rel(projected_scores(*given, 0.3), exact(*given, 0.3)) < bound


def test_the_operator_agrees_with_its_fake():
    torch.library.opcheck(
        sparse_linear_scores, (*pools_of(heads=4), 0.3), test_utils=("test_schema", "test_faketensor")
    )


def test_gradients_go_the_way_of_torch():
    q, k, mean, proj_q, proj_k = pools_of()
    proj_q.requires_grad_()
    scores = projected_scores(q, k, mean, proj_q, proj_k, 0.3)
    (got,) = torch.autograd.grad(scores.square().sum(), proj_q)
    assert got.shape == proj_q.shape and bool(got.any())


def overlap(scores, wanted, keep=0.03):
    """Share of the chosen blocks that both choose."""
    geometry = Geometry(128 * scores.shape[2], 64 * scores.shape[3], 128, 64)
    lists = [select_top_k(x.double(), keep, geometry=geometry).rows for x in (scores, wanted)]
    maps = [torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, rows.long(), True) for rows in lists]
    return ((maps[0] & maps[1]).sum() / maps[1].sum()).item()


def test_factors_cut_to_tf32_choose_the_same_blocks():
    """The hardware drops all but 10 bits of mantissa. Keys come in neighbourhoods, as recorded ones do."""
    q, k, mean, proj_q, proj_k = pools_of(heads=4, groups=4, n_q=128, n_k=512, size=128)
    k = k + 0.5 * torch.randn(1, 4, 64, 128, generator=torch.Generator().manual_seed(1)).to(DEVICE).repeat_interleave(
        8, 2
    )
    factors = q @ proj_q, (k - mean[:, :, None]) @ proj_k
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in factors]
    wanted = exact(q, k, mean, proj_q, proj_k, 0.1)
    assert overlap(block_scores(*cut, 0.1), wanted) > 0.999
    rough = [x.bfloat16().float() for x in factors]
    assert overlap(block_scores(*rough, 0.1), wanted) < 0.999, "the bound tells 8 bits from 10"


@pytest.mark.gpu
@pytest.mark.parametrize(("n_q", "n_k", "heads"), [(256, 512, 12), (591, 1182, 8)])
def test_the_kernel_chooses_the_same_blocks(n_q, n_k, heads):
    given = pools_of(heads=heads, groups=heads, n_q=n_q, n_k=n_k, size=128)
    assert overlap(scores_triton(*given, 128**-0.5), exact(*given, 128**-0.5)) > 0.999


def test_an_operator_is_left_out_of_eager_calls_alone(monkeypatch):
    """torch.compile sees the operator, and a plain call goes straight to its function."""
    given = (*pools_of(), 0.3)
    ran = []
    function = ops._FUNCTIONS[sparse_linear_scores]
    monkeypatch.setitem(ops._FUNCTIONS, sparse_linear_scores, lambda *x: ran.append(1) or function(*x))
    wanted = ops.at_once(sparse_linear_scores, *given)
    assert ran == [1]

    def call(*x):
        return ops.at_once(sparse_linear_scores, *x) + 1

    graphs = []
    compiled = torch.compile(call, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert torch.equal(compiled(*given), wanted + 1) and ran == [1]
    assert "sparse_linear_scores" in graphs[0].code
