"""What the enhancer trains on and is validated on: talkers, noises, rooms, and fixed validation mixtures.

Shapes: V validation clips, S samples.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allears.data.bank import NOISE_KINDS, AudioBank, load_bank
from allears.data.mix import MixConfig, MixSampler
from allears.data.render import Renderer
from allears.data.reverb import RirBank

TRAIN_MIX = MixConfig()
VAL_MIX = replace(
    TRAIN_MIX,
    snr_db=(0.0, 15.0),
    silent_talker=0.0,
    noiseless=0.0,
    change_speed=0.0,
    eq=0.0,
    lowpass=0.0,
    clip=0.0,
    codec=0.0,
    reverberant=0.5,
)


@dataclass(frozen=True)
class EnhanceData:
    """Read and simulated once; several runs may share it.

    Args:
        speech, noise: training items.
        rooms: simulated rooms for training, if any.
        noisy, clean: (V, S) validation mixtures, of other talkers, noises and rooms, and their targets.
    """

    speech: AudioBank
    noise: AudioBank
    rooms: RirBank | None
    noisy: Tensor
    clean: Tensor

    @property
    def device(self) -> torch.device:
        return self.noisy.device

    @property
    def room_count(self) -> int:
        return 0 if self.rooms is None or self.rooms.full is None else len(self.rooms.full)


def load_data(
    corpus: list[str],
    device: torch.device,
    rirs: int = 2000,
    seed: int = 0,
    validation_clips: int = 64,
    rooms_folder: str | None = None,
) -> EnhanceData:
    """Read ``corpus``, simulate ``rirs`` training rooms of ``seed``, and render the validation mixtures.

    Args:
        rooms_folder: keep the simulated rooms here, and take them from here the next time.
    """
    speech = load_bank(corpus, ("speech",), ("train",))
    noise = load_bank(corpus, NOISE_KINDS, ("train",))
    cache = None
    if rooms_folder is not None:
        Path(rooms_folder).mkdir(parents=True, exist_ok=True)
        cache = Path(rooms_folder) / f"rooms-{rirs}-seed-{seed}.npy"
    rooms = RirBank.simulate(rirs, seed, device, cache) if rirs else None
    noisy, clean = _validation_set(corpus, validation_clips, min(64, validation_clips) if rirs else 0, device)
    return EnhanceData(speech, noise, rooms, noisy, clean)


def _validation_set(corpus: list[str], clips: int, rooms: int, device: torch.device) -> tuple[Tensor, Tensor]:
    speech = load_bank(corpus, ("speech",), ("val",))
    noise = load_bank(corpus, NOISE_KINDS, ("val",))
    sampler = MixSampler(speech, noise, replace(VAL_MIX, rirs=rooms), np.random.default_rng(1234))
    specs = [sampler.sample(f"val-{row}") for row in range(clips)]
    renderer = Renderer(speech, noise, RirBank.simulate(rooms, 4321, device) if rooms else None, device)
    pairs = [renderer(specs[at : at + 16]) for at in range(0, clips, 16)]
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
