"""Bands of the spectrum: order, values, masks and gradients.

Shapes: B batch, T frames, K bins, N bands (those of one width n, of w bins), D channels, J talkers, S samples.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.models.separate.bands import BandLinear, BandMasks, BandSplit, compressed, split_bands
from allears.models.separate.config import PRESETS, LocoformerSize, SeparateConfig
from allears.models.separate.locoformer import Locoformer
from allears.models.separate.model import SeparateNet

BANDS = ((3, 1), (1, 2), (2, 5))
SIZE = LocoformerSize(8, 1, hidden=6, kernel=4, heads=2, groups=2, n_fft=28, hop=14, bands=BANDS)
SPANS = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 10), (10, 15)]  # bins of each band


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(module, seed=0, by=0.2):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=rng))
    return module


@pytest.mark.parametrize("power", [0.3, 0.4, 1.0])
def test_compressed_keeps_phase_and_raises_magnitude(power):
    phase, size = 6.28 * torch.rand(3, 50), 10.0 ** torch.linspace(-2.5, 2, 50)
    spectrum = torch.view_as_real(torch.polar(size.expand(3, 50).contiguous(), phase))
    y = torch.view_as_complex(compressed(spectrum, power))
    torch.testing.assert_close(y, torch.polar((size**power).expand(3, 50).contiguous(), phase), rtol=2e-3, atol=1e-5)
    assert not compressed(torch.zeros(4, 2), power).any()


def test_compressed_of_silence_has_a_gradient():
    spectrum = torch.zeros(4, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(compressed(spectrum, 0.4).sum(), spectrum)
    assert grad.isfinite().all() and (grad > 0).all()


def test_band_linear_is_a_linear_layer_of_each_band():
    layer, x = BandLinear(3, 4, 5), drawn(2, 7, 3, 4)
    y = layer(x)
    for band in range(3):
        torch.testing.assert_close(y[:, :, band], x[:, :, band] @ layer.weight[band] + layer.bias[band])
    assert layer.weight.abs().max() <= 0.5 and layer.bias.abs().max() <= 0.5


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_parts_are_neighbouring_bins_in_their_order(bands):
    bins = sum(count * width for count, width in bands)
    x = torch.arange(2.0 * bins).view(1, 2, bins)
    parts = split_bands(x, tuple(bands))
    assert [part.shape for part in parts] == [(1, 2, count, width) for count, width in bands]
    assert torch.equal(torch.cat([part.flatten(2) for part in parts], dim=2), x)


def test_split_makes_features_of_each_band_from_its_own_bins():
    split, spectrum = BandSplit(SIZE), drawn(2, 3, 15, 2)
    y, quiet = split(spectrum), compressed(spectrum, SIZE.compression)
    weights = [(layer.weight[n], layer.bias[n]) for layer in split.layers for n in range(layer.weight.shape[0])]
    assert y.shape == (2, 3, len(SPANS), 8)
    for band, ((begin, end), (weight, bias)) in enumerate(zip(SPANS, weights, strict=True)):
        torch.testing.assert_close(y[:, :, band], quiet[:, :, begin:end].flatten(2) @ weight + bias)


def test_masks_are_complex_factors_of_each_bin():
    """Biases alone make the masks here: which number ends in which talker's bin is written down by a loop."""
    head, spectrum = BandMasks(SIZE, talkers=2), drawn(2, 3, 15, 2)
    wanted = torch.zeros(2, 15, dtype=torch.complex64)
    with torch.no_grad():
        bins = iter(SPANS)
        for layer in head.layers:
            layer.weight.zero_()
            for n in range(layer.bias.shape[0]):
                begin, end = next(bins)
                value, gate = layer.bias[n].chunk(2)
                parts = (value * gate.sigmoid()).view(2, end - begin, 2)
                wanted[:, begin:end] = torch.view_as_complex(parts.contiguous())
        y = head(drawn(2, 3, 6, 8), spectrum)
    assert y.shape == (2, 2, 3, 15, 2) and y.dtype == torch.float32
    torch.testing.assert_close(torch.view_as_complex(y), wanted[:, None] * torch.view_as_complex(spectrum)[:, None])


def test_masks_follow_the_features_of_their_band_and_frame():
    head, spectrum, x = moved(BandMasks(SIZE, talkers=2)), drawn(1, 3, 15, 2), drawn(1, 3, 6, 8)
    other = x.clone()
    other[0, 1, 4] += 1.0
    with torch.no_grad():
        changed = (head(x, spectrum) - head(other, spectrum)).abs().amax((1, 4))[0] > 1e-6  # (T, K)
    assert changed[1, 5:10].all() and changed.sum() == 5


@pytest.mark.parametrize("samples", [1, 13, 14, 15, 27, 101])
def test_masks_of_one_give_the_mixture_back(samples):
    net = Locoformer(SeparateConfig(locoformer=SIZE, talkers=3))
    gains = torch.tensor([1.0, 0.5, -2.0])
    with torch.no_grad():
        for (_, width), layer in zip(BANDS, net.leave.layers, strict=True):
            layer.weight.zero_()
            value, gate = layer.bias.chunk(2, dim=1)
            value.copy_((gains[:, None, None] * torch.tensor([1.0, 0.0])).expand(3, width, 2).flatten())
            gate.fill_(40.0)
        mixture = drawn(2, samples)
        out = net(mixture).out
    torch.testing.assert_close(out, gains[:, None] * mixture[:, None], rtol=1e-4, atol=1e-5)


def test_energy_of_a_band_is_the_sum_over_its_bins():
    """What weighs the features of a fingerprint: as many places as the features have, in the same order."""
    net, mixture = moved(Locoformer(SeparateConfig(locoformer=SIZE, talkers=2))), drawn(2, 57)
    with torch.no_grad():
        made = net(mixture)
        y, x = net.spectra(torch.view_as_real(net.stft.forward(mixture)).transpose(1, 2))
    by_band = made.energy.unflatten(2, (-1, len(SPANS)))
    for band, (begin, end) in enumerate(SPANS):
        torch.testing.assert_close(by_band[..., band], y[:, :, :, begin:end].square().sum((3, 4)))
    torch.testing.assert_close(made.energy.sum(2), y.square().sum((2, 3, 4)))
    assert torch.equal(made.features, x.flatten(1, 2)[:, None])
    assert made.features.shape[2] == made.energy.shape[2] == (-(-57 // 14) + 1) * len(SPANS)


def test_fingerprints_of_a_banded_net():
    net = moved(SeparateNet(SeparateConfig(locoformer=SIZE, talkers=2))).eval()
    with torch.no_grad():
        out, prints = net.fingerprints(drawn(1, 100))
    assert out.shape == (1, 2, 100) and prints.shape == (1, 2, 16)
    torch.testing.assert_close(prints.norm(dim=2), torch.ones(1, 2))
    assert (prints[0, 0] - prints[0, 1]).abs().max() > 1e-3


def test_gradients_of_the_split_in_double_precision():
    split = BandSplit(SIZE).double()
    assert torch.autograd.gradcheck(split, (drawn(1, 2, 15, 2).double().requires_grad_(),))


@pytest.mark.parametrize("name", ["enter", "norm", "layers.0", "layers.1", "leave"])
def test_gradients_of_a_tiny_net_against_finite_differences(name):
    torch.manual_seed(0)
    net = moved(Locoformer(SeparateConfig(locoformer=SIZE, talkers=2)), by=0.05)
    mixture, slope = drawn(2, 50), drawn(2, 2, 50, seed=1).double()
    parameters = list(net.get_submodule(name).parameters())
    directions = [drawn(*parameter.shape, seed=2 + k) for k, parameter in enumerate(parameters)]
    grads = torch.autograd.grad((net(mixture).out.double() * slope).sum(), parameters)
    wanted = sum(float((g.double() * d.double()).sum()) for g, d in zip(grads, directions, strict=True))
    values, step = [], 2e-4  # small: the cube of the focused map bends fast where features are small
    with torch.no_grad():
        for sign in (1.0, -2.0):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            values.append(float((net(mixture).out.double() * slope).sum()))
    assert abs(wanted) > 0.3
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(wanted, rel=0.02)


def test_bands_must_take_all_bins():
    with pytest.raises(ValueError, match=r"bands: \(\(3, 1\), \(2, 5\)\) take 13 bins; n_fft 28 has 15"):
        replace(SIZE, bands=((3, 1), (2, 5)))
    with pytest.raises(ValueError, match="take 20 bins; n_fft 28 has 15"):
        replace(SIZE, bands=((20, 1),))
    assert replace(SIZE, bands=()).bands == ()


def test_the_preset_has_a_third_of_the_places():
    size = PRESETS["talkers-16k"].locoformer
    assert size is not None and sum(count for count, _ in size.bands) == 87
    assert size.n_fft // 2 + 1 == 257
    edges_hz, bins = [], 0
    for count, width in size.bands:
        bins += count * width
        edges_hz.append(31.25 * (bins - 1))
    assert edges_hz == [1000.0, 2500.0, 4500.0, 8000.0]
