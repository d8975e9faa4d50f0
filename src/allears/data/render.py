"""Rendering of mixtures: the same code for one clip on a CPU and for a training batch on a GPU.

Shapes: B clips, T samples, L room-response samples.
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.audio.rooms import early_part
from allears.data.bank import AudioBank
from allears.data.draws import RATE
from allears.data.mix import MixSpec, read_specs
from allears.data.reverb import RirBank, room_responses
from allears.data.waves import active_rms, at_snr, band_filter, flat_audio, lay_segments, level_gain, made_noise

__all__ = ["Renderer", "active_rms", "render_test_set"]


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
        self._flat_speech, self._flat_noise = flat_audio(self.speech, self.noise, self.device)

    @torch.no_grad()
    def __call__(self, specs: list[MixSpec]) -> tuple[Tensor, Tensor]:
        """``(noisy, target)``, each (B, T) float32. The target holds the direct sound and the first 50 ms of
        reflections.
        """
        frames = specs[0].frames
        if any(spec.frames != frames for spec in specs):
            raise ValueError("specs: clips of one batch must have the same length")
        batch, device = len(specs), self.device
        dry = lay_segments(
            [(row, s) for row, spec in enumerate(specs) for s in spec.speech],
            self.speech,
            self._flat_speech,
            batch,
            frames,
            False,
        )
        beds = [(row, s) for row, spec in enumerate(specs) for s in spec.noise]
        noise = lay_segments(beds, self.noise, self._flat_noise, batch, frames, True)
        noise = noise + made_noise([spec.synthetic for spec in specs], frames, device)
        talker_rooms = room_responses(self.rirs, [spec.rir for spec in specs], "talker", device)
        noise_rooms = room_responses(self.rirs, [spec.noise_rir for spec in specs], "noise", device)
        longest = max(0 if rooms is None else rooms.shape[1] for rooms in (talker_rooms, noise_rooms))
        size = 1 << (frames + longest - 1).bit_length()
        lowpass = [spec.lowpass_hz for spec in specs]
        shape, noise_shape = (
            band_filter(gains, lowpass, size, device)
            for gains in ([spec.eq_db for spec in specs], [spec.noise_eq_db for spec in specs])
        )
        voice, noises = torch.fft.rfft(dry, n=size) * shape, torch.fft.rfft(noise, n=size) * noise_shape
        if talker_rooms is None:
            heard = target = torch.fft.irfft(voice, n=size)[:, :frames]
        else:
            heard, target = (
                torch.fft.irfft(voice * torch.fft.rfft(rir, n=size), n=size)[:, :frames]
                for rir in (talker_rooms, early_part(talker_rooms, RATE))
            )
        if noise_rooms is not None:
            noises = noises * torch.fft.rfft(noise_rooms, n=size)
        noise = torch.fft.irfft(noises, n=size)[:, :frames]
        return self._finish(specs, heard + at_snr(heard, noise, [spec.snr_db for spec in specs]), target)

    def _finish(self, specs: list[MixSpec], noisy: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        peak = torch.maximum(noisy.abs().amax(-1, keepdim=True), target.abs().amax(-1, keepdim=True))
        gain = level_gain([spec.level_db for spec in specs], noisy, peak)
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
