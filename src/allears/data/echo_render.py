"""Rendering of clips with echo: the same code for one clip on a CPU and for a training batch on a GPU.

Shapes: B clips, S samples, T = ceil(S / 160) + 1 frames of 10 ms, of which frame t is centred at sample 160 t as in
``audio.stft``, L samples of a room response.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from allears.audio.butterworth import butterworth
from allears.audio.rooms import direct_delay, early_part
from allears.data.bank import AudioBank
from allears.data.draws import RATE
from allears.data.echo_play import HOP, on_its_way, ramp, true_delays
from allears.data.echo_spec import EchoSpec, read_echoes
from allears.data.loudspeaker import through_loudspeakers
from allears.data.reverb import RirBank, room_responses
from allears.data.waves import active_rms, at_snr, filtered, flat_audio, lay_segments, level_gain, made_noise, on_device

FAINT = 1e-3
"""RMS (-60 dB of full scale) below which a source counts as silent, and is not raised to the level of the other."""
ACTIVE_DB = -40.0
"""A frame is active whose power is so far below that of the clip's loudest, or less."""
HANGOVER = 10
"""Frames for which the near end still counts as active."""


class EchoBatch(NamedTuple):
    """Clips at 16 kHz, float32, and what is known of them.

    Attributes:
        mic: (B, S), ``near_reverberant + echo + noise``, to the bit.
        reference: (B, S), what is sent to the loudspeaker.
        near: (B, S), the target: the near talker's direct sound and the first 50 ms of reflections.
        near_reverberant, echo, noise: (B, S), as they reach the microphone.
        delay_frames: (B, T), int64: from the reference to the direct sound of its echo, in frames.
        voice: (B, T), bool: the near talker talks.
        far_active: (B, T), bool: the loudspeaker plays, delay included.
    """

    mic: Tensor
    reference: Tensor
    near: Tensor
    near_reverberant: Tensor
    echo: Tensor
    noise: Tensor
    delay_frames: Tensor
    voice: Tensor
    far_active: Tensor


@dataclass
class EchoRenderer:
    """Turns specs into an :class:`EchoBatch` on ``device``.

    Args:
        speech, noise: the banks that the specs speak of (they may be the same); without ``noise``, recorded noise and
            music are looked for in ``speech``.
        rirs: room responses, needed where a spec has a room.
    """

    speech: AudioBank
    noise: AudioBank | None = None
    rirs: RirBank | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._noise_bank = self.speech if self.noise is None else self.noise
        self._flat_speech, self._flat_noise = flat_audio(self.speech, self._noise_bank, self.device)

    @torch.no_grad()
    def __call__(self, specs: list[EchoSpec]) -> EchoBatch:
        """Render clips of one length."""
        frames = specs[0].frames
        if any(spec.frames != frames for spec in specs):
            raise ValueError("specs: clips of one batch must have the same length")
        near_dry, far, noise = self._sources(specs, frames)
        near_room = room_responses(self.rirs, [spec.near_rir for spec in specs], "talker", self.device)
        rooms = [None] if near_room is None else [near_room, early_part(near_room, RATE)]
        heard = filtered(near_dry, [spec.near_eq_db for spec in specs], [None] * len(specs), rooms)
        near_reverberant, near = heard[0], heard[-1]
        reference = far * _gain_to(active_rms(far), far, [spec.far_level_db for spec in specs])
        played = through_loudspeakers(on_its_way(reference, specs), [spec.loudspeaker for spec in specs])
        echo, direct = self._echo(played, specs)
        near_level, echo_level = active_rms(near_reverberant), active_rms(echo)
        ratio = on_device(self.device, [10 ** (-(spec.ser_db or 0.0) / 20) for spec in specs])[:, None]
        both = on_device(self.device, [[spec.scenario == "double"] for spec in specs], bool)
        echo = echo * torch.where(both, near_level.clamp_min(FAINT) * ratio / echo_level.clamp_min(1e-6), 1.0)
        alone = on_device(self.device, [[spec.scenario == "far"] for spec in specs], bool)
        noise = self._noise(specs, noise, torch.where(alone, echo, near_reverberant))
        mixture = near_reverberant + echo + noise
        peak = torch.maximum(mixture.abs(), near.abs()).amax(-1, keepdim=True)
        gain = level_gain([spec.level_db for spec in specs], mixture, peak)
        # Scaled before they are added up, so that not even rounding parts the microphone from the sum.
        near_reverberant, echo, noise, near = (x * gain for x in (near_reverberant, echo, noise, near))
        return EchoBatch(
            near_reverberant + echo + noise,
            reference,
            near,
            near_reverberant,
            echo,
            noise,
            true_delays(specs, *direct),
            active_frames(near, HANGOVER),
            active_frames(played, 0),
        )

    def _sources(self, specs: list[EchoSpec], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Near end, far end and noise, dry and rid of what lies below the high-pass, (B, S) each."""

        def lay(name: str, speech: bool, even_level: bool = False) -> Tensor:
            placed = [(row, segment) for row, spec in enumerate(specs) for segment in getattr(spec, name)]
            bank, flat = (self.speech, self._flat_speech) if speech else (self._noise_bank, self._flat_noise)
            return lay_segments(placed, bank, flat, len(specs), frames, even_level)

        noise = lay("noise", False, even_level=True)
        noise = noise + made_noise([spec.synthetic for spec in specs], frames, self.device)
        dry = torch.stack([lay("near", True), lay("far", True) + lay("far_music", False), noise])
        near, far, noise = butterworth(dry, RATE, on_device(self.device, [spec.highpass_hz for spec in specs]))
        return near, far, noise

    def _echo(self, played: Tensor, specs: list[EchoSpec]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loudspeaker (B, S) as the microphone hears it, and where the direct sound of both paths is, (B,) each."""
        none, zero = [None] * len(specs), torch.zeros(len(specs), dtype=torch.int64, device=self.device)
        room = room_responses(self.rirs, [spec.echo_rir for spec in specs], "talker", self.device)
        (echo,) = filtered(played, none, none, [room])
        before = zero if room is None else direct_delay(room, RATE)
        changes = [(row, spec.path_change) for row, spec in enumerate(specs) if spec.path_change is not None]
        if not changes:
            return echo, (before, before)
        rows = on_device(self.device, [row for row, _ in changes], np.int64)
        room = room_responses(self.rirs, [change.rir for _, change in changes], "talker", self.device)
        assert room is not None
        (moved,) = filtered(played[rows], none, none, [room])
        at = [change.at_s * RATE for _, change in changes]
        share = ramp(at, [change.fade_ms * RATE / 1000 for _, change in changes], echo.shape[1], self.device)
        return echo.index_copy(0, rows, torch.lerp(echo[rows], moved, share)), (
            before,
            before.index_copy(0, rows, direct_delay(room, RATE)),
        )

    def _noise(self, specs: list[EchoSpec], noise: Tensor, heard: Tensor) -> Tensor:
        """The noise (B, S) at its level below ``heard`` (B, S); exact zeros where a clip has none."""
        if all(spec.snr_db is None for spec in specs):
            return torch.zeros_like(noise)
        room = room_responses(self.rirs, [spec.noise_rir for spec in specs], "noise", self.device)
        (noise,) = filtered(noise, [None] * len(specs), [None] * len(specs), [room])
        return at_snr(heard, noise, [spec.snr_db for spec in specs])


def active_frames(x: Tensor, hangover: int) -> Tensor:
    """Frames (B, T) of x (B, S) within 40 dB of the loudest, and the ``hangover`` frames after each; bool."""
    energy = functional.pad(x, (HOP // 2, -x.shape[-1] % HOP + HOP // 2)).unflatten(-1, (-1, HOP)).square().mean(-1)
    peak = energy.amax(-1, keepdim=True)
    active = (energy >= peak * 10 ** (ACTIVE_DB / 10)) & (peak > 1e-10)
    held = functional.pad(active.float()[:, None], (hangover, 0))
    return functional.max_pool1d(held, hangover + 1, 1)[:, 0] > 0


def _gain_to(level: Tensor, x: Tensor, level_db: list[float]) -> Tensor:
    """Gain (B, 1) that brings ``level`` (B, 1) of x (B, S) to so many dB, less where the peak would pass 0.98."""
    wanted = on_device(x.device, [[10 ** (decibels / 20)] for decibels in level_db]) / level.clamp_min(1e-6)
    return torch.minimum(wanted, 0.98 / x.abs().amax(-1, keepdim=True).clamp_min(1e-6))


def render_echo_set(
    corpus: str | Path, manifest: str | Path, keep: Callable[[EchoSpec], bool] | None = None
) -> Iterator[tuple[str, EchoBatch, dict[str, Any]]]:
    """Clips of a manifest, one by one: (id, a batch of this clip, facts), rounded to 16 bit.

    The rounding makes the samples the same on every machine (arithmetic differs in the last bits only). It is that of
    what the microphone hears, part by part, so it still is their sum.

    Args:
        corpus: a prepared corpus.
        manifest: as :func:`allears.data.echo_spec.write_echoes` wrote it.
        keep: which clips; all by default.
    """
    specs = [spec for spec in read_echoes(manifest) if keep is None or keep(spec)]
    wanted = {s.item for spec in specs for part in (spec.near, spec.far, spec.far_music, spec.noise) for s in part}
    bank = AudioBank.from_corpus(corpus, ids=wanted)
    renderer = EchoRenderer(bank, bank, RirBank.from_corpus(corpus))
    for spec in specs:
        clip = renderer([spec])
        names = ("reference", "near", "near_reverberant", "echo", "noise")
        rounded = {name: torch.round(getattr(clip, name) * 32767) for name in names}
        mic = rounded["near_reverberant"] + rounded["echo"] + rounded["noise"]
        clip = clip._replace(mic=mic / 32767, **{name: x / 32767 for name, x in rounded.items()})
        facts = {
            "scenario": spec.scenario,
            "linear": spec.loudspeaker.linear,
            "delay_ms": spec.delay_ms,
            "ser_db": spec.ser_db,
            "snr_db": spec.snr_db,
            "changed_s": next((c.at_s for c in (spec.delay_jump, spec.path_change) if c is not None), None),
        }
        yield spec.id, clip, facts
