"""Training of the separators, from corpus to weights."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from allears.core.config import overridden, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import load_weights, save_weights
from allears.data.talkers import TalkersConfig, TalkersSampler, TalkersSpec
from allears.data.talkers_render import TalkersRenderer
from allears.models.separate.config import PRESETS, SeparateConfig
from allears.models.separate.loss import SeparateLoss, separation_loss, si_snr_improvement_db
from allears.models.separate.model import SeparateNet, export_state
from allears.recipes.separate_data import SeparateData, load_data, to_rate
from allears.train import TrainConfig, TrainResult, train
from allears.train.ahead import Ahead
from allears.train.graphs import graphed

log = logging.getLogger(__name__)

CLEAN_MIX = TalkersConfig(
    talkers=((2, 1.0),),
    noisy=0.0,
    reverberant=0.0,
    conversation=0.0,
    partial=0.0,
    lowpass=0.0,
    alike=0.4,
    one_pitch=0.5,
    formant=0.5,
)
"""Two talkers at once, -5 to 5 dB, nothing else: the field's usual task."""

ROOM_MIX = TalkersConfig(
    talkers=((1, 0.08), (2, 0.67), (3, 0.25)),
    noisy=0.6,
    reverberant=0.6,
    conversation=0.25,
    partial=0.1,
    alike=0.4,
    one_pitch=0.5,
    one_band=True,
    formant=0.5,
)
"""One to three talkers, clean or in noise, dry or in a room, all at once or in turns."""


_ENDS = ("core.enter", "core.leave", "core.encoder", "core.head", "core.auxiliary")
"""Names of the first and the last layers of both families."""


class WithAuxiliary(nn.Module):
    """The network as the loop calls it: mixture (B, S) to (B, J, S), and in training what the auxiliary heads say."""

    def __init__(self, net: SeparateNet, auxiliary: bool) -> None:
        super().__init__()
        self.net, self.auxiliary = net, auxiliary

    def forward(self, mixture: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.auxiliary and self.training:
            return self.net.with_auxiliary(mixture)
        return self.net(mixture), []


class SeparateObjective:
    """Draws a batch of mixtures a step, seeded by the step; validates on fixed mixtures of other talkers.

    Args:
        steps: of the whole run; the auxiliary heads' weight follows them.
        graphs: capture the network's passes as CUDA graphs at the first step.
        ramp_steps: the shares of noisy and reverberant clips grow from 0 to the full ones over so many steps.
        together: batches that are drawn and rendered at once, one for each of so many steps in a row: rendering is
            many small kernels, whatever the number of clips.
    """

    def __init__(
        self,
        config: SeparateConfig,
        data: SeparateData,
        mix: TalkersConfig,
        batch: int,
        seed: int,
        loss: SeparateLoss,
        steps: int,
        graphs: bool = False,
        ramp_steps: int = 0,
        together: int = 1,
    ) -> None:
        self.config, self.options, self.batch, self.seed, self.steps = config, loss, batch, seed, steps
        self._data, self._graphs = data, graphs
        self._renderer = TalkersRenderer(data.speech, data.noise, data.rooms, data.device)
        self._sampler = TalkersSampler(data.speech, data.noise, mix, np.random.default_rng(seed))
        self._mix, self._ramp_steps = mix, ramp_steps
        self._rank = int(os.environ.get("RANK", "0"))
        self._together, self._block = together, -1
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._ahead = Ahead(self._draw)

    def _draw(self, key: tuple[int, int]) -> list[TalkersSpec]:
        share = min(1.0, key[0] * self._together / self._ramp_steps) if self._ramp_steps else 1.0
        self._sampler.config = replace(
            self._mix, noisy=share * self._mix.noisy, reverberant=share * self._mix.reverberant
        )
        self._sampler.rng = np.random.default_rng([self.seed, self._rank, *key])
        return [self._sampler.sample(f"{key[0]}-{key[1]}-{row}") for row in range(self.batch * self._together)]

    def batch_of(self, step: int) -> tuple[Tensor, Tensor]:
        """Mixtures (B, S) and sources (B, J, S) of a step, at the network's rate."""
        block, at = divmod(step, self._together)
        if block != self._block or self._together == 1:
            pair = self._renderer(self._ahead.take(block), self.config.talkers)
            mixture, sources = (to_rate(x, self.config.sample_rate_hz) for x in pair)
            self._block = block
            self._batches = list(zip(mixture.split(self.batch), sources.split(self.batch), strict=True))
        return self._batches[at]

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        mixture, sources = self.batch_of(step)
        if self._graphs:
            graphed(model, mixture)
            self._graphs = False
        outputs, auxiliaries = model(mixture)
        with torch.autocast(mixture.device.type, enabled=False):
            total, parts = separation_loss(
                outputs, auxiliaries, sources, mixture, self.options, min(1.0, step / self.steps)
            )
        return total, dict(parts)

    def outputs(self, model: nn.Module) -> Tensor:
        """The validation mixtures separated, (V, J, S)."""
        kind = self._data.device.type
        outs = []
        for part in self._data.mixture.split(16):
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                outs.append(model(part)[0].float())
        return torch.cat(outs)

    def validate(self, model: nn.Module) -> dict[str, float]:
        mixture, sources = self._data.mixture, self._data.sources
        gains = si_snr_improvement_db(self.outputs(model), sources, mixture)
        return {"si_snri_db": float(gains.mean()), "si_snri_db_worst_tenth": float(gains.quantile(0.1))}


@matmul_precision("high")
def train_separate(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str = "talkers-16k",
    seed: int = 0,
    batch: int = 16,
    seconds: float = 4.0,
    rirs: int = 1000,
    lr: float = 1e-3,
    start: str | None = None,
    compile: bool = False,
    graphs: bool = False,
    validation_clips: int = 64,
    mix: TalkersConfig | Mapping[str, Any] | None = None,
    loss: SeparateLoss | Mapping[str, Any] | None = None,
    auxiliary_heads: bool = True,
    grad_clip: float = 5.0,
    final_lr_ratio: float = 0.02,
    warmup_steps: int = 500,
    ema_decay: float = 0.999,
    validate_every: int = 1000,
    rooms_folder: str | None = None,
    ramp_steps: int = 0,
    together: int = 1,
    optimizer: Literal["adamw", "muon"] = "adamw",
    data: SeparateData | None = None,
) -> TrainResult:
    """Train a separator and leave float16 weights as ``out/export.safetensors`` with their configuration.

    Args:
        corpus: folders made by ``allears data prepare`` (or ``voices``, ``synthetic``) or ``allears data pack``.
        preset: a size of :data:`PRESETS`. One with silent outputs is trained on one to three talkers in noise and
            rooms, any other on clean mixtures of two.
        batch, seconds: clips a step, and their length.
        rirs: simulated rooms for training.
        start: weights to start from, a path stem.
        graphs: replay the passes as CUDA graphs: launching the network's many small kernels takes longer than running
            them.
        mix: the mixtures, whole or as the fields that differ from the preset's.
        loss: likewise; by default SI-SNR, with silent outputs SNR.
        auxiliary_heads: give each decoder stage a head and a loss of its own (SepReformer only).
        grad_clip, final_lr_ratio, warmup_steps, ema_decay, validate_every: see :class:`allears.train.TrainConfig`.
        rooms_folder: keep the simulated rooms here for the next run.
        ramp_steps: the shares of noisy and reverberant clips grow from 0 to the full ones over so many steps.
        together: see :class:`SeparateObjective`.
        optimizer: ``muon`` for the matrices between the first and the last layer, AdamW for all else; or ``adamw``.
        data: what :func:`load_data` gave, in place of ``corpus``, ``rirs``, ``validation_clips``, ``rooms_folder``.

    Raises:
        ValueError: the preset, or a field of the mixtures or of the loss, is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
    config = PRESETS[preset]
    mixing = replace(overridden(ROOM_MIX if config.silent_outputs else CLEAN_MIX, mix, "mix"), seconds=seconds)
    options = overridden(SeparateLoss(measure="snr" if config.silent_outputs else "si_snr"), loss, "loss")
    where = resolve_device(device)
    if data is None:
        data = load_data(
            corpus, where, mixing, config.sample_rate_hz, config.talkers, rirs, seed, validation_clips, rooms_folder
        )
    mixing = replace(mixing, rirs=data.room_count)
    torch.manual_seed(seed)
    auxiliary = auxiliary_heads and config.sepreformer is not None
    net = SeparateNet(config, aux_heads=auxiliary)
    before = None
    if start is not None:
        tensors, origin = load_weights(start)
        missing = set(net.load_state_dict(tensors, strict=False).missing_keys)
        if missing - {name for name in net.state_dict() if name not in export_state(net)}:
            raise ValueError(f"start: {start!r} lacks {min(missing)!r}; its weights are of another size or kind")
        before = origin.get("training")
    whole_run = steps or 100_000
    objective = SeparateObjective(config, data, mixing, batch, seed, options, whole_run, graphs, ramp_steps, together)
    settings = TrainConfig(
        out=out,
        steps=whole_run,
        minutes=minutes,
        lr=lr,
        seed=seed,
        compile=compile,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        grad_clip=grad_clip,
        final_lr_ratio=final_lr_ratio,
        warmup_steps=warmup_steps,
        ema_decay=ema_decay,
        validate_every=validate_every,
        optimizer=optimizer,
        muon_leave_out=_ENDS,
    )
    result = train(WithAuxiliary(net, auxiliary), objective, settings)
    record = {
        "model": "separate",
        "config": to_dict(config),
        "training": {
            "recipe": "separate",
            "started_from": before,
            "preset": preset,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "clip_seconds": seconds,
            "rooms": data.room_count,
            "lr": lr,
            "grad_clip": grad_clip,
            "final_lr_ratio": final_lr_ratio,
            "warmup_steps": warmup_steps,
            "ema_decay": ema_decay,
            "seed": seed,
            "ramp_steps": ramp_steps,
            "together": together,
            "optimizer": optimizer,
            "auxiliary_heads": auxiliary,
            "loss": to_dict(options),
            "mix": to_dict(mixing),
            "speech_hours": round(data.speech.seconds / 3600, 2),
            "speakers": len(data.speech.speakers()),
            "noise_hours": round(data.noise.seconds / 3600, 2) if data.noise is not None else 0.0,
            "licences": sorted({item.licence for item in _items(data)}),
            "packages": sorted({item.package for item in _items(data)}),
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in export_state(net).items()}, record)
    return result


def _items(data: SeparateData) -> list[Any]:
    return [*data.speech.items, *(data.noise.items if data.noise is not None else ())]
