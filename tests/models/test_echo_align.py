"""The alignment block: its sums over a band, what it finds, and that pieces give what the whole gives.

Shapes: B batch, H heads, L frames, D delays, F bins.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.echo_nets import SMALL

from allears.models.echo.align import Align, banded_products, banded_sum
from allears.models.echo.config import PRESETS


@pytest.mark.parametrize("length", [1, 2, 6, 17])
@pytest.mark.parametrize("delays", [2, 6, 9])
def test_band_is_what_a_loop_gives(length, delays):
    q, k = torch.randn(2, 3, length, 5), torch.randn(2, 3, delays - 1 + length, 5)
    weights = torch.randn(2, 3, length, delays)
    products, sums = torch.empty(2, 3, length, delays), torch.zeros(2, 3, length, 5)
    for t in range(length):
        for d in range(delays):
            frame = k[:, :, delays - 1 + t - d]
            products[:, :, t, d] = (q[:, :, t] * frame).sum(-1)
            sums[:, :, t] += weights[:, :, t, d, None] * frame
    torch.testing.assert_close(banded_products(q, k), products.flip(-1))
    torch.testing.assert_close(banded_sum(weights.flip(-1), k), sums)


def moved(config=SMALL, seed=0):
    torch.manual_seed(seed)
    align = Align(config)
    with torch.no_grad():
        for parameter in align.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return align.eval()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_pieces_give_what_the_whole_gives(sizes):
    align, frames = moved(), sum(sizes)
    mic, reference = torch.randn(2, 2, 3, frames, 33).unbind(0)
    with torch.no_grad():
        aligned, weights, last = align(mic, reference, align.initial(2, 33))
        state, parts = align.initial(2, 33), []
        for m, r in zip(mic.split(sizes, dim=2), reference.split(sizes, dim=2), strict=True):
            *part, state = align(m, r, state)
            parts.append(part)
    torch.testing.assert_close(torch.cat([a for a, _ in parts], dim=2), aligned, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.cat([w for _, w in parts], dim=1), weights, rtol=1e-3, atol=1e-4)
    for ours, wanted in zip(state[1:], last[1:], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_the_reference_is_weighted_by_the_weights():
    align = moved()
    mic, reference = torch.randn(2, 1, 3, 40, 33).unbind(0)
    with torch.no_grad():
        aligned, weights, _ = align(mic, reference, align.initial(1, 33))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 40))
    wanted = torch.zeros_like(aligned)
    for d in range(12):
        wanted[:, :, d:] += weights[:, None, d:, d, None] * reference[:, :, : 40 - d]
    torch.testing.assert_close(aligned, wanted, rtol=1e-4, atol=1e-5)


def speech_like(frames, bins, seed):
    """Features whose level moves in time, each quarter of the bins for itself."""
    rng = torch.Generator().manual_seed(seed)
    rhythm = (
        torch.randn(frames // 4 + 2, 4, generator=rng)
        .repeat_interleave(4, 0)[:frames]
        .repeat_interleave(bins // 4 + 1, 1)[:, :bins]
    )
    parts = torch.randn(2, frames, bins, generator=rng) * rhythm.exp()
    size = parts.square().sum(0, keepdim=True).sqrt()
    return torch.cat([parts * size.pow(-0.7), size.pow(0.3)])[None]


@pytest.mark.parametrize("delay", [0, 7, 31, 90])
def test_an_untrained_block_finds_delays(delay):
    torch.manual_seed(0)
    align = Align(PRESETS["base"]).eval()
    reference = speech_like(400, 161, 1)
    echo = torch.cat([torch.zeros(1, 3, delay, 161), reference], dim=2)[:, :, :400]
    mic = 0.7 * echo + 0.3 * speech_like(400, 161, 2)
    with torch.no_grad():
        _, weights, _ = align(mic, reference, align.initial(1, 161))
    found = weights[0, delay + 100 :].argmax(-1)
    assert ((found - delay).abs() <= 1).float().mean() > 0.9


def test_a_delay_is_kept_in_a_pause():
    torch.manual_seed(0)
    align = Align(PRESETS["base"]).eval()
    reference = torch.cat([speech_like(300, 161, 1), 0.1 + torch.zeros(1, 3, 100, 161)], dim=2)
    mic = torch.cat([torch.zeros(1, 3, 20, 161), reference], dim=2)[:, :, :400]
    with torch.no_grad():
        _, weights, _ = align(mic, reference, align.initial(1, 161))
    assert ((weights[0, 330:].argmax(-1) - 20).abs() <= 1).float().mean() > 0.9


def test_nothing_of_the_size_of_all_delayed_frames_is_made(monkeypatch):
    """No tensor holds as many numbers as frames x delays x bins."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_contiguous():
                largest = max(largest, out.numel())
            return out

    align = Align(PRESETS["base"]).eval()
    with torch.no_grad(), Watch():
        align(torch.zeros(1, 3, 300, 161), torch.zeros(1, 3, 300, 161), align.initial(1, 161))
    assert 300 * 100 <= largest < 300 * 100 * 161 / 3
