"""Causal layers: pieces give what the whole gives, and each equals its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from allears.nn.causal import BandsUp, CausalConv, fuse_norms, hold_peaks, recur, running_mean


def at_rest(module):
    """With batch norms that do something."""
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
                norm.weight.normal_()
                norm.bias.normal_()
    return module.eval()


@pytest.mark.parametrize(("taps", "stride", "groups"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 1, 2)])
def test_conv_hears_itself_and_what_came_before(taps, stride, groups):
    conv = at_rest(CausalConv(4, 6, taps=taps, stride=stride, groups=groups))
    x = torch.randn(2, 4, 9, 11)
    y, past = conv(x, conv.initial(2, 11))
    whole = torch.cat([torch.zeros(2, 4, taps - 1, 11), x], dim=2)
    weight = conv.conv.weight
    wanted = torch.nn.functional.conv2d(whole, weight, stride=(1, stride), padding=(0, 1), groups=groups)
    torch.testing.assert_close(y, torch.nn.functional.leaky_relu(conv.norm(wanted), 0.1))
    assert y.shape == (2, 6, 9, -(-11 // stride)) and past.shape == (2, 4, taps - 1, 11)
    pieces, past = [], conv.initial(2, 11)
    for piece in x.split([1, 5, 1, 2], dim=2):
        part, past = conv(piece, past)
        pieces.append(part)
    torch.testing.assert_close(torch.cat(pieces, dim=2), y)


def test_fused_norms_change_nothing():
    net = at_rest(nn.ModuleList([CausalConv(3, 5, taps=2), CausalConv(5, 4, plain=True), BandsUp(4, 2)]))

    def run(x):
        x, _ = net[0](x, net[0].initial(2, 7))
        return net[2](net[1](x, x)[0])

    x = torch.randn(2, 3, 6, 7)
    wanted = run(x)
    fuse_norms(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-5)


def test_bands_up_lays_two_outputs_side_by_side():
    up = BandsUp(3, 2, plain=True)
    x = torch.randn(2, 3, 4, 5)
    both = up.twice.conv(x)
    y = up(x)
    assert y.shape == (2, 2, 4, 9)
    for channel in range(2):
        torch.testing.assert_close(y[:, channel, :, ::2], both[:, 2 * channel])
        torch.testing.assert_close(y[:, channel, :, 1::2], both[:, 2 * channel + 1, :, :4])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(0.01, 3.0))
def test_peaks_are_held(sizes, release):
    x = torch.randn(2, 3, sum(sizes))
    pieces, last = [], torch.full((2, 3), -1.0)
    for piece in x.split(sizes, dim=-1):
        part, last = hold_peaks(piece, release, last)
        pieces.append(part)
    held, wanted = torch.full((2, 3), -1.0), []
    for frame in x.unbind(-1):
        held = torch.maximum(frame, held - release)
        wanted.append(held)
    torch.testing.assert_close(torch.cat(pieces, dim=-1), torch.stack(wanted, dim=-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last, held, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_running_mean_forgets(sizes):
    x, rate, start = torch.randn(2, 3, sum(sizes), 4), torch.tensor([0.01, 0.3, 2.0]), torch.randn(2, 3, 4)
    pieces, last = [], start
    for piece in x.split(sizes, dim=2):
        part, last = running_mean(piece, rate, last)
        pieces.append(part)
    mean, wanted = start, []
    for frame in x.unbind(2):
        mean = mean + (1 - torch.exp(-rate))[:, None] * (frame - mean)
        wanted.append(mean)
    torch.testing.assert_close(torch.cat(pieces, dim=2), torch.stack(wanted, dim=2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, mean, rtol=1e-4, atol=1e-5)


def test_the_running_mean_has_gradients():
    x = torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([0.2, 1.0], dtype=torch.float64, requires_grad=True)
    last = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(running_mean, (x, rate, last))
    one = x.detach()[:, :, :1].requires_grad_()
    assert torch.autograd.gradcheck(running_mean, (one, rate, last))


def test_recur_stays_in_float32_under_autocast():
    gru, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    wanted, last = gru(x, torch.zeros(1, 2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        y, state = recur(gru, x, torch.zeros(1, 2, 4))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state, last)
