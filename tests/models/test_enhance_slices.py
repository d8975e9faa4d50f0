"""The network in slices: the same numbers as in one piece, in far less memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allears.models.enhance import PRESETS
from allears.models.enhance.chunks import WINDOW_S
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance
from allears.models.enhance.slices import SlicedNet

CONFIG = PRESETS["test"]


def states(frames: int, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x_t, y = torch.randn(2, batch, frames, CONFIG.n_fft // 2 + 1, 2, generator=rng)
    return x_t, y


@pytest.mark.parametrize("frames", [1, 2, 3, 16, 17, 37, 64])
@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_slices_give_what_the_whole_gives(perturbed_net, frames, rows):
    x_t, y = states(frames, batch=2)
    t = torch.tensor([0.5, 1.0])
    with torch.no_grad():
        whole = perturbed_net(x_t, y, t)
    got = SlicedNet(perturbed_net, rows, bands=24)(x_t, y, t)
    assert got.shape == y.shape and (got - y).abs().max() > 0.01
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("widths", [(8, 24, 16), (8, 8, 32)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_buffers_fit_any_widths(widths, blocks):
    torch.manual_seed(1)
    net = EnhanceNet(replace(CONFIG, widths=widths, blocks=blocks))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        x_t, y = states(21)
        whole = net(x_t, y, torch.ones(1))
    torch.testing.assert_close(SlicedNet(net, 4, 10)(x_t, y, torch.ones(1)), whole, atol=1e-5, rtol=1e-4)


def test_an_answer_stays_when_the_buffers_serve_again(perturbed_net):
    """Long, short, long again: nothing of one window reaches the next, whatever the buffers hold."""
    sliced = SlicedNet(perturbed_net, rows=8)
    first = [sliced(*states(frames, seed=frames), torch.ones(1)) for frames in (40, 7, 40, 50)]
    kept = [y.clone() for y in first]
    sliced._block.fill_(torch.nan)
    for before, copy, frames in zip(first, kept, (40, 7, 40, 50), strict=True):
        assert torch.equal(before, copy)
        assert torch.equal(sliced(*states(frames, seed=frames), torch.ones(1)), before)


def test_inputs_are_not_changed_and_grad_mode_does_not_matter(perturbed_net):
    x_t, y = states(20)
    given = x_t.clone(), y.clone()
    sliced = SlicedNet(perturbed_net, rows=4)
    with torch.inference_mode():
        first = sliced(x_t, y, torch.ones(1))
    assert torch.equal(sliced(x_t, y, torch.ones(1)), first)
    assert torch.equal(x_t, given[0]) and torch.equal(y, given[1])


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_solvers_of_several_calls_agree(perturbed_net, solver):
    rng = torch.Generator().manual_seed(3)
    noisy = 0.1 * torch.randn(1, 6000, generator=rng)
    z = torch.randn(1, 48, 256, 2, generator=rng)
    with torch.no_grad():
        whole = enhance(perturbed_net, CONFIG, noisy, 2, solver, z)
        torch.testing.assert_close(enhance(SlicedNet(perturbed_net, 5), CONFIG, noisy, 2, solver, z), whole)


def test_the_enhancer_on_a_cpu_runs_in_slices_in_buffers_of_its_session(small_enhancer, monkeypatch):
    """Three windows, the last one shorter: one block of memory, made at the first."""
    x = 0.1 * np.random.default_rng(0).standard_normal(16_000 * 13).astype(np.float32)
    blocks = []
    original = SlicedNet._buffers

    def watched(self, *shapes):
        parts = original(self, *shapes)
        blocks.append((self._block.data_ptr(), self._block.numel()))
        return parts

    monkeypatch.setattr(SlicedNet, "_buffers", watched)
    got = small_enhancer(x, 16_000)
    assert len(blocks) == 3 and len(set(blocks)) == 1
    monkeypatch.setattr("allears.models.enhance.pipeline.SlicedNet", lambda net: net)
    np.testing.assert_allclose(got, small_enhancer(x, 16_000), atol=1e-5)


class _LargestResult(TorchDispatchMode):
    """Bytes of the largest storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for y in out if isinstance(out, tuple | list) else (out,):
            if isinstance(y, torch.Tensor) and y.untyped_storage().data_ptr() not in given:
                self.most = max(self.most, y.untyped_storage().nbytes())
        return out


def test_temporaries_are_a_small_part_of_a_window():
    """After the first window, which makes the block, no operation asks for more than a twelfth of that block."""
    config = replace(PRESETS["base"], blocks=1)
    sliced = SlicedNet(EnhanceNet(config))
    frames = round(WINDOW_S * config.sample_rate_hz / config.hop) + 1
    x_t, y = states(frames)
    sliced(x_t, y, torch.ones(1))
    with _LargestResult() as results:
        sliced(x_t, y, torch.ones(1))
    block = sliced._block.numel() * sliced._block.element_size()
    assert 0 < results.most < block / 12
