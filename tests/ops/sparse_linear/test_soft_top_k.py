import math

import pytest
import torch

from allears.ops.attention.sparse_linear import (
    Geometry,
    map_from_blocks,
    select_top_k,
    soft_map,
    soft_top_k,
)


def scores(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("budget", [0.1, 1, 3.5, 8.9])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 3.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_rows_sum_to_the_budget(budget, temperature, size):
    mask = soft_top_k(scores(3, 4, 9) * size, budget, temperature)
    torch.testing.assert_close(mask.sum(-1), torch.full((3, 4), float(budget), dtype=torch.float64), atol=1e-6, rtol=0)
    order = scores(3, 4, 9).argsort(-1)
    assert (mask.gather(-1, order).diff() >= 0).all()


def test_it_is_a_sigmoid_with_one_shift_a_row():
    x = scores(5, 7)
    shift = soft_top_k(x, 2.0, 0.3).logit() - x / 0.3
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-8, rtol=0)


@pytest.mark.parametrize("budget", [1, 2.5, torch.tensor([0.5, 4.0])])
def test_gradient_against_finite_differences(budget):
    x = scores(2, 6).requires_grad_()
    visible = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda x: soft_top_k(x, budget, 0.5, visible), x, eps=1e-5, atol=1e-7)


def test_gradient_is_the_formula_and_keeps_the_sum():
    x = scores(7).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda x: soft_top_k(x, 2.0, 0.1), x)
    mask = soft_top_k(x.detach(), 2.0, 0.1)
    slope = mask * (1 - mask)
    torch.testing.assert_close(jacobian, (slope.diag() - slope.outer(slope) / slope.sum()) / 0.1)
    torch.testing.assert_close(jacobian.sum(0), torch.zeros(7, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(jacobian.sum(1), torch.zeros(7, dtype=torch.float64), atol=1e-9, rtol=0)


def test_rows_that_cannot_hold_the_budget_are_full_and_flat():
    x = scores(3, 4).requires_grad_()
    visible = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    mask = soft_top_k(x, 3.0, 0.1, visible)
    assert mask[:2].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(mask[2].sum(), torch.tensor(3.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((mask * scores(3, 4, seed=1)).sum(), x)
    assert (gradient[:2] == 0).all() and (gradient[2] != 0).all()
    assert (soft_top_k(x, 0.0) == 0).all() and (soft_top_k(x, 4) == 1).all()
    assert soft_top_k(x[:, :0], 1.0).shape == (3, 0)


def test_cold_it_is_the_hard_top_k():
    x = scores(4, 50)
    hard = torch.zeros_like(x).scatter(-1, x.topk(6).indices, 1.0)
    torch.testing.assert_close(soft_top_k(x, 6, 1e-5), hard, atol=1e-3, rtol=0)


def test_float32_keeps_its_dtype_and_sum():
    mask = soft_top_k(scores(2, 300, dtype=torch.float32) * 50, 15)
    assert mask.dtype == torch.float32
    torch.testing.assert_close(mask.sum(-1), torch.full((2,), 15.0), atol=1e-4, rtol=0)


def test_refusals():
    x = scores(2, 4)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            soft_top_k(x, 1, temperature)
    with pytest.raises(ValueError, match="budget: -1"):
        soft_top_k(x, -1)
    with pytest.raises(ValueError, match="budget: it has no gradient"):
        soft_top_k(x, torch.tensor(1.0, requires_grad=True))


@pytest.mark.parametrize("causal", [False, True])
def test_map_has_the_sum_of_the_hard_one_and_becomes_it(causal):
    geometry = Geometry(500, 700, 128, 64, causal)
    x = scores(1, 2, geometry.n_q, geometry.n_k)
    hard = map_from_blocks(select_top_k(x, 0.3, geometry=geometry), geometry.n_k)
    soft = soft_map(x, 0.3, geometry=geometry)
    torch.testing.assert_close(soft.sum(-1), hard.sum(-1).double(), atol=1e-6, rtol=0)
    assert (soft[geometry.forced().expand_as(soft)] == 1).all() and (
        soft[~geometry.visible().expand_as(soft)] == 0
    ).all()
    torch.testing.assert_close(soft_map(x, 0.3, geometry=geometry, temperature=1e-6), hard.double(), atol=1e-3, rtol=0)
