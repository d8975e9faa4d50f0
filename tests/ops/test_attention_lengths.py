"""Padded batches with lengths: each entry gives what it gives alone, on every family, with gradients.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size.
"""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from allears import AttentionSpec, LowBit, attention, explain, key_lengths_from_mask
from allears.ops.attention import Sparsity

KEYS, QUERIES = [140, 0, 5, 131], [9, 3, 0, 1]
SPECS = {
    "exact": AttentionSpec(),
    "int8_fp8": AttentionSpec(numerics="int8_fp8", lowbit=LowBit(backward="matched")),
    "int8_fp16": AttentionSpec(numerics="int8_fp16"),
    "sagebwd": AttentionSpec(numerics="sagebwd"),
    "sagebwd, smoothed Q": AttentionSpec(numerics="sagebwd", lowbit=LowBit(smooth_q=True)),
    "nvfp4": AttentionSpec(numerics="nvfp4", lowbit=LowBit(backward="drop_in")),
    "sparse": AttentionSpec(sparse=Sparsity(keep=0.5, block_q=64)),
}


def inputs(dtype=torch.float32):
    """B = 4, L_q = 9, L_k = 140, H = 4, G = 2, D = 16."""
    torch.manual_seed(0)
    return torch.randn(4, 9, 4, 16, dtype=dtype), *torch.randn(2, 4, 140, 2, 16, dtype=dtype).unbind()


def spec_of(name, causal=False):
    known = SPECS[name]
    return AttentionSpec("auto", causal, None, known.numerics, known.lowbit, known.sparse)


def alone(q, k, v, spec, queries, keys):
    """Each entry by itself, zeros and -inf behind its queries."""
    out, lse = q.new_zeros(q.shape), torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=q.dtype)
    for b, (rows, seen) in enumerate(zip(queries, keys, strict=True)):
        if rows:
            x, y = attention(q[b : b + 1, :rows], k[b : b + 1, :seen], v[b : b + 1, :seen], spec, return_lse=True)
            out[b, :rows], lse[b, :, :rows] = x[0], y[0]
    return out, lse


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [None, QUERIES])
def test_each_entry_as_alone(name, causal, queries):
    """Among them one with all keys, one without any, fewer keys than queries (causal: queries that see none)."""
    leaves = [x.requires_grad_() for x in inputs()]
    spec = spec_of(name, causal)
    rows = None if queries is None else torch.tensor(queries)
    trains = name != "int8_fp16"
    with torch.set_grad_enabled(trains):
        got = attention(*leaves, spec, key_lengths=torch.tensor(KEYS), query_lengths=rows, return_lse=True)
        wanted = alone(*leaves, spec, queries or [9] * 4, KEYS)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)
    assert not got[0][1].any() and got[1][1].eq(-math.inf).all()
    assert got[0][0].any()
    assert torch.equal(
        attention(*(x.detach() for x in leaves), spec, key_lengths=torch.tensor(KEYS), query_lengths=rows), got[0]
    )
    if trains:
        weights = torch.randn(got[0].shape)
        made, right = (torch.autograd.grad((x * weights).sum(), leaves) for x in (got[0], wanted[0]))
        torch.testing.assert_close(made, right, atol=1e-5, rtol=1e-4)
        for b, seen in enumerate(KEYS):
            assert not made[1][b, seen:].any() and not made[2][b, seen:].any()


@pytest.mark.parametrize("name", SPECS)
def test_the_mask_says_the_same(name):
    """Exact attention with the mask and low-bit attention with its lengths differ by the rounding alone."""
    q, k, v = inputs()
    mask = torch.arange(140) < torch.tensor(KEYS)[:, None]
    lengths = key_lengths_from_mask(mask)
    out = attention(q, k, v, spec_of(name), key_lengths=lengths)
    wanted = attention(q, k, v, mask=mask[:, None, None])
    if name == "sparse":  # two key blocks of three are read in long entries
        out, wanted = out[1:3], wanted[1:3]
    off = (out - wanted).norm() / wanted.norm()
    assert off < {"exact": 1e-6, "sparse": 1e-6, "nvfp4": 0.25}.get(name, 0.05)


@pytest.mark.parametrize("name", ["int8_fp8", "sagebwd", "nvfp4", "sparse"])
def test_nothing_behind_a_length_counts(name):
    q, k, v = inputs()
    k[3, 131:], v[2, 5:] = math.nan, math.inf
    lengths = {"key_lengths": torch.tensor(KEYS), "query_lengths": torch.tensor([4, 9, 9, 9])}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, spec_of(name), **lengths, return_lse=True)
    assert out.isfinite().all() and not lse.isnan().any() and not out[0, 4:].any()
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_explain_says_the_form():
    q, k, v = inputs()
    lengths = {"key_lengths": torch.tensor(KEYS)}
    assert explain(q, k, v).form == ""
    assert explain(q, k, v, **lengths).form == "lengths as a boolean mask"
    for name in ("int8_fp8", "sagebwd", "nvfp4", "sparse"):
        choice = explain(q, k, v, spec_of(name), **lengths)
        assert (choice.kernel, choice.form) == ("reference", "lengths as packed sequences, where they lie")
    mask = torch.ones(4, 1, 1, 140, dtype=torch.bool)
    for name in ("int8_fp8", "sparse"):
        for call in (explain, attention):
            with pytest.raises(ValueError, match=r"for padded keys key_lengths=key_lengths_from_mask\(mask\)"):
                call(q, k, v, spec_of(name), mask)


@pytest.mark.parametrize("name", ["exact", "sagebwd"])
def test_compiles_whole(name):
    spec, counter = spec_of(name), CompileCounter()
    q, k, v = inputs()
    run = torch.compile(
        lambda q, k, v, n: attention(q, k, v, spec, key_lengths=n), fullgraph=True, backend=counter, dynamic=False
    )
    for keys in (KEYS, KEYS[::-1]):
        lengths = torch.tensor(keys)
        assert torch.equal(run(q, k, v, lengths), attention(q, k, v, spec, key_lengths=lengths))
    assert counter.frame_count == 1


def test_what_does_not_fit_is_refused():
    q, k, v = inputs()
    lengths = torch.tensor(KEYS)
    for wrong, match in (
        ([1, 2, 3, 4], "key_lengths: list given"),
        (lengths[:3], r"it must be int32 or int64 of shape \(B,\) = \(4,\)"),
        (lengths.float(), "torch.float32"),
        (lengths + 1, r"\[141, 1, 6, 132\] given; each must be from 0 to 140"),
        (lengths.to("meta"), "on meta given"),
    ):
        with pytest.raises(ValueError, match=match):
            attention(q, k, v, key_lengths=wrong)
    with pytest.raises(ValueError, match=r"query_lengths: .+ from 0 to 9"):
        attention(q, k, v, query_lengths=lengths)
    with pytest.raises(ValueError, match="given beside mask"):
        attention(q, k, v, mask=torch.ones(9, 140, dtype=torch.bool), key_lengths=lengths)
    ends = torch.tensor([0, 36]).int()
    with pytest.raises(ValueError, match="given beside cu_seqlens"):
        attention(q.flatten(0, 1), q.flatten(0, 1), q.flatten(0, 1), cu_seqlens_q=ends, cu_seqlens_k=ends,
                  key_lengths=lengths)  # fmt: skip
    for name in SPECS:
        assert attention(q[:0], k[:0], v[:0], spec_of(name), key_lengths=lengths[:0]).shape == (0, 9, 4, 16)


def test_lengths_of_masks():
    look = torch.arange(5) < torch.tensor([5, 0, 3])[:, None]
    added = torch.zeros(3, 5).masked_fill(~look, -math.inf)
    for mask in (look, look[:, None], look[:, None, None], look[:, None, None].expand(3, 2, 4, 5), added):
        lengths = key_lengths_from_mask(mask)
        assert lengths.dtype == torch.int32 and lengths.tolist() == [5, 0, 3]
    # what diffusers adds; softmax does not see a number that all keys share
    for dtype in (torch.float32, torch.bfloat16):
        assert key_lengths_from_mask((1 - look.to(dtype)[:, None]) * -10000.0).tolist() == [5, 5, 3]
    assert key_lengths_from_mask(look[:0]).shape == (0,) and key_lengths_from_mask(look[:, :0]).tolist() == [0, 0, 0]


def test_masks_that_are_no_lengths():
    look = (torch.arange(5) < torch.tensor([5, 3])[:, None])[:, None, None].expand(2, 2, 4, 5)
    heads, queries = look.clone(), look.clone()
    heads[1, 1, :, 2] = False
    queries[0, :, 2, 4] = False
    for mask, match in (
        (look.flip(-1), "padding at the left, or a hole"),
        (heads, "heads look at different keys"),
        (queries, "queries look at different keys"),
        (torch.full((2, 5), -1.0), "neither 0 nor -9000 or less"),
        (torch.zeros(2, 5).masked_fill(torch.eye(5, dtype=torch.bool)[:2], math.nan), "neither 0"),
        (torch.ones(2, 5, dtype=torch.int64), "dtype torch.int64"),
        (torch.ones(2, 4, 5, dtype=torch.bool), r"shape \(2, 4, 5\)"),
        ([True], "mask: list given"),
    ):
        with pytest.raises(ValueError, match=match):
            key_lengths_from_mask(mask)
