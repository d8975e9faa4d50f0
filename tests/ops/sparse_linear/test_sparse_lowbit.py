import math

import pytest
import torch
from tests.ops.sparse_linear.sparse_textbook import operands, plain, random_blocks, random_map, random_ratio

from allears.ops.attention.lowbit.quantise import quantise_e4m3_blocks, quantise_int8_blocks, quantise_int8_rows
from allears.ops.attention.sparse_linear import Blocks, blocks_from_map, select_top_k
from allears.ops.attention.sparse_linear.blocks import Geometry
from allears.ops.attention.sparse_linear.lowbit_reference import lowbit_softmax_branch, rounded
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LOW = {"form": "sparse", "precision": "int8_fp8"}


def call(queries, keys, dtype=torch.float32, size=16):
    return operands(queries, keys, size=size, dtype=dtype)


def integers(q, k, v, map, options, causal, scale):
    """Products of integers, everything else in float64, a key block at a time; B = 1."""
    (queries, heads), keys = q.shape[1:3], k.shape[1]
    bare = k.float() - k.float().mean(1, keepdim=True) if options.smooth_k and not causal else k.float()
    q8, q_scale = quantise_int8_rows(q)
    k8, k_scale = quantise_int8_blocks(bare, 64)
    v8, v_scale = quantise_e4m3_blocks(v, 64)
    out, lse = torch.zeros(queries, heads, q.shape[3]).double(), torch.full((heads, queries), -math.inf).double()
    for h, i in ((h, i) for h in range(heads) for i in range(queries)):
        g, top, total, row = h // 2, -math.inf, 0.0, torch.zeros(q.shape[3]).double()
        for block in map[0, h, i // options.block_q].nonzero().flatten().tolist():
            stop = min((block + 1) * 64, keys, i + keys - queries + 1 if causal else keys)
            if stop <= block * 64:
                continue
            tile = slice(block * 64, stop)
            logits = (k8[0, tile, g].long() @ q8[0, i, h].long()).double()
            logits = logits * q_scale[0, h, i].double() * k_scale[0, g, block].double() * scale
            known, top = top, max(top, logits.max().item())
            weights = (logits - top).exp()
            p8 = (weights.float() * 448).to(torch.float8_e4m3fn).double()
            decay = math.exp(known - top)
            total = total * decay + weights.sum()
            row = row * decay + p8 @ v8[0, tile, g].double() * v_scale[0, g, block].double() / 448
        if total:
            out[i, h], lse[h, i] = row / total, top + math.log(total)
            if options.smooth_k and not causal:
                lse[h, i] += scale * (q[0, i, h].double() @ k[0, :, g].double().mean(0))
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (65, 200), (140, 100)])
def test_equals_integers_by_hand(causal, smooth_k, lengths):
    q, k, v = call(*lengths)
    options = plain(smooth_k=smooth_k, **LOW)
    map = random_map(q, k, options, causal)
    out, lse = sparse_linear_reference(q, k, v, blocks_from_map(map), None, options, causal=causal, scale=0.3)
    wanted, wanted_lse = integers(q, k, v, map, options, causal, 0.3)
    torch.testing.assert_close(out[0].double(), wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0].double(), wanted_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["sla2", "sla"])
def test_the_linear_branch_stays_as_it_is(form):
    q, k, v = call(100, 250)
    blocks = random_blocks(q, k, plain())
    ratio = random_ratio(q, plain()) if form == "sla2" else None
    proj = (torch.randn(16, 16), None) if form == "sla" else None
    outs = {}
    for precision in ("exact", "int8_fp8"):
        mixed, _ = sparse_linear_reference(q, k, v, blocks, ratio, plain(form=form, precision=precision), proj=proj)
        bare, _ = sparse_linear_reference(q, k, v, blocks, None, plain(form="sparse", precision=precision))
        share = 1.0 if ratio is None else ratio.repeat_interleave(64, 2)[:, :, :100].transpose(1, 2)[..., None]
        outs[precision] = mixed - share * bare
    torch.testing.assert_close(outs["int8_fp8"], outs["exact"], atol=1e-6, rtol=1e-5)


def straight_through(x, rounded):
    return x + (rounded - x).detach()


def rounded_all(q, k, v):
    """Operands of the products, dequantised, with the gradient of the unrounded ones; (B, L, heads, D)."""
    bare = k - k.mean(1, keepdim=True)
    (q8, q_scale), (k8, k_scale) = quantise_int8_rows(q), quantise_int8_blocks(bare, 64)
    v8, v_scale = quantise_e4m3_blocks(v, 64)
    spread = [s.repeat_interleave(64, -1)[..., : k.shape[1]].transpose(1, 2)[..., None] for s in (k_scale, v_scale)]
    return (
        straight_through(q, q8.float() * q_scale.transpose(1, 2)[..., None]),
        straight_through(bare, k8.float() * spread[0]),
        straight_through(v, v8.float() * spread[1]),
    )


def attend(q, k, v, map, scale):
    """Plain attention over the tokens of a map, (B, L, heads, D), and its probabilities."""
    keys, values = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    tokens = map.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, : q.shape[1], : k.shape[1]]
    logits = torch.einsum("bihd,bjhd->bhij", q, keys) * scale
    weights = logits.masked_fill(~tokens, -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, values), logits.masked_fill(~tokens, -math.inf).logsumexp(-1)


def gradients(out_of, q, k, v, d_out, d_lse):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = out_of(*leaves)
    return torch.autograd.grad((out * d_out).sum() + (lse * d_lse).sum(), leaves)


@pytest.mark.parametrize("with_lse", [False, True])
def test_matched_gradient_is_straight_through_every_rounding(with_lse):
    q, k, v = call(100, 200)
    options = plain(backward="matched", **LOW)
    map = random_map(q, k, options)
    d_out, d_lse = torch.randn_like(q), torch.randn(1, 4, 100) * with_lse

    def ours(q, k, v):
        return sparse_linear_reference(q, k, v, blocks_from_map(map), None, options, scale=0.3)

    def by_autograd(q, k, v):
        out, lse = attend(*rounded_all(q, k, v), map, 0.3)
        return out, lse + 0.3 * torch.einsum("bihd,bhd->bhi", q, k.mean(1).repeat_interleave(2, 1))

    wanted = gradients(by_autograd, q, k, v, d_out, d_lse)
    for got, want in zip(gradients(ours, q, k, v, d_out, d_lse), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("with_lse", [False, True])
def test_drop_in_gradient_is_16_bit_attention_with_the_output_of_the_forward(with_lse):
    q, k, v = call(100, 200)
    options = plain(backward="drop_in", **LOW)
    map = random_map(q, k, options)
    d_out, d_lse = torch.randn_like(q), torch.randn(1, 4, 100) * with_lse
    blocks = blocks_from_map(map)
    got = gradients(
        lambda q, k, v: sparse_linear_reference(q, k, v, blocks, None, options, scale=0.3), q, k, v, d_out, d_lse
    )
    out, lse = sparse_linear_reference(q, k, v, blocks, None, options, scale=0.3)
    q, k, v, d_out, d_lse = (x.double() for x in (q, k, v, d_out, d_lse))
    mean = k.mean(1, keepdim=True)
    keys, means, values = (x.repeat_interleave(2, 2) for x in (k - mean, mean, v))
    tokens = map.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :100, :200]
    given = torch.einsum("bihd,bjhd->bhij", q, keys + means) * 0.3  # of the given k, as the log-sum-exp is
    weights = (given - lse.double()[..., None]).exp() * tokens
    shift = (d_out * out.double()).sum(-1).transpose(1, 2) - d_lse
    d_logits = weights * (torch.einsum("bihd,bjhd->bhij", d_out, values) - shift[..., None]) * 0.3
    d_q = torch.einsum("bhij,bjhd->bihd", d_logits, keys) + 0.3 * d_lse.transpose(1, 2)[..., None] * means
    d_keys = torch.einsum("bhij,bihd->bjhd", d_logits, q).unflatten(2, (2, 2)).sum(3)
    d_mean = 0.3 * torch.einsum("bhi,bihd->bhd", d_lse, q).unflatten(1, (2, 2)).sum(2)[:, None] - d_keys.sum(1, True)
    d_k = d_keys + d_mean / 200
    d_v = torch.einsum("bhij,bihd->bjhd", weights, d_out).unflatten(2, (2, 2)).sum(3)
    for mine, wanted in zip(got, (d_q, d_k, d_v), strict=True):
        torch.testing.assert_close(mine.double(), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backward", ["drop_in", "matched"])
def test_probabilities_and_their_gradient_are_multiplied_in_16_bit(backward):
    q, k, v, d_out = (torch.randn(1, 1, n, 16).requires_grad_() for n in (40, 100, 100, 40))
    picked, options = torch.ones(1, 1, 40, 100).bool(), plain(backward=backward, **LOW)
    out, lse = lowbit_softmax_branch(q, k, v, picked, 0.5, options, torch.bfloat16)
    got = torch.autograd.grad((out * d_out).sum(), (q, k, v))
    if backward == "matched":
        q, k, v = rounded(q, k, v, 64)
    weights = (q @ k.transpose(-1, -2) * 0.5 - lse[..., None]).exp()
    d_weights = d_out @ v.transpose(-1, -2)
    shift = (weights * d_weights).sum(-1) if backward == "matched" else (out * d_out).sum(-1)
    d_logits = (weights * (d_weights - shift[..., None])).bfloat16().float()
    narrow = weights.bfloat16().float()
    wanted = 0.5 * d_logits @ k, 0.5 * d_logits.transpose(-1, -2) @ q, narrow.transpose(-1, -2) @ d_out
    for mine, want in zip(got, wanted, strict=True):
        assert (mine - want).norm() < 2e-4 * want.norm()  # a few values lie between two of bfloat16
    assert (weights.transpose(-1, -2) @ d_out - wanted[2]).norm() > 1e-3 * wanted[2].norm()


@pytest.mark.parametrize("backward", ["drop_in", "matched"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_near_the_exact_ones(backward, causal):
    q, k, v = call(200, 330, torch.bfloat16, size=32)
    blocks, ratio = random_blocks(q, k, plain(), causal), torch.full((4, 1), 0.7)
    d_out = torch.randn_like(q)
    found = {}
    for precision in ("exact", "int8_fp8"):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        options = plain(precision=precision, backward=backward)
        out, _ = sparse_linear_reference(*leaves, blocks, ratio, options, causal=causal)
        found[precision] = torch.autograd.grad((out * d_out).sum(), leaves)
    for low, exact in zip(found["int8_fp8"], found["exact"], strict=True):
        assert low.isfinite().all() and low.dtype == exact.dtype
        error = (low.float() - exact.float()).norm() / exact.float().norm()
        assert 1e-4 < error < 0.08


def test_one_token_and_queries_without_keys():
    options, ratio = plain(precision="int8_fp8"), torch.full((4, 1), 0.5)
    for lengths in [(1, 1), (150, 100), (5, 0)]:
        q, k, v = call(*lengths)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        geometry = Geometry.of(q, k, options, True)
        blocks = select_top_k(torch.randn(1, 4, geometry.n_q, geometry.n_k), 0.1, geometry=geometry)
        out, lse = sparse_linear_reference(q, k, v, blocks, ratio, options, causal=True)
        blind = max(lengths[0] - lengths[1], 0)
        assert (
            (out[:, :blind] == 0).all() and (lse[..., :blind] == -math.inf).all() and lse[..., blind:].isfinite().all()
        )
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


def test_packed_sequences_have_their_own_scales():
    """Nothing behind the end of a sequence has a part in the scale of its last block, not even the mean taken off."""
    lengths, offsets = [70, 130, 3], torch.tensor([0, 70, 200, 203]).int()
    q, k, v = (x[0] for x in call(203, 203))
    options = plain(precision="int8_fp8")
    geometry = Geometry(*[torch.tensor(lengths)] * 2, 64, 64, longest_q=130, longest_k=130)
    blocks = select_top_k(torch.randn(3, 4, 3, 3), 0.5, geometry=geometry)
    names = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    ratio = torch.full((4, 1), 0.5)
    out, lse = sparse_linear_reference(q, k, v, blocks, ratio, options, **names)
    for s, length in enumerate(lengths):
        rows, n = slice(int(offsets[s]), int(offsets[s + 1])), -(-length // 64)
        own = Blocks(blocks.rows[s, None, :, :n, :n], blocks.count[s, None, :, :n])
        alone = (x[None, rows] for x in (q, k, v))
        wanted, wanted_lse = sparse_linear_reference(*alone, own, ratio, options)
        torch.testing.assert_close(out[None, rows], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[None, :, rows], wanted_lse, atol=1e-5, rtol=1e-5)


def test_float64_is_refused():
    q, k, v = call(10, 10, torch.float64)
    with pytest.raises(ValueError, match=r"torch\.float64 given; precision='int8_fp8'"):
        sparse_linear_reference(q, k, v, random_blocks(q, k, plain()), None, plain(**LOW))
