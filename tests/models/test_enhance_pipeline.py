"""The enhancer as users call it: shapes, kinds, rates, levels, refusals."""

import numpy as np
import pytest
import torch


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_the_small_net_changes_its_input(small_enhancer):
    x = noise(8000)
    assert np.abs(small_enhancer(x, 16_000) - x).max() > 0.01


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_level_in_is_level_out(small_enhancer, scale):
    x = noise(9000)
    y = small_enhancer(x, 16_000)
    scaled = small_enhancer(x * np.float32(scale), 16_000)
    np.testing.assert_allclose(scaled / scale, y, atol=1e-4 * np.abs(y).max())


def test_shapes_agree(small_enhancer):
    x = noise(2, 3, 5000)
    full = small_enhancer(x, 16_000)
    assert full.shape == x.shape
    np.testing.assert_allclose(small_enhancer(x[0], 16_000), full[0], atol=1e-6)
    np.testing.assert_allclose(small_enhancer(x[0, 0], 16_000), full[0, 0], atol=1e-6)
    assert np.abs(full[0, 1] - full[0, 0]).max() > 0.01


def test_arrays_and_tensors_agree(small_enhancer):
    x = noise(2, 5000)
    expected = small_enhancer(x, 16_000)
    got = small_enhancer(torch.from_numpy(x), 16_000)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), expected)
    strided = np.asfortranarray(x)
    np.testing.assert_array_equal(small_enhancer(strided, 16_000), expected)
    with_gradient = torch.from_numpy(x).requires_grad_()
    np.testing.assert_array_equal(small_enhancer(with_gradient, 16_000).detach().numpy(), expected)


@pytest.mark.parametrize("kind", [np.float16, np.float64, torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_comes_back(small_enhancer, kind):
    x = noise(4000)
    given = torch.from_numpy(x).to(kind) if isinstance(kind, torch.dtype) else x.astype(kind)
    single = given.float() if isinstance(given, torch.Tensor) else given.astype(np.float32)
    got, expected = small_enhancer(given, 16_000), small_enhancer(single, 16_000)
    assert got.dtype == kind
    tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4, np.float16: 5e-4}.get(kind, 0)
    wide = got.double().numpy() if isinstance(got, torch.Tensor) else got.astype(np.float64)
    np.testing.assert_allclose(wide, np.asarray(expected, np.float64), atol=tolerance * np.abs(wide).max(), rtol=0)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000, 96_000])
def test_nothing_shifts_at_any_rate(identity_enhancer, rate):
    """A tone in band comes through the resamplers, windows and the spectrum of an untrained net as it was."""
    length = int(0.7 * rate) + 1
    x = (0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / rate)).astype(np.float32)
    y = identity_enhancer(x, rate)
    inner = slice(rate // 20, -rate // 20)
    assert y.shape == x.shape
    np.testing.assert_allclose(y[inner], x[inner], atol=2e-3)


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 96_000])
@pytest.mark.parametrize("length", [1, 2, 129])
def test_the_shortest_signals(small_enhancer, rate, length):
    y = small_enhancer(np.full(length, 0.3, np.float32), rate)
    assert y.shape == (length,) and np.isfinite(y).all()


def test_eight_channels_are_enhanced_each_by_itself(small_enhancer):
    x = noise(8, 3000)
    x[3] = 0
    y = small_enhancer(x, 16_000)
    changed = x.copy()
    changed[5] *= -0.5
    other = small_enhancer(changed, 16_000)
    keep = [c for c in range(8) if c != 5]
    np.testing.assert_array_equal(other[keep], y[keep])
    assert (y[3] == 0).all() and np.abs(other[5] - y[5]).max() > 1e-3


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_digital_silence_stays_zero(small_enhancer, rate):
    assert (small_enhancer(np.zeros((2, 5000), np.float32), rate) == 0).all()


def test_seed_steps_and_solver_count(small_enhancer):
    x = noise(4000)
    y = small_enhancer(x, 16_000)
    np.testing.assert_array_equal(small_enhancer(x, 16_000, seed=0, steps=1, solver="euler"), y)
    for options in ({"seed": 1}, {"steps": 2}, {"solver": "midpoint"}):
        assert np.abs(small_enhancer(x, 16_000, **options) - y).max() > 1e-4


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.ones(10, np.int16), r"dtype int16 given.*divide by 32768"),
        (torch.ones(10, dtype=torch.int16), r"dtype torch.int16 given"),
        (np.ones(10, np.complex64), "dtype complex64 given"),
        (np.float32([0.1, np.nan, np.inf]), "2 samples are NaN or infinite"),
        (torch.tensor([0.1, float("nan")]), "1 samples are NaN or infinite"),
        (np.zeros(0, np.float32), r"shape \(0,\) given"),
        (np.zeros((0, 100), np.float32), r"shape \(0, 100\) given"),
        (np.float32(0.5), r"shape \(\) given"),
        (np.zeros((1, 1, 1, 9), np.float32), "at least one sample is wanted"),
        (np.float32([1e25, -1e25]), r"a sample of size 1.0e\+25; full scale is 1"),
    ],
)
def test_bad_audio_is_refused(small_enhancer, audio, message):
    with pytest.raises(ValueError, match=message):
        small_enhancer(audio, 16_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rate_hz": 0}, "sample_rate_hz: 0 given; rates from 4000 to 384000"),
        ({"sample_rate_hz": 500_000}, "sample_rate_hz: 500000 given"),
        ({"sample_rate_hz": float("nan")}, "sample_rate_hz: nan given"),
        ({"steps": 0}, "steps: 0 given; 1 to 30"),
        ({"steps": 31}, "steps: 31 given"),
        ({"solver": "rk4"}, "solver: 'rk4' is unknown; known are euler, midpoint, heun"),
        ({"seed": -1}, "seed: -1 given"),
    ],
)
def test_bad_options_are_refused_also_for_silence(small_enhancer, options, message):
    with pytest.raises(ValueError, match=message):
        small_enhancer(np.zeros(100, np.float32), **{"sample_rate_hz": 16_000, **options})
