"""The short-time Fourier transform in real numbers, as products with matrices: for graphs without complex ones (ONNX).

Shapes: T samples, K = n_fft // 2 + 1 bins, N frames, B batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.audio.stft import Stft


def analysis_matrix(stft: Stft) -> Tensor:
    """(n_fft, 2 K): a frame (n_fft,) times this is the spectrum of the windowed frame, real parts and then imaginary
    ones. In float32, rounded once."""
    spectrum = torch.fft.rfft(torch.eye(stft.n_fft, dtype=torch.float64))
    return (_window(stft)[:, None] * torch.cat([spectrum.real, spectrum.imag], dim=1)).float()


def synthesis_matrix(stft: Stft) -> Tensor:
    """(2 K, n_fft): real parts and then imaginary ones of a spectrum times this is its windowed frame. The imaginary
    parts of the first and the last bin count for nothing."""
    basis = torch.eye(stft.bins, dtype=torch.complex128)
    return (torch.fft.irfft(torch.cat([basis, 1j * basis]), n=stft.n_fft) * _window(stft)).float()


def _window(stft: Stft) -> Tensor:
    return stft.window_on(torch.device("cpu")).double()


class MatrixStft(nn.Module):
    """What ``stft`` computes, by convolutions whose kernels are the rows of a matrix: about n_fft^2 / hop products a
    sample, which is little beside a network, and traced without a size of the example staying in the graph.

    The matrices are buffers that a state dict does not have.
    """

    def __init__(self, stft: Stft) -> None:
        super().__init__()
        self.stft = stft
        parts = stft.bins, 2
        analysis = analysis_matrix(stft).T.unflatten(0, parts[::-1]).transpose(0, 1).flatten(0, 1)
        synthesis = synthesis_matrix(stft).unflatten(0, parts[::-1]).transpose(0, 1).flatten(0, 1)
        self.register_buffer("analysis", analysis.unsqueeze(1).contiguous(), persistent=False)  # (2 K, 1, n_fft)
        self.register_buffer("synthesis", synthesis.unsqueeze(1).contiguous(), persistent=False)
        self.register_buffer("squares", _window(stft).square().float()[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Signals (B, T), T at least 1, to spectra (B, N, K, 2): real and imaginary part."""
        half = self.stft.n_fft // 2
        padded = F.pad(x, (half, half + -x.shape[1] % self.stft.hop)).unsqueeze(1)
        return F.conv1d(padded, self.analysis, stride=self.stft.hop).transpose(1, 2).unflatten(2, (-1, 2))

    def inverse(self, spectra: Tensor, length: int) -> Tensor:
        """Spectra (B, N, K, 2) to signals (B, length), of which N frames are enough."""
        half, hop = self.stft.n_fft // 2, self.stft.hop
        rows = spectra.flatten(2).transpose(1, 2)  # (B, 2 K, N)
        total = F.conv_transpose1d(rows, self.synthesis, stride=hop)[:, 0]
        weight = F.conv_transpose1d(torch.ones_like(rows[:1, :1]), self.squares, stride=hop)[:, 0]
        return total[:, half : half + length] / weight[:, half : half + length]
