"""Distillation of the flow-matching enhancer to one or two steps by rCM (arXiv 2510.08431).

Shapes: B clips, S samples, T frames, F bins, V validation clips.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.audio.metrics.si_sdr import si_sdr_db
from allears.core.config import overridden, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import check_keys, load_pretrained, save_weights
from allears.diffusion.few_steps import few_step_angles, sample_few
from allears.diffusion.path import LinearPath
from allears.diffusion.rcm import RcmSettings, RcmStep
from allears.diffusion.trigflow import Velocity, from_clean
from allears.models.enhance.config import EnhanceConfig
from allears.models.enhance.loss import LossWeights
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.pipeline import DEFAULT
from allears.models.enhance.state import level_of, to_state, to_waveform
from allears.recipes.enhance import EnhanceObjective
from allears.recipes.enhance_data import TRAIN_MIX, EnhanceData, load_data
from allears.recipes.rcm_objective import PUBLISHED_ADAMW, RcmObjective, StudentAndCritic
from allears.train import TrainConfig, TrainResult, train

ENHANCER_RCM = RcmSettings(warmup_steps=500)
"""How the enhancer is distilled unless told otherwise."""


def prior_mean(y: Tensor, config: EnhanceConfig) -> Tensor:
    """The mean of the flow's prior for noisy states y (B, T, F, 2)."""
    return y if config.prior == "noisy" else torch.zeros_like(y)


def as_velocity(net: nn.Module, config: EnhanceConfig) -> Velocity:
    """The enhancer as rectified flow from a standard normal: its state x is mean + sigma u, and u flows.

    The condition is the noisy state y (B, T, F, 2).
    """

    def clean(u: Tensor, t: Tensor, y: Any) -> Tensor:
        mean = prior_mean(y, config)
        return (net(mean + config.sigma * u, y, t) - mean) / config.sigma

    return from_clean(clean)


def enhance_few(net: nn.Module, config: EnhanceConfig, noisy: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Noisy waveforms (B, S) to clean ones (B, S), with fresh noise between ``steps`` calls of a distilled network."""
    level = level_of(noisy)
    y = to_state(noisy / level, config)
    noise = LinearPath(config.sigma).noise(y, generator)
    angles = few_step_angles(steps, math.inf)
    u = sample_few(as_velocity(net, config), noise, y, angles, "sde", generator)
    return to_waveform(prior_mean(y, config) + config.sigma * u, noisy.shape[-1], config) * level


class EnhancerBatches(EnhanceObjective):
    """The enhancer's mixtures as clean states u (B, T, F, 2) with the noisy state as condition, and its validation."""

    def draw(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        noisy, clean = self._renderer(self._ahead.take(step))
        level = level_of(noisy)
        y, x0 = to_state(noisy / level, self.config), to_state(clean / level, self.config)
        return (x0 - prior_mean(y, self.config)) / self.config.sigma, y

    def score(self, net: nn.Module) -> dict[str, float]:
        """What the enhancer's own training reports (Euler steps), and two steps with fresh noise between them."""
        scores = self.validate(net)
        noisy, clean = self._data.noisy, self._data.clean
        generator = torch.Generator().manual_seed(7)
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=noisy.device.type == "cuda"):
            outs = [enhance_few(net, self.config, part, 2, generator) for part in noisy.split(16)]
        gain = si_sdr_db(torch.cat(outs), clean) - si_sdr_db(noisy, clean)
        return {**scores, "si_sdr_gain_2_renoised": float(gain.mean())}


@matmul_precision("high")
def distil_enhancer(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str | None = None,
    seed: int = 0,
    *,
    start: str = DEFAULT,
    sampler_steps: int = 1,
    batch: int = 16,
    seconds: float = 4.0,
    rirs: int = 2000,
    lr: float = 2e-5,
    rcm: RcmSettings | Mapping[str, Any] = ENHANCER_RCM,
    ema_decay: float = 0.999,
    validate_every: int = 500,
    validation_clips: int = 64,
    rooms_folder: str | None = None,
    data: EnhanceData | None = None,
) -> TrainResult:
    """Distil the enhancer; leaves the student as ``out/export.safetensors``, float16, and a run that can be resumed.

    Args:
        corpus: folders made by ``allears data prepare`` or ``allears data pack``.
        preset: must be left out: the size is that of ``start``.
        start: the teacher, by the name of shipped weights or as a path stem.
        sampler_steps: steps that the export is meant for, 1 or 2.
        batch, seconds: clips a step, and their length.
        rcm: settings of the distillation; those that a mapping does not name are as in :data:`ENHANCER_RCM`.
        lr: highest learning rate, of student and critic.
        ema_decay, validate_every: see :class:`allears.train.TrainConfig`.
        rirs, validation_clips, rooms_folder, data: see :func:`allears.recipes.enhance.train_enhance`.

    Raises:
        ValueError: a setting is unknown or out of its range, or a preset is given.
        WeightsError: the teacher is missing or corrupt.
    """
    if preset is not None:
        raise ValueError(f"preset: {preset!r} given; a student has the size of its teacher, so choose by start")
    if sampler_steps not in (1, 2):
        raise ValueError(f"sampler_steps: {sampler_steps} given; the enhancer is distilled to 1 or 2")
    settings = overridden(ENHANCER_RCM, rcm, "rcm")
    where = resolve_device(device)
    found = load_pretrained(start, "enhance", EnhanceConfig)
    config = found.config
    teacher = EnhanceNet(config)
    check_keys(teacher, found.tensors)
    teacher.load_state_dict(found.tensors)
    teacher = teacher.to(where)
    if data is None:
        data = load_data(corpus, where, rirs, seed, validation_clips, rooms_folder)
    mix = replace(TRAIN_MIX, seconds=seconds, rirs=data.room_count)
    batches = EnhancerBatches(config, data, mix, batch, seed, LossWeights())
    model = StudentAndCritic(teacher, with_critic=settings.score_weight > 0)
    objective = RcmObjective(
        RcmStep(settings), teacher, lambda net: as_velocity(net, config), batches.draw, batches.score
    )
    run = TrainConfig(
        out=out,
        steps=steps or 20_000,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        warmup_steps=100,
        ema_decay=ema_decay,
        validate_every=validate_every,
        **PUBLISHED_ADAMW,
    )
    result = train(model, objective, run)
    record = {
        "model": "enhance",
        "config": to_dict(replace(config, steps=sampler_steps, solver="euler")),
        "training": {
            "recipe": "rcm",
            "started_from": found.record.get("training"),
            "teacher": found.name,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "clip_seconds": seconds,
            "lr": lr,
            "ema_decay": ema_decay,
            "seed": seed,
            "rcm": to_dict(settings),
        },
        "validation": result.metrics,
    }
    student = {name: tensor.cpu() for name, tensor in model.student.state_dict().items()}
    save_weights(Path(out) / "export", student, record)
    return result
