"""Finds by how many frames the microphone lags behind the reference, and brings the reference into time.

After the alignment block of DeepVQE (Indenbom et al., Interspeech 2023): the similarity of the microphone's features to
the reference's at each of the last D frames, summed over bands, a small convolution over time and delay, softmax over
the delays, and the reference's frames weighted by it. What is different, and why:

- Similarities are averaged over time, each head with a time constant of its own (0.1 to 2 s at first, learned). A delay
  is told by many frames together, as in generalised cross-correlation, not by the few that the convolution hears.
- They are normalised over the delays, so that loud and quiet, and speech and the pause after it, count the same.
- What is brought into time is the reference's spectrum itself, not features of it: a frame of it is a third as large,
  so the ring of D frames is cheap to carry, and the stages compare both signals bin by bin.
- Both encoders start with the same weights: an untrained block finds delays already.

The (T, D) similarities of L frames are a band of the (L, D - 1 + L) products of all with all. Nothing of the size of
T * D * F is ever made. Inside, the longest delay stands first, as the oldest frame does in the ring.

Shapes: B batch, T frames, F bins, F' bands, D delays, H heads, L frames of a piece.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.echo.config import EchoConfig
from allears.nn.causal import CausalConv, in_float32, running_mean

_TAPS, _SPAN = 5, 3  # the convolution over time and delay
_TIMES_S = (0.1, 2.0)
_EPS = 1e-5


class AlignState(NamedTuple):
    """``encode`` the pasts of both convolutions; ``keys`` (B, H, D - 1, F') and ``frames`` (B, 3, D - 1, F) the rings;
    ``scores`` (B, H, D) the means; ``history`` (B, H, 4, D) what the convolution over time needs."""

    encode: tuple[Tensor, Tensor]
    keys: Tensor
    frames: Tensor
    scores: Tensor
    history: Tensor


def banded_products(q: Tensor, k: Tensor) -> Tensor:
    """<q_t, k_{t-d}> for each of L frames and D delays, the longest delay first.

    Args:
        q: (..., L, F).
        k: (..., D - 1 + L, F), of the D - 1 frames before, and of the same L.

    Returns:
        (..., L, D), D - 1 first.
    """
    length, width = q.shape[-2], k.shape[-2]
    delays = width - length + 1
    products = q @ k.transpose(-1, -2)
    if length == 1:
        return products
    flat = F.pad(products.flatten(-2), (0, length))  # row t begins t places further to the right
    return flat.unflatten(-1, (length, width + 1))[..., :delays]


def banded_sum(weights: Tensor, values: Tensor) -> Tensor:
    """sum_d weights[t, d] values[t - d].

    Args:
        weights: (..., L, D), the longest delay first.
        values: (..., D - 1 + L, F), of the D - 1 frames before, and of the same L.

    Returns:
        (..., L, F).
    """
    length, width = weights.shape[-2], values.shape[-2]
    if length == 1:
        return weights @ values
    flat = F.pad(weights, (0, length)).flatten(-2)[..., : length * width]
    return flat.unflatten(-1, (length, width)) @ values


class Align(nn.Module):
    """Features of microphone and reference to the reference in time, and the weights of the delays."""

    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        self.delays, self.heads = config.align_frames, config.align_heads
        width, heads = config.align_width, config.align_heads
        # microphone and reference are two groups of one convolution: half as many operations in a step
        self.enter = CausalConv(6, 2 * width, taps=3, stride=2, groups=2)
        self.compare = CausalConv(2 * width, 2 * heads, taps=3, stride=2, groups=2, plain=True)
        shortest, longest = (math.log(s / config.hop_s) for s in _TIMES_S)
        self.log_rate = nn.Parameter(-torch.linspace(shortest, longest, heads))
        self.weigh = nn.Conv2d(heads, 1, (_TAPS, _SPAN), padding=(0, _SPAN // 2), bias=False)
        with torch.no_grad():
            self.weigh.weight.mul_(0.1)[:, :, -1, _SPAN // 2] += 1.0 / math.sqrt(heads)
            for conv in (self.enter.conv, self.compare.conv):
                half = conv.out_channels // 2
                conv.weight[half:] = conv.weight[:half]
                if conv.bias is not None:
                    conv.bias[half:] = conv.bias[:half]

    def initial(self, batch: int, bins: int) -> AlignState:
        """Silence before the first frame."""
        half, zeros = (bins + 1) // 2, self.log_rate.new_zeros
        return AlignState(
            (self.enter.initial(batch, bins), self.compare.initial(batch, half)),
            zeros(batch, self.heads, self.delays - 1, (half + 1) // 2),
            zeros(batch, 3, self.delays - 1, bins),
            zeros(batch, self.heads, self.delays),
            zeros(batch, self.heads, _TAPS - 1, self.delays),
        )

    def forward(self, mic: Tensor, reference: Tensor, state: AlignState) -> tuple[Tensor, Tensor, AlignState]:
        """Features (B, 3, T, F) of both and the past, to the reference in time (B, 3, T, F), the weights (B, T, D) of
        the delays, and the past of what follows. In float32, also under autocast."""
        with in_float32(mic.device):
            x, entered = self.enter(torch.cat([mic, reference], dim=1).float(), state.encode[0])
            x, compared = self.compare(x, state.encode[1])
            q, k = x.chunk(2, dim=1)
            keys = torch.cat([state.keys, k], dim=2)
            frames = torch.cat([state.frames, reference.float()], dim=2)
            means, scores = self._scores(q, keys, state.scores)
            normal = torch.cat([state.history, F.layer_norm(means, (self.delays,), eps=_EPS)], dim=2)
            weights = self.weigh(normal)[:, 0].softmax(-1)
            aligned = self._in_time(weights, frames)
        ring = 1 - self.delays
        return (
            aligned,
            weights.flip(-1),
            AlignState((entered, compared), keys[:, :, ring:], frames[:, :, ring:], scores, normal[:, :, 1 - _TAPS :]),
        )

    def _scores(self, q: Tensor, keys: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Mean similarities (B, H, T, D) of q (B, H, T, F') to the keys (B, H, D - 1 + T, F'), and the last of them."""
        rate, means = self.log_rate.exp(), []
        for begin in range(0, q.shape[2], self.delays):
            piece = q[:, :, begin : begin + self.delays]
            span = keys[:, :, begin : begin + piece.shape[2] + self.delays - 1]
            mean, last = running_mean(banded_products(piece, span), rate, last)
            means.append(mean)
        return means[0] if len(means) == 1 else torch.cat(means, dim=2), last

    def _in_time(self, weights: Tensor, frames: Tensor) -> Tensor:
        """Frames (B, 3, D - 1 + T, F) summed by weights (B, T, D) of the delays: (B, 3, T, F)."""
        pieces = []
        for begin in range(0, weights.shape[1], self.delays):
            piece = weights[:, None, begin : begin + self.delays]
            span = frames[:, :, begin : begin + piece.shape[2] + self.delays - 1]
            pieces.append(banded_sum(piece, span))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
