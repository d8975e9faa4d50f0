"""Waveforms of any rate to the spectra that the network knows, and back: no conversion of the rate, so no delay by it.

A window of 20 ms has its bins 50 Hz apart at every rate. So the network's bins are the lowest of a higher rate's, and a
lower rate's are the lowest of the network's; scaled by the lengths of the windows they are, apart from what folds at
half of the lower rate, what the network would see of the same sound at its own rate.

Shapes: M microphones, T frames, F bins of the network; a hop is n samples at the stream's rate.
"""

from math import pi

import torch
from torch import Tensor

from allears.audio.session import HIGHEST_HZ, LOWEST_HZ
from allears.models.echo.config import EchoConfig


def whole_hop(rate_hz: int, config: EchoConfig) -> int | None:
    """n, the samples of a hop at that rate; ``None`` where it is not a whole number, or the rate none of a sound
    recording. With hops of 10 ms, every multiple of 100 Hz has one."""
    samples, rest = divmod(rate_hz * config.hop, config.sample_rate_hz)
    return round(samples) if not rest and LOWEST_HZ <= rate_hz <= HIGHEST_HZ else None


class OwnRate:
    """Both transforms of one stream, which carry the last hop of its signals and its unfinished output.

    Bins that the stream's rate does not have are zeros for the network, and left out of what it gives; bins that the
    network does not know are zeros in the output.

    Args:
        bins: F.
        hop: n, 1 or more; at the network's own rate F - 1.
        mics: M.
        device: of the tensors.
    """

    def __init__(self, bins: int, hop: int, mics: int, device: torch.device | str = "cpu") -> None:
        self.hop, self._bins, scale = hop, bins, (bins - 1) / hop
        window = (torch.arange(2 * hop, dtype=torch.float64) * (pi / (2 * hop))).sin()  # root of a periodic Hann window
        self._analysis, self._synthesis = ((w * window).float().to(device) for w in (scale, 1 / scale))
        self._signals = torch.zeros(mics, 2, hop, device=device)
        self._tail = torch.zeros(mics, hop, device=device)

    def analyse(self, mic: Tensor, reference: Tensor) -> Tensor:
        """T hops of both, (M, T n), to spectra (M, 2, 2, T, F): microphone and reference, real and imaginary parts.

        The newest half of a frame is the hop that came with it.
        """
        signals = torch.cat([self._signals, torch.stack([mic, reference], dim=1)], dim=2)
        self._signals = signals[:, :, -self.hop :]
        spectra = torch.fft.rfft(signals.unfold(-1, 2 * self.hop, self.hop) * self._analysis)[..., : self._bins]
        if (missing := self._bins - spectra.shape[-1]) > 0:
            spectra = torch.nn.functional.pad(spectra, (0, missing))
        return torch.view_as_real(spectra).movedim(-1, 2)

    def synthesise(self, spectrum: Tensor) -> Tensor:
        """Spectrum (M, 2, T, F) of frames that were analysed to T hops, (M, T n), those of a hop before."""
        bins = min(self._bins, self.hop + 1)
        known = torch.complex(spectrum[:, 0, :, :bins], spectrum[:, 1, :, :bins])
        frames = torch.fft.irfft(known, n=2 * self.hop) * self._synthesis  # fills up with zeros
        early, late = frames.chunk(2, dim=-1)
        near = early + torch.cat([self._tail[:, None], late[:, :-1]], dim=1)
        self._tail = late[:, -1]
        return near.flatten(1)
