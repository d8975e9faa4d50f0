"""TF-Locoformer (Saijo et al., IWAENC 2024) and FLA-TFLocoformer (Wang et al., Interspeech 2025): layers along
frequency and along time on the mixture's spectrum, which end in the spectra of the talkers.

Shapes: B batch, S samples, T frames, K bins, N bands, D channels, J talkers.
"""

import torch
from torch import Tensor, nn

from allears.audio.stft import Stft
from allears.models.separate.bands import BandMasks, BandSplit, split_bands
from allears.models.separate.config import SeparateConfig
from allears.models.separate.locoformer_blocks import MacaronLayer
from allears.models.separate.sepreformer import Separation
from allears.nn.attention import ChannelsLastConv
from allears.nn.norms import GlobalNorm
from allears.nn.slices import map_slices


class Locoformer(nn.Module):
    """Mixtures (B, S) of any length to J talkers each.

    With ``fla`` the layers along time have linear attention; those along frequency, whose length is fixed, keep softmax
    attention and rotary positions. The window is the square root of Hann's on both sides, whose inverse is exact.
    """

    def __init__(self, config: SeparateConfig) -> None:
        super().__init__()
        assert config.locoformer is not None
        size = config.locoformer
        self.talkers, self.sliced = config.talkers, config.attention != "published"
        self.stft = Stft(size.n_fft, size.hop)
        self.bands = size.bands
        self.enter = BandSplit(size) if size.bands else ChannelsLastConv(2, size.channels, kernel_size=3, padding=1)
        self.norm = GlobalNorm(size.channels, eps=1e-5)
        self.layers = nn.ModuleList(
            [MacaronLayer(config, linear) for _ in range(size.blocks) for linear in (False, config.attention == "fla")]
        )
        self.leave = (
            BandMasks(size, config.talkers)
            if size.bands
            else nn.ConvTranspose2d(size.channels, 2 * config.talkers, kernel_size=3, padding=1)
        )

    def forward(self, mixture: Tensor) -> Separation:
        """Mixtures (B, S) of about unit level."""
        spectrum = torch.view_as_real(self.stft.forward(mixture)).transpose(1, 2)
        y, x = self.spectra(spectrum)
        out = self.stft.inverse(torch.view_as_complex(y).transpose(-1, -2), mixture.shape[1])
        energy = y.square().sum(-1)  # (B, J, T, K)
        if self.bands:
            parts = split_bands(energy.flatten(0, 1), self.bands)
            energy = torch.cat([part.sum(3) for part in parts], dim=2).unflatten(0, (-1, self.talkers))
        return Separation(out, [], x.flatten(1, 2).unsqueeze(1), energy.flatten(2))

    def spectra(self, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture's spectrum (B, T, K, 2), real and imaginary part, to those of the talkers (B, J, T, K, 2) and the
        features (B, T, K, D), or with bands (B, T, N, D), that they come from."""
        x = self.enter(spectrum)
        x = self.norm(x.flatten(1, 2)).view(x.shape)
        for along_frequency, along_time in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = self._along(along_frequency, x)
            x = self._along(along_time, x.transpose(1, 2)).transpose(1, 2)
        return self._leave(x, spectrum), x

    def _leave(self, x: Tensor, spectrum: Tensor) -> Tensor:
        """The talkers' spectra (B, J, T, K, 2)."""
        if self.bands:
            return self.leave(x, spectrum)
        y = self.leave(x.permute(0, 3, 1, 2)).float().unflatten(1, (self.talkers, 2))  # (B, J, 2, T, K)
        return y.permute(0, 1, 3, 4, 2).contiguous()

    def _along(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``layer`` along the third axis of x (B, A, L, D): all sequences at once as published, else some at a time
        where no gradient is wanted."""
        assert isinstance(layer, MacaronLayer)
        rows = x.flatten(0, 1)
        y = map_slices(layer, rows, layer.width, dim=0, times=4) if self.sliced else layer(rows)
        return y.view(x.shape)
