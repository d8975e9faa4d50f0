"""Training of the video model on the small world, from nothing to weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from allears.core.config import overridden, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import load_weights, save_weights
from allears.data.world import Split, WorldSpec, draw_spec, draw_specs
from allears.data.world_check import check_videos, consistency_db, summary
from allears.data.world_layout import Layout, lay_out
from allears.data.world_render import render
from allears.data.world_text import caption, encode
from allears.models.video.config import PRESETS, VideoConfig
from allears.models.video.loss import FlowLoss, Velocity, flow_loss
from allears.models.video.model import VideoNet
from allears.models.video.sample import draw_noise, generate
from allears.train import TrainConfig, TrainResult, train
from allears.train.ahead import Ahead
from allears.train.graphs import graphed


@dataclass(frozen=True)
class Batch:
    """Captions in numbers (B, M) int64, and what there is to be seen, not painted yet; on the CPU."""

    tokens: Tensor
    layout: Layout


def draw_batch(config: VideoConfig, batch: int, key: list[int], frames: int | None = None) -> Batch:
    """Specs of the training split with a caption each; the same ``key`` gives the same ones."""
    rng = np.random.default_rng(key)
    specs = [draw_spec(rng) for _ in range(batch)]
    tokens = [encode(caption(spec, rng), config.words, config.text_words) for spec in specs]
    return Batch(torch.tensor(tokens), lay_out(specs, frames or config.frames))


def world_videos(source: Batch, config: VideoConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch painted: videos (B, 3, T, H, W) in [-1, 1] and captions (B, M), on ``device``."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return 2 * render(source.layout, device, size_px=config.size_px) - 1, source.tokens.to(device)


class WorldData:
    """Batches of painted videos, seeded by the step; those of the next step are drawn meanwhile.

    Args:
        frames: of the clips; ``None``: the configuration's.
    """

    def __init__(
        self, config: VideoConfig, batch: int, seed: int, device: torch.device, frames: int | None = None
    ) -> None:
        self.config, self.batch, self.seed, self.device, self.frames = config, batch, seed, device, frames
        self._rank = int(os.environ.get("RANK", "0"))
        self._ahead = Ahead(self._draw)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Videos and captions, see :func:`world_videos`; a second call for the same step gives others."""
        return world_videos(self._ahead.take(step), self.config, self.device)

    def _draw(self, key: tuple[int, int]) -> Batch:
        return draw_batch(self.config, self.batch, [self.seed, self._rank, *key], self.frames)


class VideoObjective:
    """Rectified flow on the small world; validates by the loss on prompts of both splits, and by checking samples.

    Args:
        data: batches; its configuration is the model's.
        options: of the loss.
        check_clips: held-out prompts to sample and check at each validation; 0 for none.
        check_steps: of their sampler.
        graphs: capture the network's passes as CUDA graphs at the first step.
    """

    def __init__(
        self, data: WorldData, options: FlowLoss, check_clips: int = 32, check_steps: int = 25, graphs: bool = False
    ) -> None:
        self.data, self.options = data, options
        self.check_clips, self.check_steps, self._graphs = check_clips, check_steps, graphs

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        videos, tokens = self.data(step)
        if self._graphs:
            graphed(model, videos, torch.full_like(videos[:, 0, 0, 0, 0], 0.5), tokens)
            self._graphs = False
        total, parts = flow_loss(model, videos, tokens, self.options, generator)
        return total, dict(parts)

    def validate(self, model: nn.Module) -> dict[str, float]:
        scores: dict[str, float] = {}
        device = self.data.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for split in ("train", "test"):
                scores[f"loss_{split}"] = self._loss_on(model, split)
            if self.check_clips:
                specs = draw_specs(self.check_clips, 1, "test")
                videos = sample_specs(model, self.data.config, specs, device, self.check_steps, frames=self.data.frames)
                found = summary(check_videos(videos, specs))
                scores |= {name: found[name] for name in ("prompt_score", "all_right", "colour", "shape", "motion")}
                scores["consistency_db"] = float(consistency_db(videos).mean())
        return scores

    def _loss_on(self, model: nn.Module, split: Split) -> float:
        config, device = self.data.config, self.data.device
        specs = draw_specs(16, 2, split)
        tokens = torch.tensor([encode(caption(spec), config.words, config.text_words) for spec in specs])
        source = Batch(tokens, lay_out(specs, self.data.frames or config.frames))
        videos, tokens = world_videos(source, config, device)
        generator = torch.Generator().manual_seed(3)
        losses = [
            flow_loss(model, part, words, replace(self.options, drop_caption=0.0), generator)[0].detach()
            for part, words in zip(videos.split(8), tokens.split(8), strict=True)
        ]
        return float(torch.stack(losses).mean())


@torch.no_grad()
def sample_specs(
    velocity: Velocity,
    config: VideoConfig,
    specs: list[WorldSpec],
    device: torch.device,
    steps: int | None = None,
    guidance: float | None = None,
    frames: int | None = None,
    batch: int = 16,
) -> Tensor:
    """A video (3, T, H, W) in [0, 1] for the plain caption of each spec, by its seed: (N, 3, T, H, W) on ``device``.

    Args:
        velocity, steps, guidance: see :func:`allears.models.video.sample.generate`.
        frames: of the videos, where they are not the configuration's.
        batch: videos at a time.
    """
    config = config if frames is None else replace(config, frames=frames)
    made = []
    for start in range(0, len(specs), batch):
        part = specs[start : start + batch]
        tokens = torch.tensor([encode(caption(spec), config.words, config.text_words) for spec in part], device=device)
        noise = draw_noise(config, [spec.seed for spec in part]).to(device)
        made.append(generate(velocity, config, tokens, noise, steps, guidance).float())
    return torch.cat(made)


@matmul_precision("high")
def train_video(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str = "base",
    seed: int = 0,
    batch: int = 64,
    lr: float = 1e-3,
    frames: int | None = None,
    start: str | None = None,
    loss: FlowLoss | Mapping[str, Any] = FlowLoss(),  # noqa: B008
    compile: bool = False,
    graphs: bool = False,
    check_clips: int = 32,
    check_steps: int = 25,
    warmup_steps: int = 200,
    final_lr_ratio: float = 0.02,
    ema_decay: float = 0.999,
    grad_clip: float = 1.0,
    validate_every: int = 1000,
    accumulate: int = 1,
) -> TrainResult:
    """Train a video model on the small world and leave float16 weights as ``out/export.safetensors``.

    Args:
        corpus: must be empty: the world is painted as it is needed.
        preset: a size of :data:`allears.models.video.PRESETS`.
        batch: videos a step.
        frames: of the clips, fewer than the preset's for a cheap first part: each clip is shown whole, at a lower frame
            rate, and the weights go on from there with ``start``.
        start: weights to start from, a path stem.
        loss: how times and captions are drawn, whole or as the fields that differ.
        compile, graphs: ``torch.compile``, or CUDA graphs of the passes; one of them at most.
        check_clips, check_steps: see :class:`VideoObjective`.
        warmup_steps, final_lr_ratio, ema_decay, grad_clip, validate_every, accumulate: see
            :class:`allears.train.TrainConfig`.

    Raises:
        ValueError: the preset is unknown, a corpus is given, or a setting is out of its range.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
    if corpus:
        raise ValueError(f"corpus: {corpus[0]!r} given, but this world is painted as it is needed; leave it out")
    if compile and graphs:
        raise ValueError("compile, graphs: both given; choose one")
    config = PRESETS[preset]
    options = overridden(FlowLoss(), loss, "loss")
    where = resolve_device(device)
    torch.manual_seed(seed)
    net, before = VideoNet(config), None
    if start is not None:
        tensors, origin = load_weights(start)
        net.load_state_dict(tensors)
        before = origin.get("training", {"steps": origin.get("step")})
    data = WorldData(config, batch, seed, where, frames)
    objective = VideoObjective(data, options, check_clips, check_steps, graphs)
    settings = TrainConfig(
        out=out,
        steps=steps or 100_000,
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
        accumulate=accumulate,
    )
    result = train(net, objective, settings)
    record = {
        "model": "video",
        "config": to_dict(config),
        "training": {
            "recipe": "video",
            "started_from": before,
            "preset": preset,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch * accumulate,
            "frames": frames or config.frames,
            "lr": lr,
            "final_lr_ratio": final_lr_ratio,
            "warmup_steps": warmup_steps,
            "ema_decay": ema_decay,
            "grad_clip": grad_clip,
            "seed": seed,
            "loss": to_dict(options),
            "data": "painted by allears.data.world; no recordings",
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in net.state_dict().items()}, record)
    return result
