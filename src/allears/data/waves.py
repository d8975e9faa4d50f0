"""What all renderers of clips share: segments laid in their places, made noise, filters, levels.

Shapes: B clips, T samples, S segments, N segment samples.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from allears.core.host_arrays import on_device as on_device
from allears.data.bank import AudioBank
from allears.data.draws import RATE
from allears.data.segments import Segment, Synthetic
from allears.ops.resample import Stretches, lay
from allears.ops.resample import read_at as read_at

_HARMONICS = 8
MARGIN = 1024
"""Samples of silence into which filters without delay ring."""

OCTAVES_HZ = (125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0)


def flat_audio(speech: AudioBank, noise: AudioBank, device: torch.device) -> tuple[Tensor, Tensor]:
    """The samples of both banks on ``device``, once where they share them."""
    flat = torch.from_numpy(speech.audio).to(device)
    return flat, flat if noise.audio is speech.audio else torch.from_numpy(noise.audio).to(device)


def active_rms(x: Tensor, frame: int = 320, range_db: float = 35.0) -> Tensor:
    """RMS (B, 1) of x (B, T) over its 20 ms frames within ``range_db`` of the loudest; 0 for silence."""
    energy = x[:, : x.shape[1] // frame * frame].unflatten(1, (-1, frame)).square().mean(-1)
    active = energy >= energy.amax(-1, keepdim=True) * 10 ** (-range_db / 10)
    return ((energy * active).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp_min(1)).sqrt()


def lay_segments(
    placed: list[tuple[int, Segment]], bank: AudioBank, flat: Tensor, batch: int, frames: int, even_level: bool
) -> Tensor:
    """All segments in their places, (B, T); with ``even_level`` each is brought to RMS 1 before its gain."""
    entries = []
    for row, segment in sorted(placed, key=lambda pair: pair[1].length):
        index = bank.index_of(segment.item)
        first, length = int(bank.starts[index]), int(bank.lengths[index])
        where = (first, first + length, first + segment.start, segment.length, row, segment.at)
        entries.append((*where, segment.speed, 10 ** (segment.gain_db / 20)))
    return lay(flat, Stretches.of(entries), batch, frames, even_level)


def made_noise(specs: list[Synthetic | None], frames: int, device: torch.device) -> Tensor:
    """(B, T); RMS 1 before its gain. Drawn on the CPU, so that a seed gives the same noise on any device."""
    out = torch.zeros(len(specs), frames, device=device)
    made = [(row, spec) for row, spec in enumerate(specs) if spec is not None]
    # All at once launches few kernels; but on a CPU transforms of several rows round unlike those of one.
    size = 1 if device.type == "cpu" else max(1, len(made))
    for at in range(0, len(made), size):
        rows, group = zip(*made[at : at + size], strict=True)
        out.index_copy_(0, on_device(device, rows, np.int64), _noises(list(group), frames, device))
    return out


def _noises(specs: list[Synthetic], frames: int, device: torch.device) -> Tensor:
    """(R, T), one noise a row, at their gains."""
    white, hums, phases = [], [], []
    for place, spec in enumerate(specs):
        generator = torch.Generator().manual_seed(spec.seed)
        white.append(torch.randn(frames, generator=generator).numpy())
        if spec.hum_hz > 0:
            hums.append((place, [6.283185307179586 * spec.hum_hz * (k + 1) for k in range(_HARMONICS)]))
            phases.append((torch.rand(_HARMONICS, generator=generator) * 6.2831853).numpy())
    frequency = torch.fft.rfftfreq(frames, 1 / RATE, device=device).clamp_min(20.0)
    slopes = [[spec.slope_db / 6.02] for spec in specs]
    # A power to a number rounds unlike one to a tensor, and rendered sets are to stay what they are.
    tilt = (frequency / 1000.0).pow(slopes[0][0] if len(slopes) == 1 else on_device(device, slopes))
    shaped = _of_level(torch.fft.irfft(torch.fft.rfft(on_device(device, np.stack(white))) * tilt, n=frames))
    if hums:
        places = on_device(device, [place for place, _ in hums], np.int64)
        speeds = on_device(device, [speed for _, speed in hums], np.float64)
        hum = _hum(speeds, on_device(device, phases, np.float64), frames)
        shaped = shaped.index_copy(0, places, 0.5 * shaped[places] + hum)
    return _of_level(shaped) * on_device(device, [[10 ** (spec.gain_db / 20)] for spec in specs])


def _of_level(x: Tensor) -> Tensor:
    """x (R, T) brought to RMS 1."""
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-8)


def _hum(speed: Tensor, phase: Tensor, frames: int) -> Tensor:
    """Harmonics that fall as one over their number, out of their speeds in radians a second and their phases, (R, 8)
    both, float64: (R, T), float32."""
    time = torch.arange(frames, dtype=torch.float64, device=speed.device) / RATE
    number = torch.arange(1, _HARMONICS + 1, device=speed.device)[:, None]
    harmonics = torch.sin(speed[..., None] * time + phase[..., None]) / number
    return sum(harmonics.unbind(1), torch.zeros_like(time)).to(torch.float32)


def band_filter(
    gains: Sequence[tuple[float, ...] | None], lowpass: Sequence[float | None], size: int, device: torch.device
) -> Tensor:
    """Zero-phase filter (B, size / 2 + 1): octave gains joined in log frequency, and a steep low-pass."""
    frequency = torch.fft.rfftfreq(size, 1 / RATE, device=device)
    place = torch.log2(frequency.clamp(OCTAVES_HZ[0], OCTAVES_HZ[-1]) / OCTAVES_HZ[0])
    hats = (1 - (place - torch.arange(len(OCTAVES_HZ), device=device)[:, None]).abs()).clamp_min(0)
    flat = (0.0,) * len(OCTAVES_HZ)
    decibels = on_device(device, [gain or flat for gain in gains]) @ hats
    cut = on_device(device, [hertz or 1e9 for hertz in lowpass])[:, None]
    return 10 ** (decibels / 20) / (1 + (frequency / cut) ** 32).sqrt()


def filtered(
    x: Tensor,
    octave_gains: Sequence[tuple[float, ...] | None],
    lowpass_hz: Sequence[float | None],
    rooms: Sequence[Tensor | None],
) -> list[Tensor]:
    """x (R, T) filtered, and then heard in each of ``rooms`` (R, L), ``None`` for none; untouched if nothing is asked.

    The filter has no delay and rings on both sides, for which there is a margin.
    """
    flat = not any(octave_gains) and not any(lowpass_hz)
    if flat and all(room is None for room in rooms):
        return [x for _ in rooms]
    frames = x.shape[-1]
    longest = max(0 if room is None else room.shape[-1] for room in rooms)
    size = 1 << (frames + longest + MARGIN - 1).bit_length()
    spectrum = torch.fft.rfft(x, n=size)
    if not flat:
        spectrum = spectrum * band_filter(octave_gains, lowpass_hz, size, x.device)
    spectra = [spectrum if room is None else spectrum * torch.fft.rfft(room, n=size) for room in rooms]
    return [torch.fft.irfft(product, n=size)[:, :frames] for product in spectra]


def at_snr(heard: Tensor, noise: Tensor, snr_db: list[float | None]) -> Tensor:
    """``noise`` (B, T) as loud as ``snr_db`` says below the active level of ``heard`` (B, T); ``None`` is no noise."""
    snr = on_device(heard.device, [math.inf if ratio is None else ratio for ratio in snr_db])[:, None]
    voice_level, noise_level = active_rms(heard), noise.square().mean(-1, keepdim=True).sqrt()
    wanted = torch.where(voice_level > 1e-6, voice_level, torch.full_like(voice_level, 0.05)) * 10 ** (-snr / 20)
    return noise * wanted / noise_level.clamp_min(1e-8)


def level_gain(level_db: list[float], noisy: Tensor, peak: Tensor) -> Tensor:
    """Gain (B, 1) that brings ``noisy`` (B, T) to its RMS level, less where ``peak`` (B, 1) would pass 0.98."""
    level = on_device(noisy.device, level_db)[:, None]
    gain = 10 ** (level / 20) / noisy.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    return torch.minimum(gain, 0.98 / peak.clamp_min(1e-6))
