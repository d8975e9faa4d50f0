"""Rendering of mixtures: the same code for one clip on a CPU and for a training batch on a GPU.

Shapes: B clips, T samples, S segments, N segment samples, L room-response samples.
"""

import io
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.data.bank import AudioBank
from allears.data.mix import MixSpec, Segment, Synthetic, read_specs
from allears.data.reverb import RirBank

log = logging.getLogger(__name__)

RATE = 16_000
_TAPS = 16
_FADE = 80
_GROUP = 48
OCTAVES_HZ = (125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0)


def _on(device: torch.device, values: Any, kind: Any = np.float32) -> Tensor:
    """A small host array on ``device`` without waiting for the work that is queued there."""
    tensor = torch.from_numpy(np.asarray(values, dtype=kind))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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
    return total / 32768.0


def _lay(
    placed: list[tuple[int, Segment]], bank: AudioBank, flat: Tensor, batch: int, frames: int, even_level: bool
) -> Tensor:
    """All segments in their places, (B, T); with ``even_level`` each is brought to RMS 1 before its gain."""
    out = torch.zeros(batch * frames, device=flat.device)
    placed = sorted(placed, key=lambda pair: pair[1].length)
    for at in range(0, len(placed), _GROUP):
        group = placed[at : at + _GROUP]
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
        first, last, begin, length, target = _on(flat.device, table, np.int64).unbind(1)
        speed = _on(flat.device, [segment.speed for _, segment in group])
        gain = _on(flat.device, [10 ** (segment.gain_db / 20) for _, segment in group])
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


def _synthetic(specs: list[Synthetic | None], frames: int, device: torch.device) -> Tensor:
    """(B, T); RMS 1 before its gain. Drawn on the CPU, so that a seed gives the same noise on any device."""
    out = torch.zeros(len(specs), frames)
    frequency = torch.fft.rfftfreq(frames, 1 / RATE).clamp_min(20.0)
    for row, spec in enumerate(specs):
        if spec is None:
            continue
        generator = torch.Generator().manual_seed(spec.seed)
        white = torch.randn(frames, generator=generator)
        shaped = torch.fft.irfft(torch.fft.rfft(white) * (frequency / 1000.0).pow(spec.slope_db / 6.02), n=frames)
        shaped = shaped / shaped.square().mean().sqrt().clamp_min(1e-8)
        if spec.hum_hz > 0:
            time = torch.arange(frames, dtype=torch.float64) / RATE
            phases = torch.rand(8, generator=generator) * 6.2831853
            hum = sum(
                torch.sin(6.283185307179586 * spec.hum_hz * (k + 1) * time + phases[k]) / (k + 1) for k in range(8)
            )
            shaped = 0.5 * shaped + hum.to(torch.float32)  # type: ignore[union-attr]
        out[row] = shaped / shaped.square().mean().sqrt().clamp_min(1e-8) * 10 ** (spec.gain_db / 20)
    return _on(device, out.numpy())


def _curve(
    gains: list[tuple[float, ...] | None], lowpass: list[float | None], size: int, device: torch.device
) -> Tensor:
    """Zero-phase filter (B, size / 2 + 1): octave gains joined in log frequency, and a steep low-pass."""
    frequency = torch.fft.rfftfreq(size, 1 / RATE, device=device)
    place = torch.log2(frequency.clamp(OCTAVES_HZ[0], OCTAVES_HZ[-1]) / OCTAVES_HZ[0])
    hats = (1 - (place - torch.arange(len(OCTAVES_HZ), device=device)[:, None]).abs()).clamp_min(0)
    flat = (0.0,) * len(OCTAVES_HZ)
    decibels = _on(device, [gain or flat for gain in gains]) @ hats
    cut = _on(device, [hertz or 1e9 for hertz in lowpass])[:, None]
    return 10 ** (decibels / 20) / (1 + (frequency / cut) ** 32).sqrt()


def _through_codec(x: Tensor, codec: str) -> Tensor:
    """x (T,) after ``mulaw`` (8 bit), ``opus`` or ``mp3``; same length and alignment."""
    if codec == "mulaw":
        peak = x.abs().clamp(max=1.0)
        code = (torch.log1p(255 * peak) / math.log(256) * 127).round() / 127
        return x.sign() * (torch.exp(code * math.log(256)) - 1) / 255
    import soundfile

    kinds = {"opus": ("OGG", "OPUS", 0.95), "mp3": ("MP3", "MPEG_LAYER_III", 0.9)}
    if codec not in kinds:
        raise ValueError(f"codec: {codec!r} is unknown; known are mulaw, {', '.join(kinds)}")
    container, subtype, level = kinds[codec]
    buffer = io.BytesIO()
    soundfile.write(buffer, x.cpu().numpy(), RATE, format=container, subtype=subtype, compression_level=level)
    buffer.seek(0)
    decoded, _ = soundfile.read(buffer, dtype="float32")
    decoded = np.pad(decoded, (0, max(0, x.shape[0] - len(decoded))))[: x.shape[0]]
    return torch.from_numpy(decoded).to(x.device)


@dataclass
class Renderer:
    """Turns specs into waveforms on ``device``.

    Args:
        speech, noise: the banks that the specs speak of (they may be the same).
        rirs: room responses, needed where a spec has a room.
    """

    speech: AudioBank
    noise: AudioBank
    rirs: RirBank | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._flat_speech = torch.from_numpy(self.speech.audio).to(self.device)
        shared = self.noise.audio is self.speech.audio
        self._flat_noise = self._flat_speech if shared else torch.from_numpy(self.noise.audio).to(self.device)

    def _rooms(self, refs: list[dict[str, Any] | None], early: bool) -> tuple[Tensor, Tensor] | None:
        """(full, early) responses (B, L), a unit impulse where dry; ``None`` if all are dry."""
        if all(ref is None for ref in refs):
            return None
        if self.rirs is None:
            raise ValueError("rirs: a spec has a room, but the renderer was given no room responses")
        found = [None if ref is None else self.rirs.response(ref, "talker" if early else "noise") for ref in refs]
        length = max(pair[0].shape[0] for pair in found if pair is not None)
        stacks = torch.zeros(2, len(refs), length, device=self.device)
        stacks[:, :, 0] = 1.0
        for row, pair in enumerate(found):
            if pair is not None:
                stacks[:, row] = 0.0
                for kind in (0, 1):
                    stacks[kind, row, : pair[kind].shape[0]] = pair[kind].to(self.device)
        return stacks[0], stacks[1]

    @torch.no_grad()
    def __call__(self, specs: list[MixSpec]) -> tuple[Tensor, Tensor]:
        """``(noisy, target)``, each (B, T) float32. The target holds the direct sound and the first 50 ms of
        reflections.
        """
        frames = specs[0].frames
        if any(spec.frames != frames for spec in specs):
            raise ValueError("specs: clips of one batch must have the same length")
        batch, device = len(specs), self.device
        dry = _lay(
            [(row, s) for row, spec in enumerate(specs) for s in spec.speech],
            self.speech,
            self._flat_speech,
            batch,
            frames,
            False,
        )
        beds = [(row, s) for row, spec in enumerate(specs) for s in spec.noise]
        noise = _lay(beds, self.noise, self._flat_noise, batch, frames, True)
        noise = noise + _synthetic([spec.synthetic for spec in specs], frames, device)
        talker_rooms = self._rooms([spec.rir for spec in specs], early=True)
        noise_rooms = self._rooms([spec.noise_rir for spec in specs], early=False)
        longest = max([0] + [rooms[0].shape[1] for rooms in (talker_rooms, noise_rooms) if rooms is not None])
        size = 1 << (frames + longest - 1).bit_length()
        lowpass = [spec.lowpass_hz for spec in specs]
        voice = torch.fft.rfft(dry, n=size) * _curve([spec.eq_db for spec in specs], lowpass, size, device)
        noises = torch.fft.rfft(noise, n=size) * _curve([spec.noise_eq_db for spec in specs], lowpass, size, device)
        if talker_rooms is None:
            heard = target = torch.fft.irfft(voice, n=size)[:, :frames]
        else:
            heard, target = (
                torch.fft.irfft(voice * torch.fft.rfft(rir, n=size), n=size)[:, :frames] for rir in talker_rooms
            )
        if noise_rooms is not None:
            noises = noises * torch.fft.rfft(noise_rooms[0], n=size)
        noise = torch.fft.irfft(noises, n=size)[:, :frames]
        snr = _on(device, [spec.snr_db if spec.snr_db is not None else math.inf for spec in specs])[:, None]
        voice_level, noise_level = active_rms(heard), noise.square().mean(-1, keepdim=True).sqrt()
        wanted = torch.where(voice_level > 1e-6, voice_level, torch.full_like(voice_level, 0.05)) * 10 ** (-snr / 20)
        noisy = heard + noise * wanted / noise_level.clamp_min(1e-8)
        return self._finish(specs, noisy, target)

    def _finish(self, specs: list[MixSpec], noisy: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        level = _on(self.device, [spec.level_db for spec in specs])[:, None]
        gain = 10 ** (level / 20) / noisy.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        peak = torch.maximum(noisy.abs().amax(-1, keepdim=True), target.abs().amax(-1, keepdim=True))
        gain = torch.minimum(gain, 0.98 / peak.clamp_min(1e-6))
        noisy, target = noisy * gain, target * gain
        for row, spec in enumerate(specs):
            if spec.clip_db is not None:
                limit = noisy[row].abs().amax() * 10 ** (-spec.clip_db / 20)
                noisy[row] = torch.maximum(torch.minimum(noisy[row], limit), -limit)
            if spec.codec is not None:
                noisy[row] = _through_codec(noisy[row], spec.codec)
        return noisy, target


def render_test_set(
    corpus: str | Path,
    manifest: str | Path,
    keep: Callable[[MixSpec], bool] | None = None,
) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict[str, Any]]]:
    """Clips of a manifest, one by one: (id, noisy (T,), reference (T,), facts), float32 at 16 kHz, rounded to 16 bit.

    The rounding makes the samples the same on every machine (arithmetic differs in the last bits only).
    """
    specs = [spec for spec in read_specs(manifest) if keep is None or keep(spec)]
    wanted = {segment.item for spec in specs for segment in (*spec.speech, *spec.noise)}
    bank = AudioBank.from_corpus(corpus, ids=wanted)
    renderer = Renderer(bank, bank, RirBank.from_corpus(corpus))
    for spec in specs:
        noisy, target = (np.round(x[0].numpy() * 32767).astype(np.float32) / 32767 for x in renderer([spec]))
        facts = {"reverberant": spec.rir is not None, "snr_db": spec.snr_db, "speech": [s.item for s in spec.speech]}
        yield spec.id, noisy, target, facts
