"""The spectrum in bands: groups of neighbouring bins in, features of each band between, masks of its bins out.

Band splitting (Luo and Yu, "Music source separation with band-split RNN", TASLP 2023) gives low frequencies, where the
harmonics of voices lie apart, bands of a bin, and high ones wide bands, so that a network over time and frequency has a
third of the places to work on.

Shapes: B batch, T frames, K bins, N bands (those of one width n_w, of w bins), D channels, J talkers.
"""

import torch
from torch import Tensor, nn

from allears.models.separate.config import LocoformerSize
from allears.nn.norms import RMSGroupNorm


def compressed(spectrum: Tensor, power: float) -> Tensor:
    """Spectrum (..., 2), real and imaginary part, with magnitudes to the ``power``; phases stay."""
    square = spectrum.square().sum(-1, keepdim=True) + 1e-8
    return spectrum * square ** ((power - 1) / 2)


class BandLinear(nn.Module):
    """A linear layer of each band's own: (..., n, I) to (..., n, O)."""

    def __init__(self, bands: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(bands, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(bands, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ni,nio->...no", x, self.weight) + self.bias


class BandSplit(nn.Module):
    """Spectrum (B, T, K, 2) to features (B, T, N, D). Magnitudes are compressed, so that quiet bands count."""

    def __init__(self, size: LocoformerSize) -> None:
        super().__init__()
        self.bands, self.power = size.bands, size.compression
        self.layers = nn.ModuleList([BandLinear(count, 2 * width, size.channels) for count, width in size.bands])

    def forward(self, spectrum: Tensor) -> Tensor:
        parts = split_bands(compressed(spectrum, self.power), self.bands)
        return torch.cat([layer(part.flatten(-2)) for layer, part in zip(self.layers, parts, strict=True)], dim=2)


class BandMasks(nn.Module):
    """Features (B, T, N, D) and the mixture's spectrum (B, T, K, 2) to the talkers' spectra (B, J, T, K, 2): complex
    masks, each value times a gate of its own."""

    def __init__(self, size: LocoformerSize, talkers: int) -> None:
        super().__init__()
        self.bands, self.talkers = size.bands, talkers
        self.norm = RMSGroupNorm(size.channels, size.groups)
        self.widen = nn.Linear(size.channels, 2 * size.channels)
        self.layers = nn.ModuleList(
            [BandLinear(count, size.channels * 2, 4 * width * talkers) for count, width in size.bands]
        )

    def forward(self, x: Tensor, spectrum: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.widen(self.norm(x)))
        masks = []
        for layer, part in zip(self.layers, hidden.split([count for count, _ in self.bands], dim=2), strict=True):
            value, gate = layer(part).float().chunk(2, dim=-1)
            mask = (value * gate.sigmoid()).unflatten(-1, (self.talkers, -1, 2))  # (B, T, n, J, w, 2)
            masks.append(mask.permute(0, 3, 1, 2, 4, 5).flatten(3, 4))
        mask = torch.cat(masks, dim=3)
        (a, b), (c, d) = mask.unbind(-1), spectrum.unsqueeze(1).unbind(-1)
        return torch.stack([a * c - b * d, a * d + b * c], dim=-1)


def split_bands(bins: Tensor, bands: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """bins (B, T, K, ...) to a part (B, T, n, w, ...) for each pair (n, w) of ``bands``."""
    parts = bins.split([count * width for count, width in bands], dim=2)
    return [part.unflatten(2, (count, width)) for part, (count, width) in zip(parts, bands, strict=True)]
