import math
from functools import cache

import pytest
import torch
from tests.ops.lowbit.plain_autograd import sagebwd_attention
from tests.ops.lowbit.textbook import TILE, attend, dense, inputs, rel, seen_keys

from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import quantise_int8_blocks, quantise_int8_rows
from allears.ops.attention.lowbit.sagebwd_reference import sagebwd_backward, sagebwd_forward
from allears.ops.attention.lowbit.varlen import over_sequences


def int8(x, shared, top=127):
    """float64 values on a grid that all elements along ``shared`` share, as integers up to ``top``, and the step."""
    step = x.abs().amax(shared, keepdim=True) / top
    return (x / torch.where(step > 0, step, 1)).round(), step


def textbook_forward(q, k, v, causal, scale, p_top=127):
    smoothed = k.float() - k.float().mean(1, keepdim=True)
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (
        quantise_int8_rows(q),
        quantise_int8_blocks(smoothed),
        quantise_int8_blocks(v),
    )
    ratio = q.shape[2] // k.shape[2]
    k_wide = k8[0].double() * k_scale[0].double().repeat_interleave(TILE, 1)[:, : k.shape[1]].T.unsqueeze(-1)

    def logits_of(h, i):
        return k_wide[:, h // ratio] @ q8[0, i, h].double() * q_scale[0, h, i].double() * scale

    def product(h, weights, tile):
        p8, step = int8(weights, 0, p_top)
        return p8 @ v8[0, tile, h // ratio].double() * step * v_scale[0, h // ratio, tile.start // TILE].double()

    out, lse = attend(logits_of, product, q.shape[1], k.shape[1], q.shape[2], q.shape[3], causal)
    return out, lse, logits_of


def textbook_backward(d_out, saved, logits_of, causal, scale, grad_scales, p_top=127):
    """Head by head and tile by tile, as the papers write it, in float64."""
    queries, heads, size = d_out.shape[1:]
    keys, groups = saved.k8.shape[1:3]
    d_q, d_k, d_v = (torch.zeros(n, h, size, dtype=torch.float64) for n, h in ((queries, heads), *[(keys, groups)] * 2))
    for h in range(heads):
        g = h // (heads // groups)
        logits = torch.stack([logits_of(h, i) for i in range(queries)])
        for i in range(queries):
            logits[i, seen_keys(i, queries, keys, causal) :] = -math.inf
        weights = torch.where(logits == -math.inf, 0.0, (logits - saved.lse[0, h].double()[:, None]).exp())
        d_rows, values = d_out[0, :, h].double(), saved.v[0, :, g].double()
        shift = (d_rows * saved.out[0, :, h].double()).sum(-1, keepdim=True)
        d_logits = weights * (d_rows @ values.T - shift)
        for i in range(0, queries, 64):
            for j in range(0, keys, TILE):
                row, column = slice(i, i + 64), slice(j, j + TILE)
                p, ds = weights[row, column], d_logits[row, column]
                q8, q_scale = saved.q8[0, row, h].double(), saved.q_scale[0, h, row].double().unsqueeze(-1)
                k8, k_scale = saved.k8[0, column, g].double(), saved.k_scale[0, g, j // TILE].double()
                if grad_scales == "tile":
                    p8, p_step = int8(p, (0, 1), p_top)
                    (ds8, ds_step), (do8, do_step) = (int8(x, (0, 1)) for x in (ds, d_rows[row]))
                    assert (q_scale == q_scale[0]).all()
                    d_v[column, g] += p8.T @ do8 * p_step * do_step
                    d_k[column, g] += ds8.T @ q8 * ds_step * q_scale[0] * scale
                else:
                    do8, do_step = int8(d_rows[row], 1)
                    p8, p_step = int8(p * do_step, 0, p_top)
                    d_v[column, g] += p8.T @ do8 * p_step.T
                    ds8, ds_step = int8(ds * q_scale, 0)
                    d_k[column, g] += ds8.T @ q8 * ds_step.T * scale
                    ds8, ds_step = int8(ds, 1)
                d_q[row, h] += ds8 @ k8 * ds_step * k_scale * scale
    return d_q, d_k, d_v


@pytest.mark.parametrize("p_top", [127, 255])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 7), (63, 63), (40, 300), (140, 130)])
def test_forward_equals_the_textbook(causal, lengths, p_top):
    q, k, v = inputs(*lengths, heads=4, groups=2)
    out, lse, saved = sagebwd_forward(q, k, v, causal=causal, scale=0.3, p_top=p_top)
    wanted, wanted_lse, _ = textbook_forward(q, k, v, causal, 0.3, p_top)
    torch.testing.assert_close(out[0].double(), wanted, atol=2e-3, rtol=0)  # a weight half way may fall either side
    assert rel(out[0], wanted) < 2e-4
    torch.testing.assert_close(saved.lse[0].double(), wanted_lse, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), dense(q, k, v, causal, 0.3)[1], atol=0.05, rtol=0)
    assert saved.q8.dtype == saved.k8.dtype == torch.int8 and saved.v is v and saved.out is out


@pytest.mark.parametrize("p_top", [127, 255])
@pytest.mark.parametrize("grad_scales", ["row", "tile"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 7), (63, 63), (140, 130)])
def test_backward_equals_the_textbook(grad_scales, causal, lengths, p_top):
    q, k, v = inputs(*lengths, heads=4, groups=2)
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    options = LowBit(grad_scales=grad_scales)
    _, _, saved = sagebwd_forward(q, k, v, causal=causal, scale=0.3, options=options)

    def logits_of(h, i):
        k_scale = saved.k_scale[0, h // 2].double().repeat_interleave(TILE)[: k.shape[1]]
        integers = saved.k8[0, :, h // 2].double() @ saved.q8[0, i, h].double()
        return integers * k_scale * saved.q_scale[0, h, i].double() * 0.3

    got = sagebwd_backward(d_out, saved, causal=causal, scale=0.3, options=options, p_top=p_top)
    wanted = textbook_backward(d_out, saved, logits_of, causal, 0.3, grad_scales, p_top)
    for a, b in zip(got, wanted, strict=True):
        assert rel(a[0], b) < 5e-4


PAPER = {1: (0.016, 0.018, 0.022), 3: (0.039, 0.076, 0.078), 5: (0.060, 0.201, 0.201), 8: (0.097, 0.467, 0.470)}
PAPER |= {10: (0.116, 0.665, 0.668)}  # relative L2 of O, dQ, dK (arXiv 2603.02170, table 1); sigma of v and dO is 1


@cache
def sweep(sigma, size, grad_scales, causal=False, p_top=127):
    torch.manual_seed(sigma)
    q, k, v, d_out = ((torch.randn(1, 1024, 1, size) * s).bfloat16() for s in (sigma, sigma, 1, 1))
    options = LowBit(grad_scales=grad_scales)
    out, _, saved = sagebwd_forward(q, k, v, causal=causal, options=options, p_top=p_top)
    wanted, _, gradients = dense(q.float(), k.float(), v.float(), causal, d_out=d_out)
    got = (out, *sagebwd_backward(d_out, saved, causal=causal, options=options, p_top=p_top))
    return [rel(a, b) for a, b in zip(got, (wanted, *gradients), strict=True)]


@pytest.mark.parametrize("sigma", [3, 5, 8, 10])
def test_row_scales_reach_the_papers_table(sigma):
    for got, paper in zip(sweep(sigma, 64, "row"), PAPER[sigma], strict=False):
        assert got <= paper


def test_row_scales_where_the_paper_is_better():
    """At sigma 1 the scales over 128 keys of K, V, P and dS cost a fifth. The paper does not state its shapes."""
    out, d_q, d_k, d_v = sweep(1, 64, "row")
    assert out < 1.35 * PAPER[1][0] and d_q < 1.25 * PAPER[1][1] and d_k < PAPER[1][2] and d_v < 0.019


@pytest.mark.parametrize("sigma", [1, 3, 5, 8, 10])
def test_unsigned_weights_reach_the_papers_output(sigma):
    """P is never negative: 255 levels halve its step, which was the largest error of O at sigma 1."""
    half, unsigned = sweep(sigma, 64, "row"), sweep(sigma, 64, "row", p_top=255)
    assert unsigned[0] < 1.02 * PAPER[sigma][0]
    assert unsigned[0] < (0.85 if sigma == 1 else 1.002) * half[0]
    assert unsigned[3] < (0.9 if sigma == 1 else 1.002) * half[3]
    assert all(a < 1.01 * b for a, b in zip(unsigned, half, strict=True))


@pytest.mark.parametrize("sigma", [1, 3, 5])
def test_tile_scales_cost_accuracy(sigma):
    row, tile = sweep(sigma, 64, "row"), sweep(sigma, 64, "tile")
    assert all(a < b for a, b in zip(row, tile, strict=True))
    assert tile[1] < 0.06 if sigma == 1 else tile[1] < 1.15 * PAPER[sigma][1]


@pytest.mark.parametrize("grad_scales", ["row", "tile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd(grad_scales, dtype):
    q, k, v = (x.requires_grad_() for x in inputs(70, 150, heads=4, groups=2, dtype=dtype, offset=4.0))
    d_out, d_lse = torch.randn(q.shape).to(dtype), torch.randn(1, 4, 70)
    options = LowBit(grad_scales=grad_scales)
    out, lse = sagebwd_attention(q, k, v, causal=True, scale=0.2, options=options)
    got = torch.autograd.grad((out, lse), (q, k, v), (d_out, d_lse))
    _, _, saved = sagebwd_forward(q, k, v, causal=True, scale=0.2, options=options)
    manual = sagebwd_backward(d_out, saved, d_lse=d_lse, causal=True, scale=0.2, options=options)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(got, manual, strict=True))
    _, _, wanted = dense(q.detach().float(), k.detach().float(), v.detach().float(), True, 0.2, d_out, d_lse)
    bound = 0.02 if grad_scales == "row" else 0.06
    assert all(rel(a, b) < bound for a, b in zip(got, wanted, strict=True))
    alone = torch.autograd.grad(sagebwd_attention(q, k, v, scale=0.2, options=options)[1], (q, k, v), d_lse)
    _, _, wanted = dense(q.detach().float(), k.detach().float(), v.detach().float(), False, 0.2, d_out * 0, d_lse)
    assert all(rel(a, b) < bound for a, b in zip(alone[:2], wanted[:2], strict=True)) and alone[2].eq(0).all()


def test_queries_without_keys_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in inputs(9, 4))
    out, lse = sagebwd_attention(q, k, v, causal=True)
    assert out[:, :5].eq(0).all() and lse[..., :5].eq(-math.inf).all()
    d_q, d_k, d_v = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert d_q[:, :5].eq(0).all() and d_q[:, 5:].ne(0).any() and all(x.isfinite().all() for x in (d_q, d_k, d_v))
    out, _ = sagebwd_attention(q, k[:, :0], v[:, :0])
    assert torch.autograd.grad(out, q, torch.ones_like(out))[0].eq(0).all()


def test_zero_tensors():
    q, k, v = inputs(70, 200)
    for make in ((q * 0, k, v), (q, k * 0, v), (q, k, v * 0), (q * 0, k * 0, v * 0)):
        leaves = [x.clone().requires_grad_() for x in make]
        out, _ = sagebwd_attention(*leaves)
        got = torch.autograd.grad(out, leaves, torch.ones_like(out))
        _, _, wanted = dense(*make, d_out=torch.ones_like(q))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, atol=0.02, rtol=0.1)
    _, _, saved = sagebwd_forward(q, k, v)
    assert all(x.eq(0).all() for x in sagebwd_backward(torch.zeros_like(q), saved))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(bad):
    q, k, v = inputs(150, 150)
    for name in range(3):
        leaves = [x.clone() for x in (q, k, v)]
        leaves[name][0, 3, 0, 2] = bad
        leaves = [x.requires_grad_() for x in leaves]
        out, _ = sagebwd_attention(*leaves)
        assert out[0, 3, 0].isnan().any()
        d_q, d_k, d_v = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert d_q[0, 3, 0].isnan().any() and d_k.isnan().any()
    _, _, saved = sagebwd_forward(q, k, v)
    d_out = torch.ones_like(q)
    d_out[0, 3, 1, 2] = bad
    d_q, d_k, d_v = sagebwd_backward(d_out, saved)
    assert d_q[0, 3, 1].isnan().all() and d_q[0, :64, 0].isfinite().all() and d_k.isnan().all() and d_v.isnan().all()


def test_the_product_of_d_out_and_v_is_not_quantised():
    """An outlier of v in a channel that d_out leaves alone would drown dP if v or d_out were in 8 bits there."""
    q, k, v = inputs(64, 64)
    v[..., 0] = 1000.0
    d_out = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    d_out[..., 0] = 0
    _, _, saved = sagebwd_forward(q, k, v)
    exact = saved._replace(out=dense(q, k, v)[0].float())
    _, _, wanted = dense(q, k, v, d_out=d_out)
    assert all(rel(a, b) < 0.03 for a, b in zip(sagebwd_backward(d_out, exact), wanted, strict=True))


def test_packed_sequences_train():
    q, k, v = (x[0].requires_grad_() for x in inputs(50, 80, heads=4, groups=2))
    cu_q, cu_k = torch.tensor([0, 20, 50]), torch.tensor([0, 47, 80])
    out, lse = over_sequences(lambda *x: sagebwd_attention(*x, causal=True), q, k, v, cu_q, cu_k)
    d_out = torch.randn(out.shape)
    got = torch.autograd.grad(out, (q, k, v), d_out)
    for of_q, of_k in ((slice(0, 20), slice(0, 47)), (slice(20, 50), slice(47, 80))):
        parts = [x.detach()[None, s].requires_grad_() for x, s in ((q, of_q), (k, of_k), (v, of_k))]
        alone, alone_lse = sagebwd_attention(*parts, causal=True)
        assert torch.equal(alone[0], out[of_q]) and torch.equal(alone_lse[0], lse[:, of_q])
        wanted = torch.autograd.grad(alone, parts, d_out[None, of_q])
        assert all(torch.equal(a[s], b[0]) for a, b, s in zip(got, wanted, (of_q, of_k, of_k), strict=True))


def test_refusals():
    q, k, v = inputs(8, 8)
    _, _, saved = sagebwd_forward(q, k, v)
    with pytest.raises(ValueError, match="d_out"):
        sagebwd_backward(q[:, :4], saved)
    with pytest.raises(ValueError, match="d_out"):
        sagebwd_backward(q.half(), saved)
