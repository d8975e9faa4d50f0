"""SageBwd with smoothed queries, by its reference: against the mathematics, exact attention, and itself without.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size.
"""

import math

import pytest
import torch
from tests.ops.lowbit.plain_autograd import sagebwd_attention
from tests.ops.lowbit.test_sagebwd_reference import int8
from tests.ops.lowbit.textbook import dense, inputs, rel, seen_keys

from allears import AttentionSpec, attention
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import quantise_int8_blocks, quantise_int8_rows
from allears.ops.attention.lowbit.sagebwd_reference import sagebwd_backward, sagebwd_forward

LENGTHS = [(1, 7), (63, 130), (130, 63), (300, 300)]


def with_offsets(q, size=4.0):
    """q with an offset that each block of 128 queries shares, another one in each block and head."""
    blocks = -(-q.shape[1] // 128)
    offsets = size * torch.randn(blocks, *q.shape[2:], generator=torch.Generator().manual_seed(5))
    return (q + offsets.repeat_interleave(128, 0)[: q.shape[1]]).to(q.dtype)


def errors(q, k, v, options, causal=False, d_lse=None):
    """Relative L2 of O, dQ, dK and dV against exact attention."""
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)
    out, _, saved = sagebwd_forward(q, k, v, causal=causal, options=options)
    got = sagebwd_backward(d_out, saved, d_lse=d_lse, causal=causal, options=options)
    exact, _, wanted = dense(q, k, v, causal, d_out=d_out, d_lse=d_lse)
    return [rel(a, b) for a, b in zip((out, *got), (exact, *wanted), strict=True)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_equal_the_textbook(lengths, causal):
    """One head and tile at a time, in float64: the INT8 product of the centred Q and the exact one of its mean."""
    q, k, v = inputs(*lengths, heads=4, groups=2)
    q, (queries, keys) = with_offsets(q), lengths
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    options = LowBit(smooth_q=True)
    out, _, saved = sagebwd_forward(q, k, v, causal=causal, scale=0.3, options=options)
    mean = torch.cat([x.mean(1, keepdim=True).expand_as(x) for x in q.split(128, dim=1)], 1)
    smoothed = k - k.mean(1, keepdim=True)
    q8, q_scale = quantise_int8_rows(q - mean)
    k8, k_scale = quantise_int8_blocks(smoothed)
    torch.testing.assert_close(saved.q_scale, q_scale, rtol=1e-4, atol=1e-6)
    d_q, d_k = torch.zeros(q.shape[1:]).double(), torch.zeros(k.shape[1:]).double()
    for h in range(4):
        g = h // 2
        step = k_scale[0, g].double().repeat_interleave(128)[:keys]
        of_q, scale = q8[0, :, h].double(), q_scale[0, h].double().unsqueeze(-1)
        logits = of_q * scale @ (k8[0, :, g].double() * step[:, None]).T
        logits = (logits + mean[0, :, h].double() @ smoothed[0, :, g].double().T) * 0.3
        for i in range(queries):
            logits[i, seen_keys(i, queries, keys, causal) :] = -math.inf
        seen = logits[:, :1] != -math.inf
        torch.testing.assert_close(
            saved.lse[0, h][seen[:, 0]].double(), logits.logsumexp(-1)[seen[:, 0]], rtol=1e-5, atol=1e-4
        )
        p = torch.where(logits == -math.inf, 0.0, (logits - saved.lse[0, h].double()[:, None]).exp())
        d_rows = d_out[0, :, h].double()
        d_s = p * (d_rows @ v[0, :, g].double().T - (d_rows * out[0, :, h].double()).sum(-1, keepdim=True))
        d_k[:, g] += d_s.T @ mean[0, :, h].double() * 0.3
        for i in range(0, queries, 64):
            for j in range(0, keys, 128):
                row, column = slice(i, i + 64), slice(j, j + 128)
                eight, grain = int8(d_s[row, column] * scale[row], 0)
                d_k[column, g] += eight.T @ of_q[row] * grain.T * 0.3
                eight, grain = int8(d_s[row, column], 1)
                d_q[row, h] += eight @ k8[0, column, g].double() * grain * k_scale[0, g, j // 128].double() * 0.3
    got = sagebwd_backward(d_out, saved, causal=causal, scale=0.3, options=options)
    assert rel(got[0][0], d_q) < 2e-3 and rel(got[1][0], d_k) < 2e-3  # an integer half way may fall either side


@pytest.mark.parametrize("grain", ["row", "tile"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_errors_without_offsets_are_those_of_q_as_given(lengths, causal, grain):
    q, k, v = inputs(*lengths, heads=4, groups=2, size=64)
    d_lse = torch.randn(1, 4, lengths[0], generator=torch.Generator().manual_seed(2))
    plain, smooth = (errors(q, k, v, LowBit(smooth_q=x, grad_scales=grain), causal, d_lse) for x in (None, True))
    assert all(a < 1.05 * b + 5e-4 for a, b in zip(smooth, plain, strict=True))


@pytest.mark.parametrize("grain", ["row", "tile"])
@pytest.mark.parametrize("causal", [False, True])
def test_offsets_of_blocks_cost_nothing_any_more(grain, causal):
    """Q's offset would take the levels of its INT8: without it the error of O is half as large."""
    q, k, v = inputs(300, 300, heads=4, groups=2, size=64)
    q = with_offsets(q)
    plain, smooth = (errors(q, k, v, LowBit(smooth_q=x, grad_scales=grain), causal) for x in (None, True))
    assert smooth[0] < 0.014 < 0.025 < plain[0] and smooth[0] < 0.55 * plain[0]
    assert all(a < 0.78 * b for a, b in zip(smooth, plain, strict=True))


def test_a_block_of_one_mean_and_no_rest():
    """Q that is the same within each block has nothing to quantise: the scores are the correction alone."""
    q, k, v = inputs(130, 150)
    q = with_offsets(q * 0, 1.0)
    out, lse, saved = sagebwd_forward(q, k, v, options=LowBit(smooth_q=True))
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    exact, exact_lse, wanted = dense(q, k, v, d_out=d_out)
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
    got = sagebwd_backward(d_out, saved, options=LowBit(smooth_q=True))
    assert rel(out, exact) < 0.02 and rel(got[1], wanted[1]) < 0.01  # dK is the exact product alone


@pytest.mark.parametrize("smooth_k", [False, True])
def test_the_log_sum_exp_is_that_of_the_given_q_and_k(smooth_k):
    q, k, v = inputs(140, 130, heads=4, groups=2, offset=4.0)
    q = with_offsets(q, 1.0)
    _, lse, _ = sagebwd_forward(q, k, v, causal=True, options=LowBit(smooth_q=True, smooth_k=smooth_k))
    wanted = dense(q, k, v, True)[1]
    assert torch.equal(lse.isinf(), wanted.isinf())
    torch.testing.assert_close(lse[..., 10:].double(), wanted[..., 10:], atol=0.1, rtol=0)


def test_through_the_door_and_packed():
    """The operator has the gradients of the reference, and packed sequences have means of their own."""
    options = LowBit(smooth_q=True)
    spec = AttentionSpec("reference", True, numerics="sagebwd", lowbit=options)
    q, k, v = (x.requires_grad_() for x in inputs(140, 150, heads=4, groups=2))
    d_out, d_lse = torch.randn(q.shape), torch.randn(1, 4, 140)
    got, wanted = (
        torch.autograd.grad(results, (q, k, v), (d_out, d_lse))
        for results in (
            attention(q, k, v, spec, return_lse=True),
            sagebwd_attention(q, k, v, causal=True, options=options),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    cu = {"cu_seqlens_q": torch.tensor([0, 30, 140]).int(), "cu_seqlens_k": torch.tensor([0, 20, 150]).int()}
    packed = attention(q[0], k[0], v[0], spec, **cu)
    for of_q, of_k in ((slice(0, 30), slice(0, 20)), (slice(30, 140), slice(20, 150))):
        assert torch.equal(packed[of_q], attention(q[:, of_q], k[:, of_k], v[:, of_k], spec)[0])


def test_what_is_not_finite_is_never_hidden():
    q, k, v = inputs(140, 20)
    q[0, 3, 0, 2] = math.nan
    d_out = torch.ones_like(q)
    out, _, saved = sagebwd_forward(q, k, v, options=LowBit(smooth_q=True))
    assert out[0, :128, 0].isnan().all() and out[0, 128:].isfinite().all() and out[0, :, 1].isfinite().all()
    d_q, d_k, _ = sagebwd_backward(d_out, saved, options=LowBit(smooth_q=True))
    assert d_q[0, :128, 0].isnan().all() and d_q[0, 128:].isfinite().all() and d_k.isnan().all()
