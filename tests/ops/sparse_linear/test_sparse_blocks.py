import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.ops.attention.sparse_linear import (
    Blocks,
    Geometry,
    SparseLinear,
    blocks_from_map,
    columns_of,
    linear_weights,
    map_from_blocks,
)
from allears.ops.attention.sparse_linear.blocks import check_blocks

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 5), st.integers(0, 6))


def drawn_map(sizes, density, seed):
    return torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < density


@given(SIZES, st.floats(0, 1), st.integers(0, 99), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_map_survives_its_row_lists(sizes, density, seed, trimmed):
    map = drawn_map(sizes, density, seed)
    width = int(map.sum(-1).max()) if trimmed and map.numel() else None
    blocks = blocks_from_map(map, width=width)
    assert torch.equal(map_from_blocks(blocks, sizes[3]), map)
    assert blocks.rows.dtype == blocks.count.dtype == torch.int32
    assert blocks.rows.shape == (*sizes[:3], sizes[3] if width is None else width)
    for row, wanted in zip(blocks.rows.flatten(0, 2), map.flatten(0, 2), strict=True):
        filled = wanted.nonzero().flatten().tolist()
        assert row.tolist() == filled + [-1] * (len(row) - len(filled))


@given(SIZES, st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_columns_are_the_transposed_map(sizes, density, seed):
    map = drawn_map(sizes, density, seed)
    blocks = blocks_from_map(map)
    junk = Blocks(blocks.rows.masked_fill(blocks.rows < 0, 3), blocks.count)  # only the first count are read
    for lists in (blocks, junk):
        start, index = columns_of(lists, sizes[3])
        assert start.dtype == index.dtype == torch.int32
        assert start.shape == (*sizes[:2], sizes[3] + 1) and index.shape == (blocks.rows.numel(),)
        for b in range(sizes[0]):
            for h in range(sizes[1]):
                for j in range(sizes[3]):
                    column = index[start[b, h, j] : start[b, h, j + 1]]
                    assert column.tolist() == map[b, h, :, j].nonzero().flatten().tolist()
        assert (index[int(map.sum()) :] == -1).all()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 7), st.booleans())
@settings(max_examples=150, deadline=None)
def test_sight_of_blocks_is_that_of_their_rows(queries, keys, block_q, block_k, causal):
    geometry = Geometry(queries, keys, block_q, block_k, causal)
    tokens, visible, full = geometry.tokens()[0, 0], geometry.visible()[0, 0], geometry.full()[0, 0]
    forced, partial = geometry.forced()[0, 0], geometry.partial()[0, 0]
    assert visible.shape == (geometry.n_q, geometry.n_k) == (-(-queries // block_q), -(-keys // block_k))
    for i in range(queries):
        for j in range(keys):
            assert tokens[i, j] == (not causal or j <= i + keys - queries)
    for row in range(geometry.n_q):
        for column in range(geometry.n_k):
            of = tokens[row * block_q : (row + 1) * block_q, column * block_k : (column + 1) * block_k]
            assert visible[row, column] == of.any()
            assert full[row, column] == of.all()
            assert partial[row, column] == (of.any() and not of.all())
    assert not (partial & ~forced).any() and not (forced & ~visible).any()
    if causal:  # every row that sees a key sees one in a forced block
        wide = forced.repeat_interleave(block_q, 0)[:queries].repeat_interleave(block_k, 1)[:, :keys]
        assert torch.equal((wide & tokens).any(-1), tokens.any(-1))
    else:
        assert not forced.any()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_have_their_own_geometry(causal):
    lengths = [(5, 9), (0, 3), (17, 0), (12, 4), (3, 20)]
    of_q, of_k = (torch.tensor(x) for x in zip(*lengths, strict=True))
    together = Geometry(of_q, of_k, 4, 3, causal, longest_q=17, longest_k=20)
    assert (together.n_q, together.n_k) == (5, 7)
    for s, (queries, keys) in enumerate(lengths):
        alone = Geometry(queries, keys, 4, 3, causal)
        for name in ("visible", "full", "partial", "forced", "tokens"):
            wanted, got = getattr(alone, name)()[0, 0], getattr(together, name)()[s, 0]
            assert torch.equal(got[: wanted.shape[0], : wanted.shape[1]], wanted), name
            assert got.sum() == wanted.sum(), name


def test_linear_branch_takes_what_the_rows_leave():
    geometry = Geometry(300, 300, 128, 64, causal=True)
    map = geometry.forced().clone()
    map[..., 2, 0] = True
    weights = linear_weights(blocks_from_map(map), geometry)
    assert weights[0, 0].int().tolist() == [[0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]
    some = torch.zeros_like(map)
    some[..., 2, 1] = True
    assert torch.equal(linear_weights(blocks_from_map(map, some), geometry), some)
    full = Geometry(130, 130, 64, 64)
    assert torch.equal(
        linear_weights(blocks_from_map(torch.eye(3).bool()[None, None]), full), ~torch.eye(3).bool()[None, None]
    )


def of(rows, count, linear=None):
    tensor = torch.tensor(rows, dtype=torch.int32)[None, None]
    return Blocks(tensor, torch.tensor(count, dtype=torch.int32)[None, None], linear)


@pytest.mark.parametrize(
    ("blocks", "causal", "complaint"),
    [
        (of([[0, 3], [0, 1]], [2, 2]), False, "outside 0 to 2"),
        (of([[0, -1], [0, 1]], [2, 2]), False, "outside 0 to 2"),
        (of([[0, 1], [0, 1]], [2, 3]), False, "exceeds their width 2"),
        (of([[1, 0], [0, 1]], [2, 2]), False, "rising"),
        (of([[1, 1], [0, 1]], [2, 2]), False, "rising"),
        (of([[0, -1], [-1, -1]], [1, 0]), False, "count 0"),
        (of([[1, 2], [1, 2]], [2, 2]), True, "no row of the query block sees"),
        (of([[0, -1], [0, -1]], [1, 1]), True, "partly visible"),
        (of([[0, -1], [1, 2]], [1, 2], torch.tensor([[0, 1, 0], [0, 1, 0]]).bool()[None, None]), False, "in rows"),
        (of([[1, -1], [1, 2]], [1, 2], torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()[None, None]), True, "in full"),
    ],
)
def test_broken_lists_are_named(blocks, causal, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_blocks(blocks, Geometry(128, 192, 64, 64, causal))


def test_broken_arguments_are_named():
    with pytest.raises(ValueError, match="width: 1 given, but a row has 2"):
        blocks_from_map(torch.ones(1, 1, 1, 2).bool(), width=1)
    with pytest.raises(ValueError, match=r"map: torch\.float32"):
        blocks_from_map(torch.ones(1, 1, 1, 2))
    with pytest.raises(ValueError, match="longest_k: None"):
        Geometry(torch.tensor([3]), torch.tensor([3]), 4, 4, longest_q=3)
    with pytest.raises(ValueError, match="block_q: 0"):
        Geometry(3, 3, 0, 4)
    for field, value in [("form", "slam"), ("block_q", 96), ("block_k", 128), ("feature_map", "gelu")]:
        with pytest.raises(ValueError, match=f"{field}: {value!r} given"):
            SparseLinear(**{field: value})
    with pytest.raises(ValueError, match="smooth_k: 1 given"):
        SparseLinear(smooth_k=1)
