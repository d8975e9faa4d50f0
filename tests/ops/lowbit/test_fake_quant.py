import math

import pytest
import torch
from tests.ops.lowbit.plain_autograd import fake_quantised_attention
from tests.ops.lowbit.textbook import dense, inputs, rel

from allears import AttentionSpec, attention
from allears.ops.attention.lowbit.fake_quant import quantised_backward, rounding_of, straight_through
from allears.ops.attention.lowbit.fake_quant_backward import drop_in_backward, matched_backward
from allears.ops.attention.lowbit.int8_reference import int8_forward
from allears.ops.attention.lowbit.nvfp4 import round_to_nvfp4
from allears.ops.attention.lowbit.nvfp4_reference import nvfp4_forward
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.rounding import UNROUNDED, rounded_forward


def gradients_of(queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, queries, 4, 16, generator=generator), torch.randn(1, 4, queries, generator=generator)


@pytest.mark.parametrize("smooth_q", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("lengths", [(1, 5), (30, 150), (140, 130)])
def test_without_rounding_both_are_the_derivative_of_attention(smooth_q, smooth_k, lengths):
    q, k, v = inputs(*lengths, heads=4, groups=2, offset=2.0)
    d_out, d_lse = gradients_of(*lengths)
    how = {"causal": True, "scale": 0.3}
    out, lse = rounded_forward(q, k, v, UNROUNDED, smooth_q=smooth_q, smooth_k=smooth_k, **how)
    _, _, wanted = dense(q, k, v, True, 0.3, d_out, d_lse)
    matched = matched_backward(d_out, q, k, v, lse, UNROUNDED, smooth_q=smooth_q, smooth_k=smooth_k, d_lse=d_lse, **how)
    drop_in = drop_in_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **how)
    for got in (matched, drop_in):
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=1e-4)


def straight_through_attention(q, k, v, numerics, options, scale, causal):
    """Attention as a graph of plain operations, every quantiser as ``straight_through``; one tile of keys."""
    rounding = rounding_of(numerics, options)
    smooth_q = numerics == "nvfp4"
    k_mean = k.mean(1, keepdim=True) if options.smooth_k else torch.zeros_like(k[:, :1])
    q_mean = torch.cat([x.mean(1, keepdim=True).expand_as(x) for x in q.split(128, dim=1)], 1) * smooth_q
    wide_k, wide_v = k - k_mean, straight_through(v, rounding.values)
    k4, q4 = straight_through(wide_k, rounding.keys), straight_through(q - q_mean, rounding.queries)
    wide_k, k4, wide_v, k_mean = (x.repeat_interleave(2, dim=2) for x in (wide_k, k4, wide_v, k_mean))
    logits = (torch.einsum("blhd,bnhd->bhln", q4, k4) + torch.einsum("blhd,bnhd->bhln", q_mean, wide_k)) * scale
    if causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).tril(k.shape[1] - q.shape[1]).bool(), -math.inf)
    weights = logits.softmax(-1)
    top = weights.detach().amax(-1, keepdim=True)
    rounded = weights + (rounding.weights(weights / top) * top - weights).detach()
    lse = logits.logsumexp(-1) + scale * torch.einsum("blhd,bnhd->bhl", q, k_mean)
    return torch.einsum("bhln,bnhd->blhd", rounded, wide_v), lse


@pytest.mark.parametrize("numerics", ["nvfp4", "int8_fp8"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
def test_matched_is_autograd_through_straight_quantisers(numerics, causal, smooth_k):
    options = LowBit(backward="matched", smooth_k=smooth_k)
    leaves = [x.requires_grad_() for x in inputs(110, 120, heads=4, groups=2, seed=3)]
    d_out, d_lse = gradients_of(110, 120)
    out, lse = fake_quantised_attention(*leaves, numerics=numerics, causal=causal, scale=0.3, options=options)
    got = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))
    graph = straight_through_attention(*leaves, numerics, options, 0.3, causal)
    wanted = torch.autograd.grad(graph, leaves, (d_out, d_lse))
    assert rel(out, graph[0]) < 5e-3 and rel(lse, graph[1]) < 1e-4
    for a, b in zip(got, wanted, strict=True):
        assert rel(a, b) < 3e-3  # single weights on a tie; the formulas differ by 1e-6 without rounding


@pytest.mark.parametrize("numerics", ["nvfp4", "int8_fp8"])
def test_forward_is_that_of_inference(numerics):
    q, k, v = inputs(50, 150, heads=4, groups=2, dtype=torch.bfloat16)
    plain = nvfp4_forward(q, k, v, causal=True) if numerics == "nvfp4" else int8_forward(q, k, v, pv="fp8", causal=True)
    for form in ("matched", "drop_in"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        got = fake_quantised_attention(*leaves, numerics=numerics, causal=True, options=LowBit(backward=form))
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
        gradients = torch.autograd.grad(got[0], leaves, torch.ones_like(q))
        assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in gradients)


def row_sums_of_d_logits(numerics, form):
    """A group of 16 channels in which all keys are 1 makes dQ there the sum of a row of dS (times the scale)."""
    q, k, v = inputs(70, 128, heads=4, groups=2, size=32, seed=5)
    k[..., 16:] = 1.0
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    options = LowBit(backward=form, smooth_k=False, smooth_q=False)
    out, lse = fake_quantised_attention(q, k, v, numerics=numerics, options=LowBit(smooth_k=False, smooth_q=False))
    d_q, _, _ = quantised_backward(d_out, q, k, v, out, lse, numerics=numerics, scale=None, options=options)
    return (d_q[..., 16:].norm() / d_q[..., :16].norm()).item()


@pytest.mark.parametrize(("numerics", "least"), [("nvfp4", 0.1), ("int8_fp8", 0.01)])
def test_rows_of_d_logits_sum_to_zero_only_if_matched(numerics, least):
    assert row_sums_of_d_logits(numerics, "matched") < 2e-5
    assert row_sums_of_d_logits(numerics, "drop_in") > least


def test_a_common_offset_of_keys_hurts_drop_in_alone():
    """Rows of dS that do not sum to 0 multiply the mean of K: dQ of drop_in drowns in it."""
    q, k, v = inputs(128, 256, heads=4, groups=2, offset=6.0)
    d_out, _ = gradients_of(128, 256)
    _, _, wanted = dense(q, k, v, d_out=d_out)
    errors = {}
    for form in ("matched", "drop_in"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, _ = fake_quantised_attention(*leaves, numerics="nvfp4", options=LowBit(backward=form))
        errors[form] = rel(torch.autograd.grad(out, leaves, d_out)[0], wanted[0])
    assert errors["matched"] < 0.25 and errors["drop_in"] > 2 * errors["matched"]


def test_straight_through():
    x = torch.randn(4, 32, requires_grad=True)
    rounded = straight_through(x, round_to_nvfp4)
    assert torch.equal(rounded, round_to_nvfp4(x))
    weights = torch.randn(4, 32)
    assert torch.equal(torch.autograd.grad(rounded, x, weights)[0], weights)


def test_queries_without_keys_have_no_gradient():
    for numerics in ("nvfp4", "int8_fp8"):
        for form in ("matched", "drop_in"):
            leaves = [x.requires_grad_() for x in inputs(9, 4)]
            options = LowBit(backward=form, smooth_q=False)  # else a query without keys moves the mean of its block
            out, lse = fake_quantised_attention(*leaves, numerics=numerics, causal=True, options=options)
            got = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
            assert got[0][:, :5].eq(0).all() and all(x.isfinite().all() and x.ne(0).any() for x in got)


def test_gradients_that_were_not_asked_for_are_refused():
    q, k, v = inputs(4, 4)
    out, lse = fake_quantised_attention(q, k, v, numerics="nvfp4")
    spec = AttentionSpec("reference", numerics="nvfp4")
    with pytest.raises(ValueError, match="lowbit options that train"):
        attention(q, k.requires_grad_(), v, spec)
    with pytest.raises(ValueError, match="matched"):
        quantised_backward(out, q, k, v, out, lse, numerics="nvfp4")
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, spec), out)
    with pytest.raises(ValueError, match="numerics"):
        fake_quantised_attention(q, k, v, numerics="int4", options=LowBit(backward="matched"))


def test_training_through_four_bits_learns():
    """A few steps through each form bring the low-bit output nearer to a target that it can reach."""
    torch.manual_seed(0)
    q, k, v = inputs(16, 32, size=16)
    target, _ = dense(*inputs(16, 32, size=16, seed=9))
    for form in ("matched", "drop_in"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        optimiser = torch.optim.Adam(leaves, lr=0.1)
        losses = []
        for _ in range(15):
            out, _ = fake_quantised_attention(*leaves, numerics="nvfp4", options=LowBit(backward=form))
            loss = (out - target).square().mean()
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        assert losses[-1] < 0.4 * losses[0]
