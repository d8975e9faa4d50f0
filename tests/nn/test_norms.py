"""Norms in the layout of linear layers, layer scale, depthwise convolution and slices, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from allears.nn.depthwise import DepthwiseConv1d
from allears.nn.layer_scale import LayerScale
from allears.nn.norms import GlobalNorm, LayerNorm, RMSGroupNorm
from allears.nn.slices import SLICE_BYTES, add_slices, map_slices, rows_per_slice


def drawn(module, seed=0):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    return module


@pytest.mark.parametrize("rows", [1, 63])
def test_global_norm_is_group_norm_of_one_group(rows):
    norm = drawn(GlobalNorm(6).double())
    x = 2 + 3 * torch.randn(2, rows, 6, dtype=torch.float64)
    wanted = F.group_norm(x.mT, 1, norm.weight, norm.bias, norm.eps).mT
    torch.testing.assert_close(norm(x), wanted)
    weight = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(norm.project(x, weight), F.linear(wanted, weight))


def test_global_norm_of_silence_is_its_bias():
    norm = drawn(GlobalNorm(6))
    torch.testing.assert_close(norm(torch.zeros(1, 5, 6)), norm.bias.expand(1, 5, 6))


def test_rms_group_norm_by_formula():
    norm = drawn(RMSGroupNorm(12, 3))
    x = torch.randn(2, 5, 12)
    for group in range(3):
        own = slice(4 * group, 4 * group + 4)
        wanted = x[..., own] / (x[..., own].square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight[own]
        torch.testing.assert_close(norm(x)[..., own], wanted)
    torch.testing.assert_close(norm(-x), -norm(x))
    with pytest.raises(ValueError, match="groups: 5 does not divide channels 12"):
        RMSGroupNorm(12, 5)


@pytest.mark.parametrize(("channels", "groups"), [(12, 3), (64, 4), (5, 5), (6, 1)])
def test_rms_group_norm_by_products_is_torchs(channels, groups):
    """What runs without gradients on a CPU; with them, and in double precision, it is ``F.rms_norm``."""
    norm = drawn(RMSGroupNorm(channels, groups))
    x = torch.randn(2, 7, channels) * 10.0 ** torch.arange(-6, 1).float()[:, None]
    kept = x.clone()
    with torch.no_grad():
        y, silent = norm(x), norm(torch.zeros(3, channels))
        rounded = norm(x.bfloat16())
        wanted = norm.double()(x.double())
    torch.testing.assert_close(y, wanted.float())
    assert torch.equal(x, kept) and not silent.any()
    torch.testing.assert_close(rounded.double(), wanted, rtol=0.03, atol=0.03)
    torch.testing.assert_close(norm.float()(x), y)


def test_layer_norm_is_torchs():
    norm, plain = drawn(LayerNorm(8)), drawn(torch.nn.LayerNorm(8))
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(norm(x), plain(x))
    assert list(norm.state_dict()) == list(plain.state_dict())


def test_layer_scale_begins_small_and_adds():
    scale = LayerScale(3)
    y, x = torch.randn(2, 2, 4, 3)
    torch.testing.assert_close(scale(y), 1e-5 * y)
    torch.testing.assert_close(drawn(scale)(y, x), x + scale.weight * y)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_module_is_conv1d_on_rows(stride):
    conv, plain = drawn(DepthwiseConv1d(6, 5, stride)), drawn(torch.nn.Conv1d(6, 6, 5, stride, 2, groups=6))
    assert {n: p.shape for n, p in conv.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    x = torch.randn(2, 11, 6)
    wanted = plain(x.mT).mT
    torch.testing.assert_close(conv(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(conv(x, gated=True), F.glu(wanted, -1), rtol=1e-4, atol=1e-5)
    gain, shift = torch.randn(2, 6)
    torch.testing.assert_close(conv(x, gain=gain, shift=shift), wanted * gain + shift, rtol=1e-4, atol=1e-5)


def around(x):
    """Each row's sum with its neighbours, zeros outside: what a slice has to see beyond itself."""
    padded = F.pad(x, (0, 0, 1, 1))
    return padded[:, 2:] + 3 * padded[:, 1:-1] - padded[:, :-2]


@pytest.mark.parametrize("rows", [1, 64, 65, 200, 331])
def test_slices_give_what_the_whole_gives(monkeypatch, rows):
    monkeypatch.setitem(SLICE_BYTES, "cpu", 1)
    x, gain = torch.randn(2, rows, 3), torch.randn(3)
    seen = []

    def part(x):
        seen.append(x.shape)
        return around(x)

    with torch.no_grad():
        torch.testing.assert_close(add_slices(part, x, gain, 3, halo=1), x + gain * around(x))
        assert len(seen) == -(-rows // 64) and max(shape[1] for shape in seen) <= 66
        torch.testing.assert_close(map_slices(lambda x: x**2, x, 3), x**2)
        torch.testing.assert_close(map_slices(around, x, 3, dim=0), around(x))


def test_without_a_halo_slices_would_differ(monkeypatch):
    monkeypatch.setitem(SLICE_BYTES, "cpu", 1)
    x = torch.randn(1, 200, 3)
    with torch.no_grad():
        assert (add_slices(around, x, torch.ones(3), 3) - x - around(x)).abs().max() > 0.1


def test_slices_are_as_many_as_fit_and_none_with_gradients():
    x = torch.zeros(2, 100_000, 3)
    with torch.no_grad():
        assert rows_per_slice(x, 50) == SLICE_BYTES["cpu"] // (2 * 50 * 4)
        assert rows_per_slice(x, 50, times=3) == 3 * SLICE_BYTES["cpu"] // (2 * 50 * 4)
        assert rows_per_slice(x[:, :10], 50) == 10
        assert rows_per_slice(x, 50, dim=0) == 1
    assert rows_per_slice(x, 50) == 100_000
