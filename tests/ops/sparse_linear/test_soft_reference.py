import math

import pytest
import torch
from tests.ops.sparse_linear.sparse_textbook import operands, plain, random_map, random_ratio

from allears.ops.attention.dense.reference import reference_attention
from allears.ops.attention.sparse_linear import (
    Geometry,
    blocks_from_map,
    select_top_k,
    soft_map,
    soft_sparse_linear,
)
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["sla2", "sla", "sparse"])
def test_a_map_of_zeros_and_ones_is_the_hard_form(causal, form):
    q, k, v = operands(150, 260, batch=2)
    options = plain(form=form)
    map = random_map(q, k, options, causal)
    ratio = random_ratio(q, options) if form == "sla2" else None
    proj = (torch.randn(8, 8, dtype=q.dtype), torch.randn(8, dtype=q.dtype)) if form == "sla" else None
    how = {"proj": proj, "causal": causal, "scale": 0.4}
    out = soft_sparse_linear(q, k, v, map.double(), ratio, options, **how)
    wanted, _ = sparse_linear_reference(q, k, v, blocks_from_map(map), ratio, options, **how)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_weights_by_hand(causal):
    """O_s = sum_j M_j e^{S_j} v_j / sum_j M_j e^{S_j}, O_l with 1 - M in place of M and features in place of e^S."""
    q, k, v = operands(100, 140, heads=1, groups=1)
    options = plain()
    geometry = Geometry.of(q, k, options, causal)
    soft, ratio = torch.rand(1, 1, geometry.n_q, geometry.n_k, dtype=q.dtype), random_ratio(q, options)
    out = soft_sparse_linear(q, k, v, soft, ratio, options, causal=causal)
    bare = k if causal else k - k.mean(1, keepdim=True)
    phi_q, phi_k = q.softmax(-1), bare.softmax(-1)
    weights = torch.where(geometry.forced(), 1.0, soft)[0, 0]
    for i in range(100):
        m = weights[i // 64].repeat_interleave(64)[:140]
        seen = torch.arange(140) < (i + 41 if causal else 140)
        exact = seen * m * (k[0, :, 0] @ q[0, i, 0] / math.sqrt(8)).exp()
        linear = seen * (1 - m) * (phi_k[0, :, 0] @ phi_q[0, i, 0])
        wanted = exact @ v[0, :, 0] / exact.sum()
        if linear.any():
            share = ratio[0, 0, i // 64]
            wanted = share * wanted + (1 - share) * linear @ v[0, :, 0] / linear.sum()
        torch.testing.assert_close(out[0, i, 0], wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_scores_and_ratio(causal):
    q, k, v = operands(70, 200, size=4)
    options = plain()
    geometry = Geometry.of(q, k, options, causal)
    scores = torch.randn(1, 4, geometry.n_q, geometry.n_k, dtype=q.dtype, requires_grad=True)
    ratio = torch.rand(4, 1, dtype=q.dtype, requires_grad=True)

    def run(scores, ratio, q):
        soft = soft_map(scores, 0.6, geometry=geometry, temperature=0.5)
        return soft_sparse_linear(q, k, v, soft, ratio, options, causal=causal)

    assert torch.autograd.gradcheck(run, (scores, ratio, q.requires_grad_()), fast_mode=True, atol=1e-6)


def test_scores_are_fitted_to_the_block_that_matters():
    """All queries look at block 5, the scores begin with block 0."""
    q, k, v = operands(64, 512, heads=2, groups=2, dtype=torch.float32)
    q = 0.3 * q + 1
    k = 0.3 * (k - 1.5)
    k[:, 320:384] += 2
    options, ratio = plain(), torch.full((2, 1), 0.9)
    geometry = Geometry.of(q, k, options, False)
    dense = reference_attention(q, k, v)
    scores = torch.zeros(1, 2, 1, 8).index_fill(3, torch.tensor([0]), 0.3).requires_grad_()
    optimiser, errors = torch.optim.Adam([scores], lr=0.02), []
    for _ in range(30):
        soft = soft_map(scores, 1 / 8, geometry=geometry)
        error = (soft_sparse_linear(q, k, v, soft, ratio, options) - dense).square().mean()
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
    assert (select_top_k(scores, 1 / 8, geometry=geometry).rows == 5).all()


def test_weights_that_vanish_leave_finite_gradients():
    q, k, v = operands(64, 192, dtype=torch.float32)
    scores = torch.tensor([1e4, 0.0, -1e4]).expand(1, 4, 1, 3).clone().requires_grad_()
    geometry = Geometry.of(q, k, plain(), False)
    soft = soft_map(scores, 0.67, geometry=geometry)
    out = soft_sparse_linear(q, k, v, soft, torch.full((4, 1), 0.5), plain())
    (gradient,) = torch.autograd.grad(out.square().sum(), scores)
    assert out.isfinite().all() and gradient.isfinite().all()


def test_refusals():
    q, k, v = operands(64, 192)
    soft, ratio = torch.rand(1, 4, 1, 3, dtype=q.dtype), torch.full((4, 1), 0.5)
    with pytest.raises(ValueError, match=r"soft: .* it must be floating, \(1, 4, 1, 3\)"):
        soft_sparse_linear(q, k, v, soft[..., :2], ratio, plain())
    with pytest.raises(ValueError, match=r"soft: torch\.bool"):
        soft_sparse_linear(q, k, v, soft > 0.5, ratio, plain())
    with pytest.raises(ValueError, match="precision 'int8_fp8' given"):
        soft_sparse_linear(q, k, v, soft, ratio, plain(precision="int8_fp8"))
    with pytest.raises(ValueError, match="ratio: None given"):
        soft_sparse_linear(q, k, v, soft, None, plain())
