"""One stage of the echo canceller: from features to a filter over time and frequency, applied to a spectrum.

Shapes: B batch, C channels, T frames, F bins, F3 bands (an eighth of the bins), H hidden; spectra are (B, 2, T, F),
real and imaginary parts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.models.echo.config import EchoConfig
from allears.nn.causal import BandsUp, CausalConv, recur

_REACH = 3  # the filter hears so many frames, the present one the last, and so many bins, its own in the middle
_TAPS = _REACH * _REACH


class StageState(NamedTuple):
    """``down`` and ``up``: pasts of the convolutions. ``bands`` (1, B F3, C) and ``all_bands`` (1, B, H): of the GRUs.
    ``spectrum`` (B, 2, 2, F): the last frames of what is filtered."""

    down: tuple[Tensor, Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    bands: Tensor
    all_bands: Tensor
    spectrum: Tensor


def neighbours(spectrum: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Each bin with those around it, the earliest frame first, in each the lowest bin: (B, 2, 9, T, F).

    Args:
        spectrum: (B, 2, T, F).
        past: (B, 2, 2, F), the two frames before.

    Returns:
        Those, and the past of what follows.
    """
    batch, _, frames, bins = spectrum.shape
    whole = torch.cat([past, spectrum], dim=2)
    near = F.unfold(whole, (_REACH, _REACH), padding=(0, _REACH // 2))
    return near.reshape(batch, 2, _TAPS, frames, bins), whole[:, :, 1 - _REACH :]


def weighted(taps: Tensor, values: Tensor) -> Tensor:
    """The sum of N complex values with N complex weights, (B, 2, N, T, F) both: (B, 2, T, F)."""
    own = (taps * values).sum(2)
    crossed = (taps * values.flip(1)).sum((1, 2))
    return torch.stack([own[:, 0] - own[:, 1], crossed], dim=1)


class Core(nn.Module):
    """Memory: a GRU in each band, with weights that all bands share, and one over all bands. (B, C, T, F3) to the same.

    The first follows how the echo of a band decays and how loud it is, the second hears the whole frame.
    """

    def __init__(self, channels: int, bands: int, config: EchoConfig) -> None:
        super().__init__()
        self.bands = nn.GRU(channels, channels)
        self.narrow = nn.Linear(channels, config.neck)
        self.all_bands = nn.GRU(bands * config.neck, config.hidden)
        self.spread = nn.Linear(config.hidden, bands * config.neck)
        self.widen = nn.Linear(config.neck, channels)

    def forward(self, x: Tensor, bands: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and the states of both GRUs, to the same and the hidden values (T, B, H) of the second."""
        batch, channels, frames, count = x.shape
        rows = x.permute(2, 0, 3, 1).reshape(frames, batch * count, channels)
        y, bands = recur(self.bands, rows, bands)
        y = y + rows
        narrow = self.narrow(y).reshape(frames, batch, -1)
        heard, hidden = recur(self.all_bands, narrow, hidden)
        spread = self.spread(heard).reshape(frames, batch * count, -1)
        y = y + self.widen(spread)
        return y.reshape(frames, batch, count, channels).permute(1, 3, 0, 2).contiguous(), bands, hidden, heard


class Stage(nn.Module):
    """Features (B, C, T, F) and a spectrum to a better spectrum.

    A U-Net over the bins around :class:`Core`. Each bin becomes the sum of itself and its neighbours, with nine complex
    weights of its own (deep filtering; Mack and Habets, 2020; over three frames and three bins as in DeepVQE), times
    the gain 2 sigmoid(g), which goes to nothing more easily than nine weights do. Where a microphone stands beside the
    spectrum, it is a tenth value: what the stage before took away by mistake can come back. An untrained stage leaves
    the spectrum as it is.

    Args:
        features: C.
        beside: whether a microphone stands beside the spectrum.
        config: sizes.
    """

    def __init__(self, features: int, beside: bool, config: EchoConfig) -> None:
        super().__init__()
        wide, half, core = config.widths
        self.down = nn.ModuleList(
            CausalConv(a, b, taps=config.taps, stride=2) for a, b in ((features, wide), (wide, half), (half, core))
        )
        self.sizes = [config.bins]
        for _ in self.down:
            self.sizes.append((self.sizes[-1] + 1) // 2)
        self.core = Core(core, self.sizes[-1], config)
        self.to_half, self.to_wide = BandsUp(core, half), BandsUp(half, wide)
        self.refine = nn.ModuleList(CausalConv(c, c, taps=config.taps) for c in (half, wide))
        self.values = _TAPS + beside
        self.leave = BandsUp(wide, 2 * self.values + 1, plain=True)
        conv = self.leave.twice.conv
        with torch.no_grad():
            conv.weight.zero_()
            conv.bias.zero_()  # type: ignore[union-attr]
            present = (_REACH - 1) * _REACH + _REACH // 2
            conv.bias[2 * present : 2 * present + 2] = 1.0  # type: ignore[index]

    def initial(self, batch: int) -> StageState:
        """Silence before the first frame."""
        weight = self.leave.twice.conv.weight
        core, bands = self.core, self.sizes[3]
        d1, d2, d3 = (conv.initial(batch, bins) for conv, bins in zip(self.down, self.sizes, strict=False))  # type: ignore[operator]
        u2, u1 = (conv.initial(batch, bins) for conv, bins in zip(self.refine, self.sizes[2:0:-1], strict=True))  # type: ignore[operator]
        return StageState(
            (d1, d2, d3),
            (u2, u1),
            weight.new_zeros(1, batch * bands, core.bands.hidden_size),
            weight.new_zeros(1, batch, core.all_bands.hidden_size),
            weight.new_zeros(batch, 2, _REACH - 1, self.sizes[0]),
        )

    def forward(
        self, features: Tensor, spectrum: Tensor, mic: Tensor, state: StageState
    ) -> tuple[Tensor, Tensor, StageState]:
        """Features (B, C, T, F), what is filtered, and the microphone beside it, both (B, 2, T, F), to the filtered
        spectrum, the hidden values (T, B, H), and the past of what follows."""
        wide, d1 = self.down[0](features, state.down[0])
        half, d2 = self.down[1](wide, state.down[1])
        x, d3 = self.down[2](half, state.down[2])
        y, bands, all_bands, heard = self.core(x, state.bands, state.all_bands)
        half = self.to_half(y) + half
        y, u2 = self.refine[0](half, state.up[0])
        wide = self.to_wide(half + y) + wide
        y, u1 = self.refine[1](wide, state.up[1])
        out = self.leave(wide + y).float()
        values, past = neighbours(spectrum, state.spectrum)
        if self.values > _TAPS:
            values = torch.cat([values, mic[:, :, None]], dim=2)
        taps = out[:, :-1].reshape(out.shape[0], 2, self.values, *out.shape[2:])
        filtered = weighted(taps, values) * (2.0 * out[:, -1:].sigmoid())
        return filtered, heard, StageState((d1, d2, d3), (u2, u1), bands, all_bands, past)
