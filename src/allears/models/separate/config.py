"""Configuration of the separators, and the published sizes.

Sources: SepReformer (Shin et al., NeurIPS 2024), TF-Locoformer (Saijo et al., IWAENC 2024), FLASepformer (Wang et al.,
Interspeech 2025).
"""

from dataclasses import dataclass, replace
from typing import Literal

Attention = Literal["published", "optimised", "fla"]


@dataclass(frozen=True)
class SepReformerSize:
    """The U-Net in time of SepReformer.

    Args:
        channels: F, channels of the separator.
        stages: R, how often the time axis is halved.
        kernel, stride: L and S of the learned encoder and decoder, in samples.
        features: N, channels of the encoder.
        heads: of all attentions; divides ``channels``.
        dropout: in training.
        max_distance: the relative positions of the published attention are clamped to this.
        masked: the output is a mask of the encoder's features, as that of the auxiliary heads is; else, as published,
            features made anew. With a long stride F channels do not hold the waveform, and a mask need not.
        layer_scale: weight at the start of what each block adds. The published 1e-5 takes some hundred steps to open.
    """

    channels: int = 64
    stages: int = 4
    kernel: int = 16
    stride: int = 4
    features: int = 256
    heads: int = 8
    dropout: float = 0.05
    max_distance: int = 2000
    masked: bool = False
    layer_scale: float = 1e-5

    def __post_init__(self) -> None:
        if self.channels % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide channels {self.channels}")
        if self.kernel % self.stride:
            raise ValueError(f"stride: {self.stride} does not divide kernel {self.kernel}")


@dataclass(frozen=True)
class LocoformerSize:
    """The dual-path network over time and frequency of TF-Locoformer.

    Args:
        channels: D of each time-frequency bin.
        blocks: B, each a frequency layer and then a time layer.
        hidden: C of the convolutional feed-forward networks.
        kernel: of their convolutions, in bins or frames.
        heads: of the attention; divides ``channels`` into an even size.
        groups: of the RMS group norm; divides ``channels``.
        n_fft, hop: the STFT, in samples.
        bands: pairs (number of bands, bins of each) from 0 Hz up, which take all n_fft / 2 + 1 bins: the layers work on
            bands in place of bins, and the output is a mask. Empty: bins, and spectra made anew, as published.
        compression: with bands, magnitudes enter to this power.
    """

    channels: int = 128
    blocks: int = 6
    hidden: int = 384
    kernel: int = 4
    heads: int = 4
    groups: int = 4
    n_fft: int = 128
    hop: int = 64
    bands: tuple[tuple[int, int], ...] = ()
    compression: float = 0.4

    def __post_init__(self) -> None:
        if self.channels % self.heads or (self.channels // self.heads) % 2:
            raise ValueError(f"heads: {self.heads} must divide {self.channels} channels into heads of even size")
        if self.channels % self.groups:
            raise ValueError(f"groups: {self.groups} does not divide channels {self.channels}")
        if self.bands and (taken := sum(count * width for count, width in self.bands)) != self.n_fft // 2 + 1:
            raise ValueError(f"bands: {self.bands} take {taken} bins; n_fft {self.n_fft} has {self.n_fft // 2 + 1}")


@dataclass(frozen=True)
class SeparateConfig:
    """What defines a trained separator. Exactly one family is given.

    Args:
        sepreformer, locoformer: the family and its size.
        attention: ``published`` is the baseline as its authors released it (SepReformer: with the tensor of relative
            positions in memory); ``optimised`` computes the same with fused attention and without that tensor; ``fla``
            is gated focused linear attention, whose time and memory grow with the length.
        sample_rate_hz: rate of the network; pipelines resample around it.
        talkers: J, number of outputs.
        silent_outputs: trained so that an output without a talker is silent: 1 to J talkers are taken.
        power: of the focused map; 1 is "no focus" (``fla`` only).
        conv_taps: of the convolution of the values; 0 leaves it out (``fla`` only).
        gated: multiply the attention by a gate; else a plain residual (``fla`` only).
    """

    sepreformer: SepReformerSize | None = None
    locoformer: LocoformerSize | None = None
    attention: Attention = "fla"
    sample_rate_hz: int = 8_000
    talkers: int = 2
    silent_outputs: bool = False
    power: int = 3
    conv_taps: int = 5
    gated: bool = True

    def __post_init__(self) -> None:
        if (self.sepreformer is None) == (self.locoformer is None):
            raise ValueError("SeparateConfig: give exactly one of sepreformer and locoformer")
        if self.attention not in ("published", "optimised", "fla"):
            raise ValueError(f"attention: {self.attention!r} given; it must be 'published', 'optimised' or 'fla'")
        if self.talkers < 1:
            raise ValueError(f"talkers: {self.talkers} given; at least 1 is wanted")
        if self.attention != "fla" and (self.power, self.conv_taps, self.gated) != (3, 5, True):
            raise ValueError("power, conv_taps, gated: these are choices of attention='fla'; leave them out")


_SIZES: dict[str, SepReformerSize | LocoformerSize] = {
    "sepreformer-t": SepReformerSize(64, 4),
    "sepreformer-b": SepReformerSize(128, 4),
    "sepreformer-l": SepReformerSize(256, 4, dropout=0.1),
    "locoformer-s": LocoformerSize(96, 4, hidden=128, kernel=8),
    "locoformer-m": LocoformerSize(128, 6, hidden=384, kernel=4),
}


def _config(size: SepReformerSize | LocoformerSize, attention: Attention) -> SeparateConfig:
    if isinstance(size, SepReformerSize):
        return SeparateConfig(sepreformer=size, attention=attention)
    return SeparateConfig(locoformer=size, attention=attention)


_BANDS = ((33, 1), (24, 2), (16, 4), (14, 8))  # of 31.25 Hz: to 1, 2.5, 4.5 and 8 kHz
_FLA_T = _config(_SIZES["sepreformer-t"], "fla")
PRESETS: dict[str, SeparateConfig] = {
    **{name: _config(size, "published") for name, size in _SIZES.items()},
    **{f"{name}-optimised": _config(size, "optimised") for name, size in _SIZES.items()},
    **{f"fla-{name}": _config(size, "fla") for name, size in _SIZES.items()},
    "fla-sepreformer-t-no-focus": replace(_FLA_T, power=1),
    "fla-sepreformer-t-no-conv": replace(_FLA_T, conv_taps=0),
    "fla-sepreformer-t-no-gate": replace(_FLA_T, gated=False),
    "talkers-16k": SeparateConfig(
        locoformer=LocoformerSize(64, 4, hidden=128, kernel=4, n_fft=512, hop=256, bands=_BANDS),
        sample_rate_hz=16_000,
        talkers=3,
        silent_outputs=True,
    ),
    "sepreformer-16k": replace(
        _FLA_T,
        sepreformer=SepReformerSize(64, 4, kernel=128, stride=32, dropout=0.0, masked=True, layer_scale=0.1),
        sample_rate_hz=16_000,
        talkers=3,
        silent_outputs=True,
    ),
    "test": replace(
        _FLA_T, sepreformer=SepReformerSize(16, 2, features=32, heads=2, max_distance=50), sample_rate_hz=16_000
    ),
}
