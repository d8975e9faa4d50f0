"""What the echo canceller hears in each stage of its training, and what it is validated on.

Shapes: V validation clips, S samples, T frames, D delays.
"""

import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from allears.audio.metrics.si_sdr import si_sdr_db
from allears.data.bank import NOISE_KINDS, AudioBank, load_bank
from allears.data.draws import RATE
from allears.data.echo import EchoMixConfig, EchoSampler, EchoSpec, Scenario
from allears.data.echo_render import EchoBatch, EchoRenderer
from allears.data.echo_rooms import PLACES, room_with_loudspeaker
from allears.data.reverb import RirBank
from allears.recipes.separate_data import VALIDATION_VOICES
from allears.train.ahead import Ahead

TRAIN_MIX = EchoMixConfig(long_delay=0.3, far_only=0.2, near_only=0.2)
"""Long delays as often as tests ask for them, which are spread evenly to 900 ms."""
_ROUND: tuple[Scenario, ...] = ("far", "double", "near", "far", "double", "double")
_VALIDATION_ROOMS = 32
_SETTLED_S = 1.0  # ERLE is taken from here on
_MOST_DB = 80.0


@dataclass(frozen=True)
class Stage:
    """One part of a training; weights go from one to the next.

    Args:
        share: of the run's time or steps, in relation to the other stages' shares.
        longest_delay_ms: no delay is longer.
        seconds: of a clip; delays that are long want clips in which they are found.
        linear: the pretraining, in which a linear echo canceller stands in front.
        changes: delays jump, clocks drift, paths and volumes change.
        voice: with the head that tells voice, and the gate.
        quiet: share of the loss's weight of that name, which early on teaches to silence the talker too.
        lr: highest learning rate, relative to the run's.
        final_lr_ratio: its last one, relative to its highest.
    """

    name: str
    share: float
    longest_delay_ms: float
    seconds: float
    linear: bool = False
    changes: bool = True
    voice: bool = False
    quiet: float = 1.0
    lr: float = 1.0
    final_lr_ratio: float = 0.1


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("linear", 0.2, 64.0, 4.0, linear=True, changes=False, quiet=0.0),
        Stage("short", 0.15, 64.0, 4.0, changes=False, quiet=0.0),
        Stage("middle", 0.2, 500.0, 5.0, quiet=0.3),
        Stage("long", 0.3, 1000.0, 6.0, lr=0.7, final_lr_ratio=0.05),
        Stage("voice", 0.15, 1000.0, 6.0, voice=True, lr=0.4, final_lr_ratio=0.02),
    )
}
"""In their order: linear echo canceller in front; end to end from the weights of that, with short delays, longer ones
and changes, all delays; voice activity and gate last."""


def chosen_stages(given: Sequence[str] | Mapping[str, float] | None, seconds: float | None = None) -> list[Stage]:
    """Stages in their order, with shares that add up to 1.

    Args:
        given: names, or names with shares; all by default.
        seconds: length of the clips, in place of the stages' own.

    Raises:
        ValueError: a name is unknown, a share is not above 0, or no stage is end to end.
    """
    shares: dict[str, float] = {name: stage.share for name, stage in STAGES.items()}
    if given is not None:
        shares = dict(given) if isinstance(given, Mapping) else {name: shares.get(name, 1.0) for name in given}
    if unknown := [name for name in shares if name not in STAGES]:
        raise ValueError(f"stages: {unknown[0]!r} is unknown; known are {', '.join(STAGES)}")
    if bad := [name for name, share in shares.items() if not share > 0]:
        raise ValueError(f"stages: share {shares[bad[0]]} of {bad[0]!r}, wanted above 0; leave the stage out instead")
    if all(STAGES[name].linear for name in shares):
        raise ValueError(f"stages: got {list(shares)}, wanted one or more that are end to end, as 'short' or 'long'")
    total = sum(shares.values())
    return [
        replace(stage, share=shares[name] / total, seconds=seconds or stage.seconds)
        for name, stage in STAGES.items()
        if name in shares
    ]


def stage_mix(mix: EchoMixConfig, stage: Stage, rirs: int) -> EchoMixConfig:
    """``mix`` as the stage hears it, in so many rooms."""
    mix = replace(mix, seconds=stage.seconds, rirs=rirs)
    if not stage.changes:
        mix = replace(mix, jump=0.0, drift=0.0, path_change=0.0, gain_step=0.0)
    return mix.within(stage.longest_delay_ms)


@dataclass(frozen=True)
class EchoData:
    """Read and simulated once; all stages, and several runs, may share it.

    Args:
        speech, noise: training items.
        held, held_noise: those of validation: other talkers, other noises.
        renderer: of training clips.
        held_renderer: of validation clips, in other rooms; it shares the samples with the first.
    """

    speech: AudioBank
    noise: AudioBank
    held: AudioBank
    held_noise: AudioBank
    renderer: EchoRenderer
    held_renderer: EchoRenderer

    @property
    def device(self) -> torch.device:
        return self.renderer.device

    @property
    def room_count(self) -> int:
        return _rooms_of(self.renderer)


def _rooms_of(renderer: EchoRenderer) -> int:
    return 0 if renderer.rirs is None or renderer.rirs.full is None else len(renderer.rirs.full)


def load_data(
    corpus: list[str],
    device: torch.device,
    rirs: int = 1000,
    seed: int = 0,
    rooms_folder: str | None = None,
    hold_out: tuple[str, ...] = VALIDATION_VOICES,
) -> EchoData:
    """Read ``corpus``, and simulate ``rirs`` training rooms of ``seed`` and up to 32 others for validation.

    Args:
        rirs: rooms; with 0 all clips are dry.
        rooms_folder: keep the simulated rooms here, and take them from here the next time.
        hold_out: speakers who are left out of training, for validation; those that the corpus lacks do not matter.
    """
    voices = load_bank(corpus, ("speech",), ("train", "val")).select(lambda item: not item.narrow_band)
    noises = load_bank(corpus, NOISE_KINDS, ("train", "val"))

    def rooms(count: int, seed: int) -> RirBank | None:
        cache = None
        if rooms_folder is not None:
            Path(rooms_folder).mkdir(parents=True, exist_ok=True)
            cache = Path(rooms_folder) / f"echo-rooms-{count}-seed-{seed}.npy"
        return RirBank.simulate(count, seed, device, cache, PLACES, room_with_loudspeaker) if count else None

    renderer = EchoRenderer(voices, noises, rooms(rirs, seed), device)
    held_renderer = copy(renderer)
    held_renderer.rirs = rooms(min(_VALIDATION_ROOMS, rirs), 4321 + seed)
    return EchoData(
        voices.select(lambda item: item.split == "train" and item.speaker not in hold_out),
        noises.select(lambda item: item.split == "train"),
        voices.select(lambda item: item.split == "val" or item.speaker in hold_out),
        noises.select(lambda item: item.split == "val"),
        renderer,
        held_renderer,
    )


class Clips:
    """Training clips of a stage, drawn by step and rendered: ``clips(step)`` is an :class:`EchoBatch`."""

    def __init__(self, data: EchoData, mix: EchoMixConfig, batch: int, seed: int) -> None:
        self._renderer, self._batch = data.renderer, batch
        self._sampler = EchoSampler(data.speech, data.noise, mix, np.random.default_rng(seed))
        self._seeds = [seed, int(os.environ.get("RANK", "0"))]
        self._ahead = Ahead(self.draw)

    def draw(self, key: tuple[int, int]) -> list[EchoSpec]:
        """The specs of a step's draw; the same key gives the same ones."""
        self._sampler.rng = np.random.default_rng([*self._seeds, *key])
        return [self._sampler.sample(f"{key[0]}-{key[1]}-{row}") for row in range(self._batch)]

    def __call__(self, step: int) -> EchoBatch:
        return self._renderer(self._ahead.take(step))


@dataclass(frozen=True)
class Validation:
    """V clips, and which end talks in each."""

    clips: EchoBatch
    scenarios: tuple[Scenario, ...]


def validation_set(data: EchoData, mix: EchoMixConfig, count: int) -> Validation:
    """The same clips for the same data and distribution: a third far end alone, half double talk, the rest near end."""
    mix = replace(mix, rirs=_rooms_of(data.held_renderer), change_speed=0.0, eq=0.0)
    sampler = EchoSampler(data.held, data.held_noise, mix, np.random.default_rng(1234))
    specs = [sampler.sample(f"val-{row}", _ROUND[row % len(_ROUND)]) for row in range(count)]
    batches = [data.held_renderer(specs[at : at + 16]) for at in range(0, count, 16)]
    clips = EchoBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    return Validation(clips, tuple(spec.scenario for spec in specs))


def scores(
    near: Tensor,
    alignment: Tensor | None,
    voice: Tensor | None,
    validation: Validation,
    reverberation: float = 0.0,
) -> dict[str, float]:
    """How good the outputs of the validation clips are.

    Args:
        near: (V, S), the outputs.
        alignment: (V, T, D), softmax over the delays.
        voice: (V, T), logits.
        reverberation: share of the late reverberation in the target.

    Returns:
        ``erle_db`` of the far end alone, after a second; ``si_sdr_gain_db`` of double talk; ``near_sdr_db`` and
        ``near_level_db`` (below 0: all is made quiet) of the near end alone, against its target; ``alignment``, share
        of the frames with a playing loudspeaker whose delay is found to within a frame; ``voice``, share of frames told
        rightly. What there is no clip for is left out.
    """
    clips, found = validation.clips, {}
    rows = {kind: [n for n, scenario in enumerate(validation.scenarios) if scenario == kind] for kind in _ROUND}
    near, mic = near.double(), clips.mic.double()
    target = torch.lerp(clips.near.double(), clips.near_reverberant.double(), reverberation)
    if far := rows["far"]:
        first = min(int(_SETTLED_S * RATE), near.shape[1] // 2)
        found["erle_db"] = _decibels(mic[far, first:], near[far, first:])
    if both := rows["double"]:
        gains = si_sdr_db(near[both], target[both]) - si_sdr_db(mic[both], target[both])
        found["si_sdr_gain_db"] = float(gains.clamp(-_MOST_DB, _MOST_DB).mean())
    if alone := rows["near"]:
        found["near_sdr_db"] = _decibels(target[alone], target[alone] - near[alone])
        found["near_level_db"] = _decibels(near[alone], target[alone])
    if alignment is not None and clips.far_active.any():
        right = (alignment.argmax(-1) - clips.delay_frames).abs() <= 1
        found["alignment"] = float(right[clips.far_active].double().mean())
    if voice is not None:
        found["voice"] = float(((voice > 0) == clips.voice).double().mean())
    return found


def _decibels(x: Tensor, y: Tensor) -> float:
    """Mean over clips of the energy of x (V, S) over that of y, at most 80 dB either way."""
    ratio = x.square().sum(-1).clamp_min(1e-12) / y.square().sum(-1).clamp_min(1e-12)
    return float((10 * ratio.log10()).clamp(-_MOST_DB, _MOST_DB).mean())
