from itertools import pairwise

import pytest
import torch

from allears.ops.attention.linear.features import FLOOR, feature_map


def sample(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["channels", "head"])
@pytest.mark.parametrize("power", [1, 3, 6])
def test_focused_map_by_hand(norm, power):
    x, scale = sample(7, 2, 5), torch.rand(2, 5, dtype=torch.float64) + 0.3
    wanted = torch.empty_like(x)
    for i in range(7):
        y = (x[i].clamp(min=0) + 1e-6) / scale
        groups = [y] if norm == "channels" else list(y)
        sharp = [g**power * (g.flatten().norm() / (g**power).flatten().norm()) for g in groups]
        wanted[i] = sharp[0] if norm == "channels" else torch.stack(sharp)
    torch.testing.assert_close(feature_map(x, "focused", power=power, norm=norm, scale=scale), wanted)


def test_power_turns_features_towards_their_largest_channel_and_keeps_their_norm():
    x = sample(50, 1, 8).abs()
    top = [feature_map(x, "focused", power=p).amax(-1) / x.norm(dim=-1) for p in (1, 2, 4, 8)]
    assert all((b > a).all() for a, b in pairwise(top))
    torch.testing.assert_close(feature_map(x, "focused", power=5).norm(dim=-1), (x + FLOOR).norm(dim=-1))


def test_other_maps_by_their_formulas():
    x = sample(3, 4, 2, 6)
    e = x.exp()
    torch.testing.assert_close(feature_map(x, "softmax"), e / e.sum(-1, keepdim=True))
    torch.testing.assert_close(feature_map(x, "elu"), torch.where(x > 0, x + 1, e))
    torch.testing.assert_close(feature_map(x, "relu"), torch.where(x > 0, x, 0.0) + 1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e15])
def test_features_whose_powers_alone_would_leave_float32(factor):
    x = factor * (sample(9, 4, 64).float().abs() + 0.1)
    y = x.double() + FLOOR
    wanted = y**8 * (y.square().sum((1, 2)).sqrt() / (y**16).sum((1, 2)).sqrt())[:, None, None]
    made = feature_map(x, "focused", power=8)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-6 * wanted.max().item())
    assert not torch.isfinite(x**8).all() or (x**8).square().sum() == 0


def test_half_precision_is_computed_in_float32():
    x = (sample(5, 2, 16) * 20_000).half()
    made = feature_map(x, "focused")
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, feature_map(x.double(), "focused").float(), rtol=1e-5, atol=1e-3)


def test_all_negative_channels_give_a_small_finite_feature_and_gradient():
    x = -torch.ones(1, 2, 4, requires_grad=True) - sample(1, 2, 4).float().abs()
    made = feature_map(x, "focused")
    torch.testing.assert_close(made, torch.full_like(made, 1e-6), rtol=1e-4, atol=0)
    assert torch.autograd.grad(made.sum(), x)[0].eq(0).all()


@pytest.mark.parametrize("norm", ["channels", "head"])
def test_gradients_of_the_focused_map(norm):
    x, scale = sample(3, 2, 4).requires_grad_(), (sample(2, 4, seed=1).abs() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: feature_map(x, "focused", norm=norm, scale=s), (x, scale))
    for kind in ("softmax", "elu", "relu"):
        assert torch.autograd.gradcheck(lambda x, kind=kind: feature_map(x, kind), x)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"kind": "cosine"}, "kind: 'cosine' given; it must be one of 'softmax'"),
        ({"kind": "elu", "scale": torch.ones(2, 3)}, "scale: given with the feature map 'elu'; only 'focused'"),
        ({"kind": "focused", "scale": torch.ones(6)}, r"scale: shape \(6,\) given; it must be \(H, D\) = \(2, 3\)"),
        ({"kind": "focused", "norm": "batch"}, "norm: 'batch' given; it must be one of 'channels', 'head'"),
        ({"kind": "focused", "power": 0}, "power: 0 given; it must be at least 1"),
    ],
)
def test_bad_arguments_are_named(how, words):
    with pytest.raises(ValueError, match=words):
        feature_map(torch.zeros(1, 2, 3), **how)
