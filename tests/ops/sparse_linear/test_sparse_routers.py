import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.sparse_linear.sparse_textbook import operands

from allears.ops.attention.call import Packing
from allears.ops.attention.sparse_linear import (
    Geometry,
    SparseLinear,
    block_scores,
    key_mean,
    map_from_blocks,
    pool_blocks,
    pooled_scores,
    select_mass,
    select_top_k,
    sla_blocks,
    spargeattn_blocks,
)
from allears.ops.attention.sparse_linear.blocks import check_blocks


def scores_of(geometry, batch=1, heads=2, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, geometry.n_q, geometry.n_k, generator=made)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 130])
def test_pools_are_the_means_of_the_rows_that_exist(length):
    x = torch.randn(2, length, 3, 5, dtype=torch.bfloat16)
    pools = pool_blocks(x, 64)
    assert pools.shape == (2, 3, -(-length // 64), 5) and pools.dtype == torch.float32
    for block in range(pools.shape[2]):
        wanted = x[:, block * 64 : (block + 1) * 64].double().mean(1)
        torch.testing.assert_close(pools[:, :, block].double(), wanted, atol=1e-6, rtol=1e-5)


def test_packed_pools_and_means_are_those_of_each_sequence():
    lengths, x = [5, 0, 130, 64], torch.randn(199, 2, 4, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    pools, means = pool_blocks(x, 64, offsets, 130), key_mean(x, offsets)
    assert pools.shape == (4, 2, 3, 4) and pools.dtype == torch.float64
    for s, length in enumerate(lengths):
        alone = x[None, offsets[s] : offsets[s + 1]]
        wanted = pool_blocks(alone, 64)[0]
        torch.testing.assert_close(pools[s, :, : wanted.shape[1]], wanted)
        assert (pools[s, :, wanted.shape[1] :] == 0).all()
        torch.testing.assert_close(means[s], alone.mean(1)[0] if length else torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="max_seqlen: None"):
        pool_blocks(x, 64, offsets)


def test_scores_pair_query_heads_with_the_key_head_they_share():
    q_pool, k_pool = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 4, 8)
    scores = block_scores(q_pool, k_pool, 0.5)
    for h in range(6):
        wanted = 0.5 * torch.einsum("bnd,bmd->bnm", q_pool[:, h], k_pool[:, h // 3])
        torch.testing.assert_close(scores[:, h], wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_pooled_scores_are_smoothed_where_nothing_looks_ahead(causal):
    q, k, _ = operands(70, 100)
    options = SparseLinear(block_q=64)
    bare = k if causal else k - k.mean(1, keepdim=True)
    wanted = block_scores(pool_blocks(q, 64), pool_blocks(bare, 64), 0.3)
    torch.testing.assert_close(pooled_scores(q, k, options, scale=0.3, causal=causal), wanted)
    offsets_q, offsets_k = torch.tensor([0, 70, 70], dtype=torch.int32), torch.tensor([0, 100, 100], dtype=torch.int32)
    packing = Packing(offsets_q, offsets_k, 70, 100)
    packed = pooled_scores(q[0], k[0], options, scale=0.3, causal=causal, packing=packing)
    torch.testing.assert_close(packed[:1], wanted)


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.sampled_from([64, 128]),
    st.booleans(),
    st.floats(0.01, 1),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_top_k_is_the_highest_scores_and_the_diagonal(queries, keys, block_q, causal, keep, seed):
    geometry = Geometry(queries, keys, block_q, 64, causal)
    scores = scores_of(geometry, seed=seed)
    blocks = select_top_k(scores, keep, geometry=geometry)
    check_blocks(blocks, geometry)
    map, visible, forced = map_from_blocks(blocks, geometry.n_k), geometry.visible(), geometry.forced()
    for h in range(2):
        for row in range(geometry.n_q):
            seen, must = visible[0, 0, row].nonzero().flatten().tolist(), forced[0, 0, row].nonzero().flatten().tolist()
            size = min(len(seen), max(1, math.floor(keep * len(seen) + 1e-4), len(must)))
            best = sorted((j for j in seen if j not in must), key=lambda j: -scores[0, h, row, j].item())
            wanted = set(must + best[: size - len(must)])
            assert set(map[0, h, row].nonzero().flatten().tolist()) == wanted


def test_top_k_counts_as_written():
    geometry = Geometry(128 * 2, 64 * 20, 128, 64)
    for keep, count in [(0.05, 1), (0.01, 1), (0.1, 2), (0.149, 2), (0.15, 3), (1.0, 20)]:
        blocks = select_top_k(scores_of(geometry), keep, geometry=geometry)
        assert (blocks.count == count).all() and blocks.rows.shape[-1] == count
    level = torch.zeros(1, 1, 2, 20)
    assert select_top_k(level, 0.15, geometry=geometry).rows[0, 0].tolist() == [[0, 1, 2]] * 2
    level[0, 0, 0, 5], level[0, 0, 1] = math.nan, -math.inf
    assert select_top_k(level, 0.1, geometry=geometry).rows[0, 0].tolist() == [[0, 5], [0, 1]]


def test_no_row_is_empty_but_of_a_sequence_without_keys():
    of_q, of_k = torch.tensor([1, 5, 0]), torch.tensor([1, 0, 9])
    geometry = Geometry(of_q, of_k, 128, 64, longest_q=5, longest_k=9)
    scores = scores_of(geometry, batch=3)
    for blocks in (select_top_k(scores, 0.01, geometry=geometry), select_mass(scores, 0.01, geometry=geometry)):
        assert blocks.count[:, 0, 0].tolist() == [1, 0, 0]
        check_blocks(blocks, geometry)


@given(st.integers(1, 500), st.integers(1, 500), st.booleans(), st.floats(0.05, 1), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_mass_is_reached_by_the_fewest_blocks(queries, keys, causal, mass, at_least):
    geometry = Geometry(queries, keys, 64, 64, causal)
    scores = scores_of(geometry) * 2
    blocks = select_mass(scores, mass, geometry=geometry, at_least=at_least)
    check_blocks(blocks, geometry)
    visible, forced = geometry.visible(), geometry.forced()
    map = map_from_blocks(blocks, geometry.n_k)
    shares = scores.double().masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0)
    assert ((shares * map).sum(-1) >= visible.any(-1) * (mass - 1e-5)).all()
    assert (blocks.count >= visible.sum(-1).clamp(max=at_least)).all()
    free = torch.where(map & ~forced, shares, 2.0).amin(-1)  # without its smallest free block a row would fall short
    spare = (blocks.count > at_least) & (free < 2)
    assert ((shares * map).sum(-1) - free < mass + 1e-5)[spare].all()
    outside = torch.where(visible & ~map, shares, -1.0).amax(-1)
    assert (outside <= free + 1e-9).all()


def test_sla_has_three_classes():
    geometry = Geometry(128, 64 * 20, 128, 64)
    scores = torch.randperm(20, generator=torch.Generator().manual_seed(0)).float().view(1, 1, 1, 20)
    blocks = sla_blocks(scores, 0.1, 0.25, geometry=geometry)
    by_rank = scores[0, 0, 0].argsort(descending=True)
    assert set(blocks.rows[0, 0, 0].tolist()) == set(by_rank[:2].tolist())
    assert set(blocks.linear[0, 0, 0].nonzero().flatten().tolist()) == set(by_rank[2:15].tolist())
    assert (sla_blocks(scores, 0.9, 0.5, geometry=geometry).linear == 0).all()
    causal = Geometry(300, 300, 128, 64, causal=True)
    some = sla_blocks(scores_of(causal), 0.2, 0.1, geometry=causal)
    check_blocks(some, causal)
    assert some.linear.any()


def unlike(block, dtype=torch.float32):
    """Rows that point everywhere: their mean says nothing."""
    return torch.randn(block, 16, generator=torch.Generator().manual_seed(5), dtype=dtype)


def test_spargeattn_never_leaves_out_a_block_of_unlike_rows():
    torch.manual_seed(0)
    along = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    k = torch.cat([along[i] + 0.1 * torch.randn(64, 16) for i in range(3)] + [unlike(64)])[None, :, None]
    q = torch.cat([along[0] + 0.1 * torch.randn(128, 16), unlike(128)])[None, :, None]
    plain = map_from_blocks(spargeattn_blocks(q, k, keep=0.25), 4)[0, 0]
    assert plain.sum(-1).tolist() == [1, 1] and plain[0, 0]
    map = map_from_blocks(spargeattn_blocks(q, k, keep=0.25, similarity=0.5), 4)[0, 0]
    assert map.tolist() == [[True, False, False, True], [True] * 4]
    cosines = torch.nn.functional.normalize(q[0, 128:, 0], dim=-1)
    of_block = (cosines @ cosines.T).mean().item()  # the threshold is the mean of all cosines, no more and no less
    for threshold, full in [(of_block - 1e-4, False), (of_block + 1e-4, True)]:
        picked = map_from_blocks(spargeattn_blocks(q, k, keep=0.25, similarity=threshold), 4)[0, 0, 1]
        assert picked.all() == full


@pytest.mark.parametrize("rule", [{"keep": 0.34}, {"mass": 0.5}])
def test_spargeattn_gives_unlike_keys_no_part_in_the_ranks(rule):
    """Block 1 has the best mean, which says little about its rows: it is read, and takes the place of no other."""
    torch.manual_seed(0)
    along = torch.nn.functional.normalize(torch.randn(16), dim=0) * 4
    k = torch.cat([along + 0.1 * torch.randn(64, 16), 1.5 * along + 6 * unlike(64), -along + 0.1 * torch.randn(64, 16)])
    q = (along + 0.1 * torch.randn(64, 16))[None, :, None]
    options = SparseLinear(form="sparse", smooth_k=False)
    bare = map_from_blocks(spargeattn_blocks(q, k[None, :, None], options=options, **rule), 3)[0, 0]
    assert bare.tolist() == [[False, True, False]]
    map = map_from_blocks(spargeattn_blocks(q, k[None, :, None], similarity=0.6, options=options, **rule), 3)[0, 0]
    assert map.tolist() == [[True, True, False]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", [{"keep": 0.4}, {"mass": 0.8}, {"keep": 0.3, "similarity": 0.05}])
def test_spargeattn_of_packed_sequences_is_that_of_each(causal, rule):
    lengths_q, lengths_k = [70, 0, 200], [150, 40, 90]
    offsets = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k)]
    q, k, _ = operands(270, 280, dtype=torch.float32)
    packed = spargeattn_blocks(q[0], k[0], causal=causal, packing=Packing(*offsets, 200, 150), **rule)
    map = map_from_blocks(packed, 3)
    for s in range(3):
        alone_q, alone_k = q[:, offsets[0][s] : offsets[0][s + 1]], k[:, offsets[1][s] : offsets[1][s + 1]]
        alone = spargeattn_blocks(alone_q, alone_k, causal=causal, **rule)
        geometry = Geometry.of(alone_q, alone_k, SparseLinear(), causal)
        check_blocks(alone, geometry)
        wanted = map_from_blocks(alone, geometry.n_k)[0]
        assert torch.equal(map[s, :, : wanted.shape[1], : wanted.shape[2]], wanted)
        assert map[s].sum() == wanted.sum()


def test_routers_say_what_is_wrong():
    geometry = Geometry(100, 100, 64, 64)
    scores = scores_of(geometry)
    for keep in (0.0, -1.0, 1.01, math.nan):
        with pytest.raises(ValueError, match="keep:"):
            select_top_k(scores, keep, geometry=geometry)
        with pytest.raises(ValueError, match="mass:"):
            select_mass(scores, keep, geometry=geometry)
    with pytest.raises(ValueError, match=r"N_q = 2 and N_k = 2"):
        select_top_k(scores[..., :1], 0.5, geometry=geometry)
    with pytest.raises(ValueError, match="at_least: 0"):
        select_mass(scores, 0.5, geometry=geometry, at_least=0)
    with pytest.raises(ValueError, match="skip: 1"):
        sla_blocks(scores, 0.5, 1.0, geometry=geometry)
    q, k, _ = operands(10, 10)
    for rule in ({}, {"keep": 0.1, "mass": 0.5}):
        with pytest.raises(ValueError, match="exactly one"):
            spargeattn_blocks(q, k, **rule)
    with pytest.raises(ValueError, match="similarity: 2"):
        spargeattn_blocks(q, k, keep=0.5, similarity=2.0)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
def test_a_gpu_routes_as_the_cpu_does(causal):
    options = SparseLinear()
    q, k, _ = operands(1000, 3000, size=64, dtype=torch.bfloat16, batch=2)
    geometry = Geometry.of(q, k, options, causal)
    wanted = pooled_scores(q, k, options, scale=0.125, causal=causal)
    scores = pooled_scores(q.cuda(), k.cuda(), options, scale=0.125, causal=causal)
    torch.testing.assert_close(scores.cpu(), wanted, atol=1e-5, rtol=1e-4)
    offsets = torch.tensor([0, 300, 300, 1000]).int(), torch.tensor([0, 2000, 2500, 3000]).int()
    packing = Packing(*offsets, 700, 2000)
    on_gpu = Packing(*(x.cuda() for x in offsets), 700, 2000)
    packed = pooled_scores(q[0].cuda(), k[0].cuda(), options, scale=0.125, causal=causal, packing=on_gpu)
    of_packed = Geometry.of(q[0], k[0], options, causal, packing), Geometry.of(q[0], k[0], options, causal, on_gpu)
    seen = of_packed[0].visible()
    wanted_packed = pooled_scores(q[0], k[0], options, scale=0.125, causal=causal, packing=packing)
    torch.testing.assert_close(packed.cpu() * seen, wanted_packed * seen, atol=1e-5, rtol=1e-4)
    for share in (0.01, 0.3, 1.0):
        for select in (select_top_k, select_mass):
            here = select(scores.cpu(), share, geometry=geometry)
            there = select(scores, share, geometry=geometry)
            if select is select_top_k:
                assert all(torch.equal(a, b.cpu()) for a, b in zip(here[:2], there[:2], strict=True))
            else:  # sums of a softmax in another order: a block more or less where the sum is just reached
                assert (here.count - there.count.cpu()).abs().max() <= 1
            here = select(packed.cpu(), share, geometry=of_packed[0])
            there = select(packed, share, geometry=of_packed[1])
            assert (here.count - there.count.cpu()).abs().max() <= (select is select_mass)
