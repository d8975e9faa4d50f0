"""What all renderers of clips share: segments laid in their places, made noise, filters, levels.

Shapes: B clips, T samples, S segments, N segment samples.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.data.bank import AudioBank
from allears.data.draws import RATE
from allears.data.segments import Segment, Synthetic

_TAPS = 16
_FADE = 80
_GROUP = 48
MARGIN = 1024
"""Samples of silence into which filters without delay ring."""

OCTAVES_HZ = (125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0)


def on_device(device: torch.device, values: Any, kind: Any = np.float32) -> Tensor:
    """A small host array on ``device`` without waiting for the work that is queued there."""
    tensor = torch.from_numpy(np.asarray(values, dtype=kind))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def flat_audio(speech: AudioBank, noise: AudioBank, device: torch.device) -> tuple[Tensor, Tensor]:
    """The samples of both banks on ``device``, once where they share them."""
    flat = torch.from_numpy(speech.audio).to(device)
    return flat, flat if noise.audio is speech.audio else torch.from_numpy(noise.audio).to(device)


def active_rms(x: Tensor, frame: int = 320, range_db: float = 35.0) -> Tensor:
    """RMS (B, 1) of x (B, T) over its 20 ms frames within ``range_db`` of the loudest; 0 for silence."""
    energy = x[:, : x.shape[1] // frame * frame].unflatten(1, (-1, frame)).square().mean(-1)
    active = energy >= energy.amax(-1, keepdim=True) * 10 ** (-range_db / 10)
    return ((energy * active).sum(-1, keepdim=True) / active.sum(-1, keepdim=True).clamp_min(1)).sqrt()


def _resampled(flat: Tensor, first: Tensor, last: Tensor, begin: Tensor, speed: Tensor, count: int) -> Tensor:
    """Samples begin + n * speed, n < count, of each stretch flat[first:last]; Hann-windowed sinc of 16 taps. All
    (S,) to (S, count).
    """
    position = begin[:, None].to(torch.float64) + speed[:, None].to(torch.float64) * torch.arange(
        count, device=flat.device
    )
    return read_at(flat, first, last, position, speed) / 32768.0


def read_at(flat: Tensor, first: Tensor, last: Tensor, position: Tensor, speed: Tensor) -> Tensor:
    """``flat`` between its samples, at ``position`` (S, count), each row within flat[first:last], zero outside.

    Args:
        speed: (S,); above 1 the row is low-passed, so that it can be read so much faster.
    """
    base = position.floor()
    fraction = (position - base).to(torch.float32)
    base = base.to(torch.int64)
    cutoff = torch.where(speed > 1, 0.97 / speed, torch.ones_like(speed)).to(torch.float32)[:, None]
    total = torch.zeros_like(fraction)
    for tap in range(1 - _TAPS // 2, _TAPS // 2 + 1):
        index = base + tap
        inside = (index >= first[:, None]) & (index < last[:, None])
        distance = tap - fraction
        window = torch.cos(distance * (math.pi / (_TAPS + 1))).square()
        weight = cutoff * torch.sinc(cutoff * distance) * window
        total += torch.where(inside, flat[index.clamp(0, flat.shape[0] - 1)].to(torch.float32), 0.0) * weight
    return total


def lay_segments(
    placed: list[tuple[int, Segment]], bank: AudioBank, flat: Tensor, batch: int, frames: int, even_level: bool
) -> Tensor:
    """All segments in their places, (B, T); with ``even_level`` each is brought to RMS 1 before its gain."""
    out = torch.zeros(batch * frames, device=flat.device)
    placed = sorted(placed, key=lambda pair: pair[1].length)
    # Small groups waste no time on padding, which on a CPU costs; but how far a row is padded decides how a sum rounds.
    size = 2 if flat.device.type == "cpu" and not even_level else _GROUP
    for at in range(0, len(placed), size):
        group = placed[at : at + size]
        index = [bank.index_of(segment.item) for _, segment in group]
        table = np.array(
            [
                (
                    bank.starts[i],
                    bank.starts[i] + bank.lengths[i],
                    bank.starts[i] + segment.start,
                    segment.length,
                    row * frames + segment.at,
                )
                for i, (row, segment) in zip(index, group, strict=True)
            ],
            dtype=np.int64,
        )
        first, last, begin, length, target = on_device(flat.device, table, np.int64).unbind(1)
        speed = on_device(flat.device, [segment.speed for _, segment in group])
        gain = on_device(flat.device, [10 ** (segment.gain_db / 20) for _, segment in group])
        count = max(segment.length for _, segment in group)
        n = torch.arange(count, device=flat.device)
        inside = n < length[:, None]
        values = _resampled(flat, first, last, begin, speed, count) * inside
        ramp = torch.minimum(n + 1, length[:, None] - n).clamp(0, _FADE).to(torch.float32) / _FADE
        values = values * ramp
        if even_level:
            power = values.square().sum(-1, keepdim=True) / length[:, None]
            values = values / power.sqrt().clamp_min(1e-5)
        values = values * gain[:, None]
        where = target[:, None] + n
        out.index_add_(
            0, where.clamp_max(batch * frames - 1).flatten(), values.flatten()
        )  # zeros beyond a segment's end
    return out.view(batch, frames)


def made_noise(specs: list[Synthetic | None], frames: int, device: torch.device) -> Tensor:
    """(B, T); RMS 1 before its gain. Drawn on the CPU, so that a seed gives the same noise on any device."""
    out = torch.zeros(len(specs), frames, device=device)
    frequency = torch.fft.rfftfreq(frames, 1 / RATE, device=device).clamp_min(20.0)
    for row, spec in enumerate(specs):
        if spec is None:
            continue
        generator = torch.Generator().manual_seed(spec.seed)
        white = on_device(device, torch.randn(frames, generator=generator).numpy())
        shaped = torch.fft.irfft(torch.fft.rfft(white) * (frequency / 1000.0).pow(spec.slope_db / 6.02), n=frames)
        shaped = shaped / shaped.square().mean().sqrt().clamp_min(1e-8)
        if spec.hum_hz > 0:
            time = torch.arange(frames, dtype=torch.float64, device=device) / RATE
            phases = torch.rand(8, generator=generator) * 6.2831853
            hum = torch.zeros_like(time)
            for k in range(8):
                hum += torch.sin(6.283185307179586 * spec.hum_hz * (k + 1) * time + phases[k]) / (k + 1)
            shaped = 0.5 * shaped + hum.to(torch.float32)
        out[row] = shaped / shaped.square().mean().sqrt().clamp_min(1e-8) * 10 ** (spec.gain_db / 20)
    return out


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
