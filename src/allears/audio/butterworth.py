"""Second-order Butterworth filters by their frequency response: causal, and a batch with corners of its own at once.

Shapes: (...) filters, T samples, F bins of a transform.
"""

import math

import torch
from torch import Tensor

WIDEST = 0.49
"""Share of the sample rate from which on a low-pass is none."""


def butterworth_response(corner_hz: Tensor, size: int, sample_rate_hz: int, highpass: bool) -> Tensor:
    """Response (..., F) at the bins of a real transform of ``size`` samples, by the bilinear transform; complex128.

    Args:
        corner_hz: (...), where the response is 3 dB down; above 0 and below half the sample rate.
    """
    corner = torch.tan(math.pi / sample_rate_hz * corner_hz.double())[..., None]
    angle = torch.arange(size // 2 + 1, dtype=torch.float64, device=corner_hz.device) * (-2 * math.pi / size)
    z = torch.polar(torch.ones_like(angle), angle)
    up, down = (1 - z), corner * (1 + z)
    passed = up if highpass else down
    return passed * passed / (up * up + math.sqrt(2) * up * down + down * down)


def butterworth(
    x: Tensor,
    sample_rate_hz: int,
    highpass_hz: Tensor | None = None,
    lowpass_hz: Tensor | None = None,
    lowest_hz: float = 20.0,
) -> Tensor:
    """x (..., T) through a high-pass, a low-pass, or both, each with corners (...); float32.

    Args:
        highpass_hz, lowpass_hz: on the device of ``x``, or on one that has float64. A low-pass at :data:`WIDEST` of
            the sample rate or above, infinity too, lets all pass.
        lowest_hz: no corner is lower; what rings longer wraps round to the first samples.
    """
    size = 1 << (x.shape[-1] + round(4 * sample_rate_hz / lowest_hz)).bit_length()  # the wrapped tail is below -100 dB
    spectrum = torch.fft.rfft(x, n=size)
    if highpass_hz is not None:
        spectrum = spectrum * butterworth_response(highpass_hz, size, sample_rate_hz, True).to(
            x.device, torch.complex64
        )
    if lowpass_hz is not None:
        widest = WIDEST * sample_rate_hz
        response = butterworth_response(lowpass_hz.clamp(max=widest), size, sample_rate_hz, False)
        response = torch.where((lowpass_hz < widest)[..., None], response, 1.0)
        spectrum = spectrum * response.to(x.device, torch.complex64)
    return torch.fft.irfft(spectrum, n=size)[..., : x.shape[-1]]
