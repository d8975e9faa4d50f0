"""Rendering of clips of several talkers: the same code for one clip on a CPU and for a training batch on a GPU.

Shapes: B clips, J talkers, T samples, L room-response samples. Rows B * J are all talkers of all clips.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.audio.formants import shift_formants
from allears.audio.rooms import early_part
from allears.data.bank import AudioBank
from allears.data.draws import RATE
from allears.data.reverb import RirBank, room_responses
from allears.data.talkers import Talker, TalkersSpec, read_talkers
from allears.data.waves import active_rms, at_snr, filtered, flat_audio, lay_segments, level_gain, made_noise, on_device

FAINT = 1e-3
"""RMS (-60 dB of full scale) below which a talker counts as silent, and is not raised to the level of the others."""


@dataclass
class TalkersRenderer:
    """Turns specs into waveforms on ``device``.

    Args:
        speech, noise: the banks that the specs speak of (they may be the same); without ``noise``, recorded noise is
            looked for in ``speech``.
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
    def __call__(self, specs: list[TalkersSpec], talkers: int | None = None) -> tuple[Tensor, Tensor]:
        """``mixture (B, T)`` and ``sources (B, J, T)``, float32 at 16 kHz.

        A source is the talker's direct sound and the first 50 ms of reflections. Where a clip has fewer than J talkers,
        the last rows are zero. The mixture of a dry clip without noise is the sum of its sources, to the bit.

        Args:
            specs: clips of one length.
            talkers: J; by default the most talkers of the clips.
        """
        frames = specs[0].frames
        if any(spec.frames != frames for spec in specs):
            raise ValueError("specs: clips of one batch must have the same length")
        most = max(len(spec.talkers) for spec in specs)
        count = max(1, most) if talkers is None else talkers
        if count < most:
            raise ValueError(f"talkers: {talkers} given, but a clip has {most}; give {most} or more, or None")
        heard, target = self._voices(specs, count, frames)
        noise = self._noise(specs, heard.sum(1))
        mixture = heard.sum(1) + noise
        peak = torch.maximum(mixture.abs().amax(-1, keepdim=True), target.abs().amax((-2, -1))[:, None])
        gain = level_gain([spec.level_db for spec in specs], mixture, peak)
        # Scaled before they are added up, so that not even rounding parts a clean mixture from the sum of its sources.
        return (heard * gain[:, None]).sum(1) + noise * gain, target * gain[:, None]

    def _voices(self, specs: list[TalkersSpec], count: int, frames: int) -> tuple[Tensor, Tensor]:
        """All talkers as they are heard, and their targets, (B, J, T); a target's active RMS is its gain."""
        silent = Talker(())
        talkers = [talker for spec in specs for talker in (*spec.talkers, *[silent] * (count - len(spec.talkers)))]
        placed = [(row, segment) for row, talker in enumerate(talkers) for segment in talker.segments]
        dry = lay_segments(placed, self.speech, self._flat_speech, len(talkers), frames, even_level=False)
        dry = self._reshaped(dry, talkers)
        room = room_responses(self.rirs, [talker.rir for talker in talkers], "talker", self.device)
        rooms = [None] if room is None else [room, early_part(room, RATE)]
        lowpass = [spec.lowpass_hz for spec in specs for _ in range(count)]
        through = filtered(dry, [talker.eq_db for talker in talkers], lowpass, rooms)
        wanted = on_device(self.device, [10 ** (talker.gain_db / 20) for talker in talkers])[:, None]
        gain = wanted / active_rms(through[-1]).clamp_min(FAINT)
        heard, target = ((x * gain).unflatten(0, (len(specs), count)) for x in (through[0], through[-1]))
        return heard, target

    def _reshaped(self, dry: Tensor, talkers: list[Talker]) -> Tensor:
        """The dry voices (B * J, T) with the formants that their talkers have; itself where all have their own."""
        rows = [row for row, talker in enumerate(talkers) if talker.formants != 1 and talker.segments]
        if not rows:
            return dry
        ratio = on_device(self.device, [talkers[row].formants for row in rows])
        top = on_device(self.device, [self._top_hz(talkers[row]) for row in rows])
        places = on_device(self.device, rows, np.int64)
        return dry.index_copy(0, places, shift_formants(dry[places], ratio, RATE, top))

    def _top_hz(self, talker: Talker) -> float:
        """Where the voice's recordings end, as fast as they are played."""
        first = talker.segments[0]
        narrow = self.speech.items[self.speech.index_of(first.item)].narrow_band
        return min(RATE / 2, first.speed * RATE / (4 if narrow else 2))

    def _noise(self, specs: list[TalkersSpec], heard: Tensor) -> Tensor:
        """The noise (B, T) at its level below ``heard`` (B, T); exact zeros where a clip has none."""
        if all(spec.snr_db is None for spec in specs):
            return torch.zeros_like(heard)
        batch, frames = heard.shape
        beds = [(row, segment) for row, spec in enumerate(specs) for segment in spec.noise]
        noise = lay_segments(beds, self._noise_bank, self._flat_noise, batch, frames, even_level=True)
        noise = noise + made_noise([spec.synthetic for spec in specs], frames, self.device)
        room = room_responses(self.rirs, [spec.noise_rir for spec in specs], "noise", self.device)
        (noise,) = filtered(noise, [None] * batch, [spec.lowpass_hz for spec in specs], [room])
        return at_snr(heard, noise, [spec.snr_db for spec in specs])


def render_talker_set(
    corpus: str | Path, manifest: str | Path, keep: Callable[[TalkersSpec], bool] | None = None
) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict[str, Any]]]:
    """Clips of a manifest, one by one: (id, mixture (T,), sources (J, T), facts), float32 at 16 kHz, rounded to 16 bit.

    The rounding makes the samples the same on every machine (arithmetic differs in the last bits only). It is that of
    sources and of what the mixture has beside them, so a clean mixture still is the sum of its sources.

    Args:
        corpus: a prepared corpus.
        manifest: as :func:`allears.data.talkers.write_talkers` wrote it.
        keep: which clips; all by default.
    """
    specs = [spec for spec in read_talkers(manifest) if keep is None or keep(spec)]
    said = {s.item for spec in specs for talker in spec.talkers for s in talker.segments}
    bank = AudioBank.from_corpus(corpus, ids=said | {s.item for spec in specs for s in spec.noise})
    speakers = {item.id: item.speaker for item in bank.items}
    renderer = TalkersRenderer(bank, bank, RirBank.from_corpus(corpus))
    for spec in specs:
        mixture, sources = (x[0].double().numpy() for x in renderer([spec]))
        rest = np.round((mixture - sources.sum(0)) * 32767)
        sources = np.round(sources * 32767)
        facts = {
            "speakers": [speakers[talker.segments[0].item] for talker in spec.talkers],
            "reverberant": any(talker.rir is not None for talker in spec.talkers),
            "snr_db": spec.snr_db,
        }
        yield spec.id, ((sources.sum(0) + rest) / 32767).astype(np.float32), (sources / 32767).astype(np.float32), facts
