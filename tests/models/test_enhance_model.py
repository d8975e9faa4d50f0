"""Configuration, state, network and sampler of the enhancer."""

from dataclasses import replace

import pytest
import torch

from allears.models.enhance import PRESETS, EnhanceConfig
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance, sampler
from allears.models.enhance.state import compress, expand, level_of, to_state, to_waveform

CONFIG = PRESETS["test"]


def states(frames: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x_t, y = torch.randn(2, batch, frames, CONFIG.n_fft // 2 + 1, 2, generator=rng)
    return x_t, y


def test_config_refuses_what_the_network_cannot_hold():
    with pytest.raises(ValueError, match="n_fft: 512 gives 257 bins"):
        EnhanceConfig(n_fft=512)
    with pytest.raises(ValueError, match="heads: 3 must divide"):
        EnhanceConfig(heads=3)
    with pytest.raises(ValueError, match="even size"):
        replace(CONFIG, widths=(8, 16, 6), heads=2)


def test_compress_keeps_the_phase_and_takes_the_root():
    spectrum = 4 * torch.exp(1j * torch.tensor([[[0.3, -2.0, 3.1]]]))
    state = torch.view_as_complex(compress(spectrum, CONFIG).contiguous()).transpose(-1, -2)
    torch.testing.assert_close(state, 0.15 * 2 * spectrum / 4, atol=1e-6, rtol=1e-5)


def test_expand_is_the_inverse_of_compress():
    rng = torch.Generator().manual_seed(0)
    size = 10 ** (5 * torch.rand(2, 256, 9, generator=rng) - 3)
    spectrum = torch.polar(size, 6.28 * torch.rand(2, 256, 9, generator=rng))
    torch.testing.assert_close(expand(compress(spectrum, CONFIG), CONFIG), spectrum, rtol=2e-3, atol=1e-5)
    assert expand(torch.zeros(1, 3, 256, 2), CONFIG).abs().max() == 0


@pytest.mark.parametrize("length", [1, 127, 128, 4000])
def test_waveform_survives_the_state(length):
    x = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    state = to_state(x, CONFIG)
    assert state.shape == (2, -(-length // CONFIG.hop) + 1, 256, 2)
    torch.testing.assert_close(to_waveform(state, length, CONFIG), x, atol=1e-4, rtol=0)


def test_level_is_the_root_mean_square():
    x = torch.tensor([[3.0, -4.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(level_of(x), torch.tensor([[12.5**0.5], [1e-4]]))


@pytest.mark.parametrize("frames", [2, 7])
def test_untrained_network_returns_the_recording(frames):
    x_t, y = states(frames)
    torch.testing.assert_close(EnhanceNet(CONFIG)(x_t, y, torch.tensor([0.2, 1.0])), y)


def test_the_mask_turns_phases_and_the_residual_adds():
    net = EnhanceNet(CONFIG)
    with torch.no_grad():
        net.leave.bias.copy_(torch.tensor([0.0, 2.0, 0.5, -0.25]))
    x_t, y = states(4)
    expected = 2j * torch.view_as_complex(y) + (0.5 - 0.25j)
    torch.testing.assert_close(torch.view_as_complex(net(x_t, y, torch.ones(2)).contiguous()), expected)


@pytest.mark.parametrize("frames", [1, 5, 63])
def test_odd_frame_counts_are_padded_by_one_silent_frame(perturbed_net, frames):
    x_t, y = states(frames)
    t = torch.tensor([0.5, 1.0])
    padded = [torch.nn.functional.pad(s, (0, 0, 0, 0, 0, 1)) for s in (x_t, y)]
    with torch.no_grad():
        got = perturbed_net(x_t, y, t)
        torch.testing.assert_close(got, perturbed_net(*padded, t)[:, :frames])
    assert got.shape == y.shape and (got - y).abs().max() > 0.01


def test_network_hears_all_three_inputs_and_keeps_clips_apart(perturbed_net):
    x_t, y = states(8)
    t = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        out = perturbed_net(x_t, y, t)
        for changed in ((x_t + 1, y, t), (x_t, y + 1, t), (x_t, y, t + 0.5)):
            assert (perturbed_net(*changed) - out).abs().max() > 1e-3
        torch.testing.assert_close(perturbed_net(x_t[1:], y[1:], t[1:]), out[1:], atol=1e-5, rtol=1e-4)


def test_gradient_reaches_every_parameter(perturbed_net):
    x_t, y = states(9)
    perturbed_net(x_t, y, torch.tensor([0.3, 1.0])).square().mean().backward()
    for name, parameter in perturbed_net.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("prior", ["noisy", "gaussian"])
def test_one_euler_step_is_one_prediction(perturbed_net, prior):
    config = replace(CONFIG, prior=prior)
    rng = torch.Generator().manual_seed(1)
    noisy = 0.1 * torch.randn(2, 3000, generator=rng)
    level = level_of(noisy)
    y = to_state(noisy / level, config)
    z = torch.randn(y.shape, generator=rng)
    with torch.no_grad():
        x_1 = config.sigma * z + (y if prior == "noisy" else 0)
        expected = to_waveform(perturbed_net(x_1, y, torch.ones(2)), 3000, config) * level
        got = enhance(perturbed_net, config, noisy, steps=1, solver="euler", noise=z)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(enhance(perturbed_net, config, noisy, 1, "heun", z), got)
        for steps, solver in ((2, "euler"), (1, "midpoint"), (2, "heun")):
            assert (enhance(perturbed_net, config, noisy, steps, solver, z) - got).abs().max() > 1e-4


def test_noise_comes_from_the_generator(perturbed_net):
    noisy = 0.1 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))

    def run(seed):
        with torch.no_grad():
            return enhance(perturbed_net, CONFIG, noisy, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_sampler_takes_the_configuration_s_defaults_and_refuses_nonsense():
    assert sampler(replace(CONFIG, steps=4, solver="heun"), None, None) == (4, "heun")
    assert sampler(CONFIG, 30, "midpoint") == (30, "midpoint")
    for steps in (0, -1, 31):
        with pytest.raises(ValueError, match=f"steps: {steps} given"):
            sampler(CONFIG, steps, None)
    with pytest.raises(ValueError, match="solver: 'rk4' is unknown; known are euler, midpoint, heun"):
        sampler(CONFIG, None, "rk4")
