"""Short-time Fourier transform with exact reconstruction for any length.

Shapes: T samples, F = n_fft // 2 + 1 bins, N frames; "..." is any number of leading dimensions, also none.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

WINDOWS = ("sqrt_hann", "hann")

_windows: dict[tuple[str, int, torch.device], Tensor] = {}


def _make_window(name: str, n_fft: int, device: torch.device) -> Tensor:
    exact = torch.float32 if device.type == "mps" else torch.float64
    window = torch.hann_window(n_fft, periodic=True, dtype=exact, device=device)
    return (window.sqrt() if name == "sqrt_hann" else window).to(torch.float32)


def _window(name: str, n_fft: int, device: torch.device) -> Tensor:
    """The window (n_fft,) in float32, kept per device. A compiled graph makes its own and leaves the cache be."""
    if torch.compiler.is_compiling():
        return _make_window(name, n_fft, device)
    key = (name, n_fft, device)
    if key not in _windows:
        with torch.inference_mode(False), torch.no_grad():
            window = _make_window(name, n_fft, device)
        if type(window) is not Tensor:  # made under a tracing mode: of no use to a later call
            return window
        _windows[key] = window
    return _windows[key]


@dataclass(frozen=True)
class Stft:
    """The transform as a value. Frame ``n`` is centred at sample ``n * hop``; outside the signal there are zeros.

    Args:
        n_fft: window and transform length in samples; even.
        hop: samples between frames, 1 to ``n_fft // 2``.
        window: ``sqrt_hann`` or ``hann`` (both periodic); the same window serves analysis and synthesis.

    Everything is computed in float32, also under autocast. Synthesis is overlap-add divided by the sum of the squared
    windows: the least-squares inverse (Griffin and Lim, 1984, equation 6), exact for an unchanged spectrum.

    Raises:
        ValueError: ``n_fft``, ``hop`` or ``window`` is out of range.
    """

    n_fft: int
    hop: int
    window: str = "sqrt_hann"

    def __post_init__(self) -> None:
        if self.n_fft < 2 or self.n_fft % 2:
            raise ValueError(f"n_fft: got {self.n_fft}, wanted an even number from 2 up")
        if not 1 <= self.hop <= self.n_fft // 2:
            raise ValueError(f"hop: got {self.hop}, wanted 1 to n_fft // 2 = {self.n_fft // 2}, else samples are lost")
        if self.window not in WINDOWS:
            raise ValueError(f"window: got {self.window!r}, wanted one of {', '.join(WINDOWS)}")

    @property
    def bins(self) -> int:
        """F, the number of frequencies from 0 to half the sample rate, both included."""
        return self.n_fft // 2 + 1

    def frames(self, length: int) -> int:
        """N for a signal of ``length`` >= 1 samples: ceil(length / hop) + 1."""
        if length < 1:
            raise ValueError(f"length: got {length}, wanted 1 sample or more")
        return math.ceil(length / self.hop) + 1

    def window_on(self, device: torch.device) -> Tensor:
        """The window (n_fft,), float32, on ``device``."""
        return _window(self.window, self.n_fft, device)

    def forward(self, x: Tensor) -> Tensor:
        """Signal (..., T), real, to spectrum (..., F, N), complex64."""
        length = x.shape[-1]
        half = self.n_fft // 2
        right = (self.frames(length) - 1) * self.hop + half - length
        return self.transform_frames(functional.pad(x.to(torch.float32), (half, right)))

    def transform_frames(self, padded: Tensor) -> Tensor:
        """Every whole frame of ``padded`` (..., P), the first starting at its first sample: (..., F, N)."""
        windowed = padded.unfold(-1, self.n_fft, self.hop) * self.window_on(padded.device)
        return torch.fft.rfft(windowed).transpose(-1, -2)

    def inverse(self, X: Tensor, length: int) -> Tensor:
        """Spectrum (..., F, N) to signal (..., length), float32.

        Raises:
            ValueError: ``X`` has the wrong number of bins, or too few frames for ``length``.
        """
        if X.shape[-2] != self.bins:
            raise ValueError(f"X: got {X.shape[-2]} bins, wanted n_fft // 2 + 1 = {self.bins} in (..., F, N)")
        if X.shape[-1] < self.frames(length):
            raise ValueError(f"length: {length} samples need {self.frames(length)} frames, X has {X.shape[-1]}")
        total, weight = self.overlap_add(X)
        half = self.n_fft // 2
        return total[..., half : half + length] / weight[half : half + length]

    def overlap_add(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Windowed frames summed, (..., P), and the sum of squared windows, (P,); P = (N - 1) * hop + n_fft."""
        window = self.window_on(X.device)
        frames = torch.fft.irfft(X.to(torch.complex64).transpose(-1, -2), n=self.n_fft) * window
        count = X.shape[-1]
        squares = (window * window).expand(count, self.n_fft)
        return self._sum_shifted(frames), self._sum_shifted(squares)

    def _sum_shifted(self, frames: Tensor) -> Tensor:
        """Frames (..., N, n_fft) laid ``hop`` apart and added: (..., (N - 1) * hop + n_fft). The order is fixed."""
        count = frames.shape[-2]
        pieces = -(-self.n_fft // self.hop)
        blocks = functional.pad(frames, (0, pieces * self.hop - self.n_fft)).unflatten(-1, (pieces, self.hop))
        total = functional.pad(blocks[..., 0, :], (0, 0, 0, pieces - 1))
        for piece in range(1, pieces):
            total = total + functional.pad(blocks[..., piece, :], (0, 0, piece, pieces - 1 - piece))
        return total.flatten(-2)[..., : (count - 1) * self.hop + self.n_fft]
