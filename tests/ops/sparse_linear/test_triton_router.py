"""The router's kernel against the selection in torch, in Triton's interpreter or on a GPU."""

import math

import pytest
import torch
from tests.ops.sparse_linear.triton_calls import DEVICE, offsets

from allears.ops.attention.sparse_linear import routers
from allears.ops.attention.sparse_linear.blocks import Geometry, check_blocks
from allears.ops.attention.sparse_linear.ops import sparse_linear_classes, sparse_linear_route
from allears.ops.attention.sparse_linear.triton_router import route_triton

pytestmark = pytest.mark.usefixtures("poison")


def select_top_k(scores, keep, geometry):
    """The reference, in float64, which no kernel takes."""
    return routers.select_top_k(scores.double(), keep, geometry=geometry)


def select_mass(scores, mass, geometry):
    return routers.select_mass(scores.double(), mass, geometry=geometry)


def sla_blocks(scores, keep, skip, geometry):
    return routers.sla_blocks(scores.double(), keep, skip, geometry=geometry)


def scores_of(geometry, entries=1, heads=2, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(entries, heads, geometry.n_q, geometry.n_k, generator=made).to(DEVICE)


def route(scores, geometry, cu=(None, None), **share):
    return route_triton(
        scores,
        block_q=geometry.block_q,
        block_k=geometry.block_k,
        length_q=geometry.longest_q,
        length_k=geometry.longest_k,
        causal=geometry.causal,
        cu_seqlens_q=cu[0],
        cu_seqlens_k=cu[1],
        **share,
    )


def same(got, wanted):
    """Equal lists; their widths may differ by what is -1."""
    assert torch.equal(got.count, wanted.count)
    width = min(got.rows.shape[-1], wanted.rows.shape[-1])
    assert torch.equal(got.rows[..., :width], wanted.rows[..., :width])
    assert bool((got.rows[..., width:] == -1).all()) and bool((wanted.rows[..., width:] == -1).all())


@pytest.mark.parametrize(("queries", "keys", "causal"), [(300, 2000, False), (700, 500, True), (65, 64, True)])
@pytest.mark.parametrize("share", [{"keep": 0.1}, {"keep": 0.5}, {"keep": 1.0}, {"mass": 0.5}, {"mass": 0.97}])
def test_equals_the_selection_in_torch(queries, keys, causal, share):
    geometry = Geometry(queries, keys, 128, 64, causal)
    scores = scores_of(geometry, seed=queries)
    got = route(scores, geometry, **share)
    select, (value,) = (select_top_k if "keep" in share else select_mass), share.values()
    same(got, select(scores, value, geometry=geometry))
    check_blocks(got, geometry)


@pytest.mark.parametrize("share", [{"keep": 0.3}, {"mass": 0.8}])
def test_packed_sequences(share):
    cu_q, cu_k = offsets(70, 0, 200, 1, 300), offsets(500, 30, 40, 0, 700)
    lengths = [cu.diff() for cu in (cu_q, cu_k)]
    geometry = Geometry(*lengths, 64, 64, True, 300, 700)
    scores = scores_of(geometry, entries=5, heads=1)
    select, (value,) = (select_top_k if "keep" in share else select_mass), share.values()
    same(route(scores, geometry, (cu_q, cu_k), **share), select(scores, value, geometry=geometry))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_equal_infinite_and_missing_scores():
    """Of equal scores the earlier block is taken, -0.0 is 0.0, and a NaN is the best of all."""
    geometry = Geometry(64, 64 * 8, 64, 64)
    rows = (
        [0.0, -0.0, 0.0, 0.0, -0.0, 0.0, 0.0, 0.0],
        [1.0, 2.0, 2.0, 2.0, 3.0, 2.0, -1.0, 0.0],
        [-math.inf, -math.inf, -5.0, -math.inf, -math.inf, -math.inf, -math.inf, -math.inf],
        [0.0, math.nan, -3.0, -2.0, -1e-38, 1e-38, -1e38, -1e-45],
    )
    scores = torch.tensor(rows, device=DEVICE)[None, :, None]
    got = route(scores, geometry, keep=3 / 8)
    wanted = [[0, 1, 2], [1, 2, 4], [0, 1, 2], [0, 1, 5]]
    assert got.rows[0, :, 0].tolist() == wanted
    same(got, select_top_k(scores, 3 / 8, geometry=geometry))
    same(route(scores, geometry, mass=0.9), select_mass(scores, 0.9, geometry=geometry))
    nothing = torch.full_like(scores, -math.inf)
    assert (
        route(nothing, geometry, mass=0.9).count.eq(1).all() and route(nothing, geometry, keep=1e-3).count.eq(1).all()
    )


@pytest.mark.parametrize(("queries", "keys", "causal"), [(300, 2000, False), (700, 500, True), (65, 64, True)])
@pytest.mark.parametrize(("keep", "skip"), [(0.1, 0.1), (0.05, 0.0), (0.6, 0.7), (1.0, 0.3)])
def test_three_classes_without_a_sort(queries, keys, causal, keep, skip):
    geometry = Geometry(queries, keys, 128, 64, causal)
    scores = scores_of(geometry, seed=queries)
    scores[..., ::3] = scores[..., :1].clone()  # ties at every rank
    got, wanted = route(scores, geometry, keep=keep, skip=skip), sla_blocks(scores, keep, skip, geometry=geometry)
    same(got, wanted)
    assert got.linear.dtype == torch.bool and torch.equal(got.linear, wanted.linear)
    check_blocks(got, geometry)


def test_counts_follow_the_share_where_float32_would_not():
    for n_k, keep in ((30, 0.1), (20, 0.05), (3000, 0.29), (1000, 0.007), (100, 0.57)):
        geometry = Geometry(64, 64 * n_k, 64, 64)
        got = route(scores_of(geometry, heads=1), geometry, keep=keep)
        assert got.count.item() == math.floor(keep * n_k + 1e-4) == got.rows.shape[-1]


def test_refusals_name_the_argument_and_operators_agree_with_their_fakes():
    geometry = Geometry(100, 300, 64, 64, True)
    scores = scores_of(geometry)
    for share in ({}, {"keep": 0.1, "mass": 0.1}, {"keep": 0.0}, {"mass": 1.5}):
        with pytest.raises(ValueError, match="keep, mass:"):
            route(scores, geometry, **share)
    with pytest.raises(ValueError, match=r"scores: torch\.float64"):
        route(scores.double(), geometry, keep=0.1)
    with pytest.raises(ValueError, match=r"N_q = 2 and N_k = 5"):
        route(scores[:, :, :1], geometry, keep=0.1)
    with pytest.raises(ValueError, match="16385 key blocks"):
        route(torch.zeros(1, 1, 1, 16385, device=DEVICE), Geometry(1, 64 * 16385, 64, 64), keep=0.1)
    for keep, mass in ((0.2, None), (None, 0.5)):
        arguments = (scores, keep, mass, 64, 64, 100, 300, True, None, None)
        torch.library.opcheck(sparse_linear_route, arguments, test_utils=("test_schema", "test_faketensor"))
    arguments = (scores, 0.2, 0.1, 64, 64, 100, 300, True)
    torch.library.opcheck(sparse_linear_classes, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("n_k", [512, 1182, 5000, 16384])
def test_long_rows(n_k):
    geometry = Geometry(1000, 64 * n_k - 5, 128, 64)
    scores = scores_of(geometry, heads=3)
    same(route(scores, geometry, keep=0.03), select_top_k(scores, 0.03, geometry=geometry))
    got, wanted = route(scores, geometry, mass=0.6), select_mass(scores, 0.6, geometry=geometry)
    assert (got.count - wanted.count).abs().max() <= 1
