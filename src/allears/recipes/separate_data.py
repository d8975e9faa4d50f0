"""What the separators train on and are validated on: talkers, noises, rooms, and fixed validation mixtures.

Shapes: V validation clips, J talkers, S samples.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allears.data.bank import NOISE_KINDS, AudioBank, load_bank
from allears.data.reverb import RirBank
from allears.data.talkers import TalkersConfig, TalkersSampler
from allears.data.talkers_render import TalkersRenderer

RATES_HZ = (8_000, 16_000)
VALIDATION_VOICES = ("qabcs-pl", "ktuberling-uk", "kajongg-male2", "amazon-queen-05", "amazon-queen-10")
"""Speakers of the training split that validation hears and training does not. The validation split's own two voices are
of different sex, age and recording: a network that tells little more apart scores 8 dB on that one pair, and nothing on
voices that are alike.
"""
_TAPS = 127
_CUTOFF_HZ = 3_750.0


@dataclass(frozen=True)
class SeparateData:
    """Read and simulated once; several runs may share it.

    Args:
        speech, noise: training items; ``noise`` is ``None`` for clean mixtures.
        rooms: simulated rooms, if any.
        sample_rate_hz: of the validation mixtures, and of what :func:`to_rate` is asked for.
        mixture: (V, S), of other talkers, noises and rooms.
        sources: (V, J, S).
    """

    speech: AudioBank
    noise: AudioBank | None
    rooms: RirBank | None
    sample_rate_hz: int
    mixture: Tensor
    sources: Tensor

    @property
    def device(self) -> torch.device:
        return self.mixture.device

    @property
    def room_count(self) -> int:
        return 0 if self.rooms is None or self.rooms.full is None else len(self.rooms.full)


def load_data(
    corpus: list[str],
    device: torch.device,
    mix: TalkersConfig,
    sample_rate_hz: int,
    talkers: int,
    rirs: int = 0,
    seed: int = 0,
    validation_clips: int = 64,
    rooms_folder: str | None = None,
    hold_out: tuple[str, ...] = VALIDATION_VOICES,
) -> SeparateData:
    """Read ``corpus``, simulate ``rirs`` training rooms of ``seed``, and render the validation mixtures.

    Voices that were recorded below 16 kHz are full band at 8 kHz; at 16 kHz they are taken where ``mix`` keeps them
    among themselves (``one_band``).

    Args:
        mix: the distribution; its shares of noisy and reverberant clips say whether noise and rooms are needed.
        talkers: J, most talkers of a mixture.
        rooms_folder: keep the simulated rooms here, and take them from here the next time.
        hold_out: speakers who are left out of training, for validation; those that the corpus lacks do not matter.

    Raises:
        ValueError: the rate is neither 8 nor 16 kHz.
    """
    if sample_rate_hz not in RATES_HZ:
        raise ValueError(f"sample_rate_hz: {sample_rate_hz} given; training mixtures are made at 8000 or 16000")
    wide = sample_rate_hz > 8_000 and not mix.one_band
    voices = load_bank(corpus, ("speech",), ("train", "val")).select(lambda item: not (wide and item.narrow_band))
    held = voices.select(lambda item: item.split == "val" or item.speaker in hold_out)
    speech = voices.select(lambda item: item.split == "train" and item.speaker not in hold_out)
    noise = load_bank(corpus, NOISE_KINDS, ("train",)) if mix.noisy else None
    rooms = None
    if rirs and mix.reverberant:
        cache = None
        if rooms_folder is not None:
            Path(rooms_folder).mkdir(parents=True, exist_ok=True)
            cache = Path(rooms_folder) / f"rooms-{rirs}-of-{talkers}-seed-{seed}.npy"
        rooms = RirBank.simulate(rirs, seed, device, cache, talkers=talkers)
    noises = load_bank(corpus, NOISE_KINDS, ("val",)) if mix.noisy else None
    mixture, sources = _validation_set(
        held, noises, device, mix, sample_rate_hz, talkers, validation_clips, rooms is not None
    )
    return SeparateData(speech, noise, rooms, sample_rate_hz, mixture, sources)


def _validation_set(
    speech: AudioBank,
    noise: AudioBank | None,
    device: torch.device,
    mix: TalkersConfig,
    rate: int,
    talkers: int,
    clips: int,
    reverberant: bool,
) -> tuple[Tensor, Tensor]:
    two = min(2, talkers, len(speech.speakers()))  # as many distinct voices as there are
    rooms = min(32, clips) if reverberant else 0
    config = replace(mix, talkers=((two, 1.0),), rirs=rooms, conversation=0.0, partial=0.0)
    config = replace(config, change_speed=0.0, eq=0.0, alike=0.0, one_pitch=0.0, formant=0.0)  # voices as they are
    sampler = TalkersSampler(speech, noise, config, np.random.default_rng(1234))
    specs = [sampler.sample(f"val-{row}") for row in range(clips)]
    bank = RirBank.simulate(rooms, 4321, device, talkers=talkers) if rooms else None
    renderer = TalkersRenderer(speech, noise, bank, device)
    pairs = [renderer(specs[at : at + 16], talkers) for at in range(0, clips, 16)]
    return to_rate(torch.cat([pair[0] for pair in pairs]), rate), to_rate(torch.cat([pair[1] for pair in pairs]), rate)


def to_rate(x: Tensor, sample_rate_hz: int) -> Tensor:
    """x (..., S) at 16 kHz, itself or at 8 kHz (half as many samples; a windowed-sinc low-pass, then every second)."""
    if sample_rate_hz == 16_000:
        return x
    t = torch.arange(_TAPS, device=x.device, dtype=torch.float64) - _TAPS // 2
    window = torch.kaiser_window(_TAPS, periodic=False, beta=8.0, dtype=torch.float64, device=x.device)
    share = 2 * _CUTOFF_HZ / 16_000
    kernel = (share * torch.sinc(share * t) * window).float()
    flat = x.reshape(-1, 1, x.shape[-1])
    half = F.conv1d(flat, kernel[None, None], stride=2, padding=_TAPS // 2)[..., : math.ceil(x.shape[-1] / 2)]
    return half.reshape(*x.shape[:-1], -1)
