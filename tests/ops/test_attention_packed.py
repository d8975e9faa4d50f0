"""Packed sequences (cu_seqlens): each kernel against a loop over the sequences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears import AttentionSpec, attention, explain

KERNELS = ["reference", "sdpa", "sdpa-math", "sdpa-flash"]


def pack(lengths_q, lengths_k, heads=4, groups=2, size=8, dtype=torch.float64):
    torch.manual_seed(sum(lengths_q) + 7 * sum(lengths_k))
    q = torch.randn(sum(lengths_q), heads, size, dtype=dtype)
    k, v = torch.randn(2, sum(lengths_k), groups, size, dtype=dtype)
    offsets = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)]
    return q, k, v, *offsets


def one_by_one(q, k, v, cu_q, cu_k, causal):
    outs, lses = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        spec = AttentionSpec(kernel="reference", causal=causal)
        out, lse = attention(q[None, a:b], k[None, c:d], v[None, c:d], spec, return_lse=True)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_a_loop_over_sequences(kernel, causal):
    """Among them a sequence without queries, one without keys, one of length 1 and one with more queries than keys."""
    data = pack([5, 0, 1, 7, 3], [5, 2, 1, 4, 0])
    leaves = [x.requires_grad_() for x in data[:3]]
    wanted, wanted_lse = one_by_one(*leaves, *data[3:], causal)
    wanted.square().sum().backward()
    grads = [x.grad.clone() for x in leaves]
    for leaf in leaves:
        leaf.grad = None
    out = attention(*leaves, AttentionSpec(kernel=kernel, causal=causal), cu_seqlens_q=data[3], cu_seqlens_k=data[4])
    torch.testing.assert_close(out, wanted)
    out.square().sum().backward()
    for leaf, grad in zip(leaves, grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    if kernel in ("reference", "sdpa-flash"):
        lse = attention(
            *leaves,
            AttentionSpec(kernel=kernel, causal=causal),
            cu_seqlens_q=data[3],
            cu_seqlens_k=data[4],
            max_seqlen_q=9,
            max_seqlen_k=6,
            return_lse=True,
        )[1]
        assert lse.shape == (4, 16)
        torch.testing.assert_close(lse, wanted_lse)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5),
    causal=st.booleans(),
)
def test_any_lengths(lengths, causal):
    data = pack([a for a, _ in lengths], [b for _, b in lengths])
    out, lse = attention(
        *data[:3], AttentionSpec(causal=causal), cu_seqlens_q=data[3], cu_seqlens_k=data[4], return_lse=True
    )
    wanted, wanted_lse = one_by_one(*data, causal)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_in_its_sequence(kernel):
    """The first sequence is the shorter one: where it is padded, the packed rows behind it hold NaN."""
    q, k, v, cu_q, cu_k = pack([3, 4], [3, 4])
    spec = AttentionSpec(kernel=kernel)
    clean = attention(q, k, v, spec, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    v[3], k[4] = math.nan, math.inf
    out = attention(q, k, v, spec, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert torch.equal(out[:3], clean[:3]) and out[3:].isnan().all()


def test_compiles_whole_with_given_maxima():
    q, k, v, cu_q, cu_k = pack([5, 2], [3, 4])

    def run(q, k, v, cu_q, cu_k, longest=5):
        spec = AttentionSpec(causal=True)
        return attention(
            q, k, v, spec, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest, max_seqlen_k=4, return_lse=True
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, cu_q, cu_k)
    for a, b in zip(compiled, run(q, k, v, cu_q, cu_k), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(Exception, match="give it as an int"):
        torch.compile(lambda *x: run(*x, longest=None), fullgraph=True, backend="eager")(q, k, v, cu_q, cu_k)


def test_explain_prefers_kernels_that_need_no_padding():
    q, k, v, cu_q, cu_k = pack([5, 2], [3, 4])
    choice = explain(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert choice.kernel == "sdpa-flash" and choice.able == ("sdpa", "sdpa-math", "reference")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 7, 4, 8, dtype=torch.float64)}, "q: shape"),
        ({"cu_seqlens_k": None}, "without the other"),
        ({"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": 5}, "q: shape"),
        ({"cu_seqlens_q": torch.tensor([0, 5, 8])}, "from 0 to the number of rows of q"),
        ({"cu_seqlens_q": torch.tensor([0, 8, 7])}, "must rise"),
        ({"cu_seqlens_q": torch.tensor([0.0, 5.0, 7.0])}, "int32 or int64"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 4, 7])}, "one more than there are sequences"),
        ({"max_seqlen_k": 3}, "the longest sequence has 4"),
        ({"mask": torch.ones(7, 7, dtype=torch.bool)}, "mask: packed sequences"),
    ],
)
def test_bad_packing(change, message):
    q, k, v, cu_q, cu_k = pack([5, 2], [3, 4])
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_maxima_need_offsets():
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match="without cu_seqlens"):
        attention(q, q, q, max_seqlen_q=2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa-flash", "sdpa-cudnn", "sdpa", "flash-attn-4"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [64, 72])
def test_gpu_kernels_equal_the_loop(kernel, causal, size):
    data = [x.cuda() for x in pack([63, 1, 100], [163, 77, 100], size=size, dtype=torch.bfloat16)]
    packing = {"cu_seqlens_q": data[3], "cu_seqlens_k": data[4], "max_seqlen_q": 100, "max_seqlen_k": 163}
    spec = AttentionSpec(kernel=kernel, causal=causal)
    choice = explain(*data[:3], AttentionSpec(causal=causal), **packing)
    if kernel != choice.kernel and kernel not in choice.able:
        pytest.skip(choice.refused[kernel])
    leaves = [x.requires_grad_() for x in data[:3]]
    wanted = one_by_one(*leaves, *data[3:], causal)[0]
    grads = torch.autograd.grad(wanted.float().square().sum(), leaves)
    out = attention(*leaves, spec, **packing)
    pairs = [(out, wanted), *zip(torch.autograd.grad(out.float().square().sum(), leaves), grads, strict=True)]
    for a, b in pairs:
        assert (a.float() - b.float()).norm() / b.float().norm() < 0.02
