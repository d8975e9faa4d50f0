import math
from functools import partial

import pytest
import torch
from tests.ops.lowbit.textbook import attend, dense, inputs, rel

from allears.ops.attention.lowbit.nvfp4 import round_to_mxfp4, round_to_nvfp4
from allears.ops.attention.lowbit.nvfp4_reference import nvfp4_forward
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.varlen import over_sequences


def textbook(q, k, v, causal, scale, options):
    """B = 1. Smoothing by definition, products in float64 of the rounded values."""
    ratio = q.shape[2] // k.shape[2]
    keys = k.float() - k.float().mean(1, keepdim=True) if options.smooth_k else k.float()
    means = torch.zeros(q.shape[1:], dtype=torch.float64)
    if options.smooth_q is not False:
        for start in range(0, q.shape[1], 128):
            means[start : start + 128] = q[0, start : start + 128].double().mean(0)
    queries = (q[0].double() - means).float()
    k4, q4 = round_to_nvfp4(keys)[0].double(), round_to_nvfp4(queries).double()
    v4 = round_to_nvfp4(v[0].permute(1, 2, 0)).double()

    def logits_of(h, i):
        return (k4[:, h // ratio] @ q4[i, h] + keys[0, :, h // ratio].double() @ means[i, h]) * scale

    def product(h, weights, tile):
        level = 2688 if options.two_level_p else 1
        return v4[h // ratio, :, tile] @ (round_to_nvfp4(weights.float() * level).double() / level)

    out, lse = attend(logits_of, product, q.shape[1], k.shape[1], q.shape[2], q.shape[3], causal)
    if options.smooth_k:
        lse = lse + scale * torch.einsum("lhd,hd->hl", q[0].double(), k[0].double().mean(0).repeat_interleave(ratio, 0))
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 63), (40, 300), (140, 131)])
@pytest.mark.parametrize("options", [LowBit(), LowBit(smooth_k=False, smooth_q=False, two_level_p=False)])
def test_equals_the_textbook(causal, lengths, options):
    q, k, v = inputs(*lengths, heads=4, groups=2, size=20)
    out, lse = nvfp4_forward(q + 1, k, v, causal=causal, scale=0.3, options=options)
    wanted, wanted_lse = textbook(q + 1, k, v, causal, 0.3, options)
    # Rarely a value lies so near to a tie that its float32 mean decides; then a few logits move by a step.
    assert rel(out[0], wanted) < 5e-3
    assert ((out[0].double() - wanted).abs() > 1e-4).double().mean() < 0.02
    torch.testing.assert_close(lse[0].double(), wanted_lse, atol=0.02, rtol=1e-5)


def test_smoothing_of_both_is_better_than_of_either():
    q, k, v = inputs(130, 192, size=64, offset=3.0)
    q = q + 3 * torch.randn(64)
    wanted, wanted_lse = dense(q, k, v)

    def error(**fields):
        return rel(nvfp4_forward(q, k, v, options=LowBit(**fields))[0], wanted)

    both = error()
    assert both < 0.2 and both < 0.8 * error(smooth_q=False) and both < 0.7 * error(smooth_k=False)
    _, lse = nvfp4_forward(q, k, v)
    assert (lse - wanted_lse).abs().mean() < 0.1  # of log-sum-exps of 15


def test_two_levels_save_rows_of_small_weights():
    """Weights far below the largest: their groups' scales fall under E4M3's least step unless they are lifted first."""
    q, k, v = torch.ones(1, 4, 1, 16), torch.zeros(1, 2048, 1, 16), torch.full((1, 2048, 1, 16), 6.0)
    k[0, 0] = 1.0
    wanted, _ = dense(q, k, v, scale=0.5)  # one key weighs e^8, the others 1
    two, one = (
        nvfp4_forward(q, k, v, scale=0.5, options=LowBit(two_level_p=level, smooth_k=False, smooth_q=False))[0]
        for level in (True, False)
    )
    assert rel(two, wanted) < 0.02 and rel(one, wanted) > 0.2


def test_nvfp4_beats_mxfp4():
    q, k, v = inputs(128, 384, size=64)
    wanted, _ = dense(q, k, v)
    assert rel(nvfp4_forward(q, k, v)[0], wanted) < 0.8 * rel(
        nvfp4_forward(q, k, v, rounding=round_to_mxfp4)[0], wanted
    )


def test_unrounded_it_is_dense_attention():
    q, k, v = inputs(140, 300, heads=4, groups=2, batch=2, offset=5.0)
    out, lse = nvfp4_forward(q, k, v, causal=True, rounding=torch.clone)
    wanted, wanted_lse = dense(q, k, v, True)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


def test_edges():
    q, k, v = inputs(9, 4)
    out, lse = nvfp4_forward(q, k, v, causal=True)
    assert (
        out[:, :5].eq(0).all()
        and lse[..., :5].eq(-math.inf).all()
        and rel(out[:, 5:], dense(q, k, v, True)[0][:, 5:]) < 0.2
    )
    assert nvfp4_forward(q, k[:, :0], v[:, :0])[0].eq(0).all()
    out, lse = nvfp4_forward(q * 0, k * 0, v * 0)
    assert out.eq(0).all() and torch.allclose(lse, torch.tensor(math.log(4)))
    kept = [x.clone() for x in (q, k, v)]
    nvfp4_forward(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_hidden(bad):
    q, k, v = inputs(150, 150)
    rough = LowBit(smooth_k=False, smooth_q=False)
    clean, _ = nvfp4_forward(q, k, v, causal=True, options=rough)
    broken = q.clone()
    broken[0, 7, 1, 3] = bad
    out, _ = nvfp4_forward(broken, k, v, causal=True, options=rough)
    assert out[0, 7, 1].isnan().all() and torch.equal(out[:, 8:], clean[:, 8:])
    assert nvfp4_forward(broken, k, v)[0][0, :128, 1].isnan().all()  # the mean of its block
    broken = k.clone()
    broken[0, 130, 0, 3] = bad
    out, _ = nvfp4_forward(q, broken, v, causal=True, options=rough)
    assert torch.equal(out[:, :130], clean[:, :130]) and out[:, 130:].isnan().all()
    broken = v.clone()
    broken[0, 3, 0, 5] = bad
    out, _ = nvfp4_forward(q, k, broken, options=rough)
    assert out[..., 5].isnan().all() and out[..., 4].isfinite().all()


def test_packed_sequences_run_one_by_one():
    parts = [inputs(n, m, heads=4, groups=2) for n, m in ((5, 140), (33, 20))]
    q, k, v = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    run = partial(nvfp4_forward, causal=True)
    out, lse = over_sequences(run, q, k, v, torch.tensor([0, 5, 38]), torch.tensor([0, 140, 160]))
    alone = [nvfp4_forward(*part, causal=True) for part in parts]
    assert torch.equal(out, torch.cat([a[0][0] for a in alone]))
    assert torch.equal(lse, torch.cat([a[1][0] for a in alone], dim=1))
