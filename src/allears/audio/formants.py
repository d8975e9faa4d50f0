"""Formants moved without the pitch: the same sentence, at the same pitch, from a longer or a shorter throat.

A short-time spectrum is a fine structure (the harmonics of the pitch) times an envelope (the resonances of the mouth).
The envelope is that of linear prediction (Makhoul, "Linear prediction: a tutorial review", Proc. IEEE 63, 1975), which
follows narrow formants at any pitch; cepstral smoothing that is coarse enough for high voices leaves the formants of
low ones where they are. Each frame is multiplied by the envelope read at other frequencies over the envelope itself, so
phases, harmonics and silences stay.

Shapes: R rows, T samples, N frames, F bins of the transform, G = 2 F - 1 points of an envelope, P coefficients.
"""

import math

import torch
from torch import Tensor

from allears.audio.stft import Stft

WINDOW_S = 0.032
LIMIT_DB = 20.0
"""Most by which a frequency is raised or lowered."""

_FLOOR_DB = 60.0  # under the loudest bin of a frame: bins below count as that loud
_SILENCE = 1e-10  # power of a bin, so that silence has an envelope too: a flat one
_PRE_EMPHASIS = 0.97  # brings high formants to the level of the low ones
_LAG_HZ = 50.0  # least width of a resonance, else it would be a harmonic
_WHITE = 3e-4  # share of white noise; keeps single precision far from singular
_KNEE = 0.8  # above this share of the band the shift fades, to nothing at its top


def shift_formants(
    x: Tensor, ratio: Tensor | float, sample_rate_hz: int = 16_000, top_hz: Tensor | float | None = None
) -> Tensor:
    """Voices x (R, T) or (T,) with resonances at ``ratio`` times their frequency; pitch, timing and RMS as before.

    Rows do not touch each other, and the number of operations depends on neither R nor T. Silent rows stay zero, and a
    ratio of 1 gives the row back, but for rounding. Computed in float32, under autocast too.

    Args:
        ratio: for all rows or (R,), above 0. Women's formants lie some 15 to 20 % above men's.
        sample_rate_hz: 4000 or more.
        top_hz: for all rows or (R,): where the recording ends; by default half the rate. The shift fades towards it,
            so that the recording keeps its bandwidth; above, nothing is changed.

    Raises:
        ValueError: ``x`` is no floating-point (R, T) or (T,) with a sample, ``ratio`` or ``top_hz`` is a number at or
            below 0 or of another shape, or the rate is too low.
    """
    if x.ndim not in (1, 2) or not x.is_floating_point() or not x.shape[-1]:
        raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, wanted floating point (R, T) or (T,), T of 1 or more")
    if sample_rate_hz < 4000:
        raise ValueError(f"sample_rate_hz: got {sample_rate_hz}, wanted 4000 or more; below, speech has no formants")
    rows = x.float().reshape(-1, x.shape[-1])
    ratios = _per_row(ratio, "ratio", rows)
    tops = _per_row(sample_rate_hz / 2 if top_hz is None else top_hz, "top_hz", rows)
    hop = round(WINDOW_S * sample_rate_hz / 4)
    stft = Stft(4 * hop, hop)
    spectrum = stft.forward(rows)
    read_at = _warped(stft.bins, ratios, (2 * tops / sample_rate_hz).clamp_max(1.0))
    gain = _gain(_envelope(spectrum, stft.n_fft, max(8, round(sample_rate_hz / 1000))), read_at)
    shifted = stft.inverse(spectrum * gain.transpose(-1, -2), x.shape[-1])
    power, wanted = (y.square().mean(-1, keepdim=True) for y in (shifted, rows))
    return (shifted * (wanted / power.clamp_min(1e-30)).sqrt()).reshape(x.shape)


def _per_row(value: Tensor | float, name: str, rows: Tensor) -> Tensor:
    """(R, 1), float32. Numbers are checked; a tensor is not, as that would wait for its device."""
    if isinstance(value, Tensor):
        if value.shape not in ((), (len(rows),)):
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, wanted one number or one a row, ({len(rows)},)")
        return value.to(rows.device, torch.float32).expand(len(rows))[:, None]
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value}, wanted a number above 0")
    return torch.full((len(rows), 1), float(value), device=rows.device)


def _warped(bins: int, ratio: Tensor, top: Tensor) -> Tensor:
    """Where the envelope is read for each bin, (R, F), both as shares of half the rate; exactly the bin's own place
    for a ratio of 1, at the top and above it.
    """
    own = torch.linspace(0, 1, bins, device=ratio.device)
    share = own / top
    knee = _KNEE * ratio.clamp_max(1.0)
    faded = torch.minimum(share, knee * (1 - share) / (1 - knee)).clamp_min(0)
    return own + top * (1 / ratio - 1) * faded


def _envelope(spectrum: Tensor, n_fft: int, order: int) -> Tensor:
    """Log magnitude (R, N, G), but for a constant a frame, of the all-pole filter that fits spectrum (R, F, N)."""
    power = _power(spectrum.transpose(-1, -2))
    power = power.maximum(power.amax(-1, keepdim=True) * 10 ** (-_FLOOR_DB / 10)) + _SILENCE
    bins = power.shape[-1]
    correlation = torch.fft.irfft(power * _emphasis(bins, power), n=n_fft)[..., : order + 1]
    lag = torch.arange(order + 1, device=power.device) / (n_fft / WINDOW_S)
    taper = torch.exp(-0.5 * (2 * math.pi * _LAG_HZ * lag).square())
    taper[0] += _WHITE
    inverse = _power(torch.fft.rfft(predictor(correlation * taper), n=2 * n_fft))
    return -0.5 * torch.log(inverse * _emphasis(2 * bins - 1, power))


def _power(spectrum: Tensor) -> Tensor:
    return spectrum.real.square().addcmul(spectrum.imag, spectrum.imag)


def _emphasis(points: int, like: Tensor) -> Tensor:
    """Power (points,) of the filter 1 - c / z from 0 to half the rate."""
    angle = torch.linspace(0, math.pi, points, device=like.device)
    return 1 + _PRE_EMPHASIS**2 - 2 * _PRE_EMPHASIS * torch.cos(angle)


def predictor(correlation: Tensor) -> Tensor:
    """Prediction-error filter (..., P), its first tap 1, of the autocorrelation (..., P), by Schur's recursion.

    A lattice of P - 1 stages, each with the reflection that takes out what is left at its lag. An impulse goes through
    it along with the correlation, and what comes out of it is the filter: half as many operations as Levinson's
    recursion has, for tensors so small that their number is what costs.
    """
    order = correlation.shape[-1] - 1
    silence = torch.zeros_like(correlation[..., 1:])
    forward = backward = torch.cat([silence, torch.ones_like(correlation[..., :1]), silence, correlation], -1)
    lag = 2 * order + 1
    for _ in range(order):
        ahead, behind = forward[..., 1:], backward[..., :-1]  # the one of a stage's two branches that has a delay
        reflection = ahead[..., lag : lag + 1] / behind[..., lag : lag + 1]
        forward = torch.addcmul(ahead, reflection, behind, value=-1)
        backward = torch.addcmul(behind, reflection, ahead, value=-1)
    return forward[..., : order + 1]


def _gain(envelope: Tensor, read_at: Tensor) -> Tensor:
    """Gain (R, N, F) from the log envelope (R, N, G) at the bins to that at ``read_at`` (R, F), linear in between."""
    last = envelope.shape[-1] - 1
    position = read_at.clamp(0, 1) * last
    below = position.floor().clamp_max(last - 1)
    index = below.long()[:, None].expand(-1, envelope.shape[1], -1)
    low, high = envelope.gather(-1, index), envelope.gather(-1, index + 1)
    change = torch.lerp(low, high, (position - below)[:, None]) - envelope[..., ::2]
    most = LIMIT_DB * math.log(10) / 20
    return change.clamp(-most, most).exp()
