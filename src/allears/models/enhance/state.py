"""Between waveforms and the state of the flow: the compressed complex spectrum.

Shapes: B batch, S samples, T frames, F bins.
"""

import torch
from torch import Tensor

from allears.audio.stft import Stft
from allears.models.enhance.config import EnhanceConfig

_FLOOR = 1e-5


def stft_of(config: EnhanceConfig) -> Stft:
    return Stft(config.n_fft, config.hop, "sqrt_hann")


def level_of(x: Tensor) -> Tensor:
    """Root mean square of x (B, S), shape (B, 1), never below 1e-4: by it the input is brought to level 1."""
    return x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-4)


def compress(spectrum: Tensor, config: EnhanceConfig) -> Tensor:
    """Complex (B, F, T) to the state (B, T, F, 2): gain * |X|^power with the phase kept."""
    parts = torch.view_as_real(spectrum.transpose(-1, -2).contiguous())
    magnitude = (parts.square().sum(-1, keepdim=True) + _FLOOR**2).sqrt()
    return parts * magnitude.pow(config.power - 1) * config.gain


def expand(state: Tensor, config: EnhanceConfig) -> Tensor:
    """The inverse of :func:`compress` (up to its floor)."""
    parts = state.to(torch.float32) / config.gain
    magnitude = (parts.square().sum(-1, keepdim=True) + 1e-12).sqrt()
    return torch.view_as_complex((parts * magnitude.pow(1 / config.power - 1)).contiguous()).transpose(-1, -2)


def to_state(x: Tensor, config: EnhanceConfig) -> Tensor:
    """Waveform (B, S) to state (B, T, F, 2)."""
    return compress(stft_of(config).forward(x), config)


def to_waveform(state: Tensor, length: int, config: EnhanceConfig) -> Tensor:
    """State (B, T, F, 2) to waveform (B, length)."""
    return stft_of(config).inverse(expand(state, config), length)
