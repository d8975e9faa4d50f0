"""Training of the enhancer, from corpus to weights."""

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from allears.audio.metrics.pesq import pesq_wb
from allears.core.config import from_dict, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.errors import require
from allears.core.weights import load_weights, save_weights
from allears.data.mix import MixConfig, MixSampler, MixSpec
from allears.data.render import Renderer
from allears.models.enhance.config import PRESETS, EnhanceConfig
from allears.models.enhance.loss import LossWeights, flow_loss, waveform_terms
from allears.models.enhance.loudness import disturbance
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.sample import enhance
from allears.models.enhance.state import level_of
from allears.recipes.enhance_data import TRAIN_MIX, EnhanceData, load_data
from allears.train import TrainConfig, TrainResult, train
from allears.train.ahead import Ahead

log = logging.getLogger(__name__)


class EnhanceObjective:
    """Draws a batch of mixtures a step, seeded by the step; validates on fixed mixtures of other talkers, noises and
    rooms.
    """

    def __init__(
        self,
        config: EnhanceConfig,
        data: EnhanceData,
        mix: MixConfig,
        batch: int,
        seed: int,
        weights: LossWeights,
    ) -> None:
        self.config, self.weights, self.batch, self.seed = config, weights, batch, seed
        self._data = data
        self._renderer = Renderer(data.speech, data.noise, data.rooms, data.device)
        self._sampler = MixSampler(data.speech, data.noise, mix, np.random.default_rng(seed))
        self._rank = int(os.environ.get("RANK", "0"))
        self._ahead = Ahead(self._draw)

    def _draw(self, key: tuple[int, int]) -> list[MixSpec]:
        self._sampler.rng = np.random.default_rng([self.seed, self._rank, *key])
        return [self._sampler.sample(f"{key[0]}-{key[1]}-{row}") for row in range(self.batch)]

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        noisy, clean = self._renderer(self._ahead.take(step))
        total, terms = flow_loss(model, self.config, noisy, clean, generator, self.weights)
        return total, dict(terms)

    def outputs(self, model: nn.Module, steps: int) -> Tensor:
        """The validation mixtures enhanced in ``steps`` Euler steps, (V, S); the same prior noise each time."""
        device = self._data.device
        generator = torch.Generator().manual_seed(7)
        outs = []
        for part in self._data.noisy.split(16):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                outs.append(enhance(model, self.config, part, steps, "euler", generator=generator))
        return torch.cat(outs)

    def validate(self, model: nn.Module) -> dict[str, float]:
        noisy, clean = self._data.noisy, self._data.clean
        level = level_of(noisy)
        before = disturbance(noisy, clean).score()
        scores: dict[str, float] = {}
        for steps in (1, 2, 4):
            out = self.outputs(model, steps)
            terms = waveform_terms(out / level, clean / level)
            scores[f"si_sdr_gain_{steps}"] = float((_si_sdr(out, clean) - _si_sdr(noisy, clean)).mean())
            scores[f"spectra_{steps}"] = float(terms["spectra"].mean())
            scores[f"loudness_mos_gain_{steps}"] = float((disturbance(out, clean).score() - before).mean())
        return scores

    def pesq_gain(self, model: nn.Module, steps: int, clips: int) -> float:
        """Mean gain in PESQ-WB over the first ``clips`` validation mixtures; ones without a score do not count."""
        with torch.no_grad():
            out = self.outputs(model, steps)
        rows = [x[:clips].float().cpu().numpy() for x in (out, self._data.noisy, self._data.clean)]
        gains = [pesq_wb(o, c) - pesq_wb(n, c) for o, n, c in zip(*rows, strict=True)]
        heard = [gain for gain in gains if math.isfinite(gain)]
        return sum(heard) / len(heard) if heard else math.nan


def _si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    scale = (estimate * reference).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    target = scale * reference
    return 10 * torch.log10(target.square().sum(-1) / (estimate - target).square().sum(-1))


@matmul_precision("high")
def train_enhance(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str = "base",
    seed: int = 0,
    batch: int = 32,
    seconds: float = 4.0,
    rirs: int = 2000,
    lr: float = 8e-4,
    prior: Literal["noisy", "gaussian"] | None = None,
    start: str | None = None,
    compile: bool = False,
    validation_clips: int = 64,
    loss: LossWeights | Mapping[str, float] = LossWeights(),  # noqa: B008
    final_lr_ratio: float = 0.02,
    warmup_steps: int = 500,
    ema_decay: float = 0.999,
    validate_every: int = 1000,
    pesq_clips: int = 0,
    rooms_folder: str | None = None,
    data: EnhanceData | None = None,
) -> TrainResult:
    """Train the enhancer and leave float16 weights as ``out/export.safetensors`` with their configuration.

    Args:
        corpus: folders made by ``allears data prepare`` or ``allears data pack``.
        preset: a size of :data:`PRESETS`.
        batch, seconds: clips a step, and their length.
        rirs: simulated rooms for training.
        prior: overrides the preset's: ``noisy`` or ``gaussian``.
        start: weights to start from, a path stem.
        loss: weights of the terms; those that a mapping does not name keep their default.
        final_lr_ratio, warmup_steps, ema_decay, validate_every: see :class:`allears.train.TrainConfig`.
        pesq_clips: at the end, PESQ-WB of so many validation clips (needs the package ``pesq``).
        rooms_folder: keep the simulated rooms here for the next run.
        data: what :func:`load_data` gave, in place of ``corpus``, ``rirs``, ``validation_clips`` and ``rooms_folder``.

    Raises:
        ValueError: the preset, or a weight of the loss, is unknown.
        MissingDependencyError: ``pesq_clips`` is given and ``pesq`` is not installed.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
    config = PRESETS[preset] if prior is None else replace(PRESETS[preset], prior=prior)
    weights = loss if isinstance(loss, LossWeights) else from_dict(LossWeights, dict(loss), "loss")
    if pesq_clips:
        require("pesq", "eval", "PESQ-WB of the validation clips")
    where = resolve_device(device)
    if data is None:
        data = load_data(corpus, where, rirs, seed, validation_clips, rooms_folder)
    mix = replace(TRAIN_MIX, seconds=seconds, rirs=data.room_count)
    torch.manual_seed(seed)
    net = EnhanceNet(config)
    before = None
    if start is not None:
        tensors, origin = load_weights(start)
        net.load_state_dict(tensors)
        before = origin.get("training")
    net = net.to(device=where).to(memory_format=torch.channels_last)  # type: ignore
    objective = EnhanceObjective(config, data, mix, batch, seed, weights)
    precision = "bf16" if where.type == "cuda" else "fp32"
    settings = TrainConfig(
        out=out,
        steps=steps or 100_000,
        minutes=minutes,
        lr=lr,
        seed=seed,
        compile=compile,
        device=device,
        precision=precision,
        final_lr_ratio=final_lr_ratio,
        warmup_steps=warmup_steps,
        ema_decay=ema_decay,
        validate_every=validate_every,
    )
    result = train(net, objective, settings)
    if pesq_clips and result.stop != "signal":
        gain = objective.pesq_gain(net, config.steps, pesq_clips)
        result = replace(result, metrics={**result.metrics, f"pesq_wb_gain_{config.steps}": gain})
    record = {
        "model": "enhance",
        "config": to_dict(config),
        "training": {
            "recipe": "enhance",
            "started_from": before,
            "preset": preset,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "clip_seconds": seconds,
            "rooms": data.room_count,
            "lr": lr,
            "final_lr_ratio": final_lr_ratio,
            "warmup_steps": warmup_steps,
            "ema_decay": ema_decay,
            "seed": seed,
            "loss": to_dict(weights),
            "mix": to_dict(mix),
            "speech_hours": round(float(data.speech.lengths.sum()) / 16_000 / 3600, 2),
            "speakers": len(data.speech.speakers()),
            "noise_hours": round(float(data.noise.lengths.sum()) / 16_000 / 3600, 2),
            "licences": sorted({item.licence for item in (*data.speech.items, *data.noise.items)}),
            "packages": sorted({item.package for item in (*data.speech.items, *data.noise.items)}),
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in net.state_dict().items()}, record)
    return result
