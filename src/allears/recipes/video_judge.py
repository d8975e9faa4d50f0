"""The judge of video models: a small classifier, trained on the small world, for the Frechet distance, and all scores
of a model together.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from allears.core.device import resolve_device
from allears.core.weights import check_keys, load_weights, save_weights
from allears.data.world import WorldSpec, draw_spec, draw_specs
from allears.data.world_check import Check, check_videos, consistency_db, summary
from allears.data.world_features import WorldClassifier, frechet_distance, targets
from allears.data.world_layout import Layout, lay_out
from allears.data.world_render import FRAMES, SIZE_PX, render
from allears.train import TrainConfig, TrainResult, train
from allears.train.ahead import Ahead

_VALIDATED = 64  # scenes
_HELD_OUT = 0.15  # of the scenes that are drawn: nearly their share in the world


def draw_any(rng: np.random.Generator, count: int) -> list[WorldSpec]:
    """Specs of both splits. A judge that never saw the held-out shapes of a colour and a motion would learn that they
    do not exist, and call them something else in the very videos that are to be judged."""
    return [draw_spec(rng, "test" if rng.random() < _HELD_OUT else "train") for _ in range(count)]


class JudgeObjective:
    """Tell from a video what was painted, of both splits; validates on other specs of the held-out one."""

    def __init__(self, batch: int, seed: int, device: torch.device, frames: int, size_px: int) -> None:
        self.batch, self.seed, self.device, self.frames, self.size_px = batch, seed, device, frames, size_px
        self._rank = int(os.environ.get("RANK", "0"))
        self._ahead = Ahead(self._draw)

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        total, right = self._loss(model, *self._ahead.take(step))
        return total, dict(right)

    def validate(self, model: nn.Module) -> dict[str, float]:
        specs = draw_specs(_VALIDATED, 4, "test")
        total, right = self._loss(model, lay_out(specs, self.frames), targets(specs))
        return {"loss": float(total), **{name: float(value) for name, value in right.items()}}

    def _draw(self, key: tuple[int, int]) -> tuple[Layout, dict[str, Tensor]]:
        specs = draw_any(np.random.default_rng([self.seed, self._rank, *key]), self.batch)
        return lay_out(specs, self.frames), targets(specs)

    def _loss(self, model: nn.Module, layout: Layout, wanted: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            videos = render(layout, self.device, size_px=self.size_px)
        return model.loss(videos, {name: x.to(self.device) for name, x in wanted.items()})  # type: ignore[operator]


def train_judge(
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    batch: int = 32,
    lr: float = 1e-3,
    width: int = 16,
    frames: int = FRAMES,
    size_px: int = SIZE_PX,
) -> TrainResult:
    """Train a :class:`WorldClassifier` and leave it as ``out/export.safetensors``, float32.

    Args:
        minutes, steps: when to end; 1,500 steps where neither is given.
        batch: videos a step.
        width: of the classifier.
        frames, size_px: of the videos.
    """
    most = steps or (1500 if minutes is None else 100_000)
    where = resolve_device(device)
    torch.manual_seed(seed)
    net = WorldClassifier(width)
    settings = TrainConfig(
        out=out,
        steps=most,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        warmup_steps=min(100, most // 10),
        validate_every=500,
    )
    result = train(net, JudgeObjective(batch, seed, where, frames, size_px), settings)
    record = {"model": "video-judge", "width": width, "frames": frames, "size_px": size_px, "scores": result.metrics}
    save_weights(Path(out) / "export", net.state_dict(), record, dtype="float32")
    return result


def load_judge(stem: str | Path, device: torch.device | str = "cpu") -> WorldClassifier:
    """What :func:`train_judge` left at the path stem, in evaluation mode.

    Raises:
        WeightsError: it is missing, corrupt, or of another network.
    """
    tensors, record = load_weights(stem)
    net = WorldClassifier(record["width"])
    check_keys(net, tensors)
    net.load_state_dict(tensors)
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def features(judge: WorldClassifier, videos: Tensor, batch: int = 32) -> Tensor:
    """(N, D) float32 on the CPU, of videos (N, 3, T, H, W) in [0, 1]."""
    return torch.cat([judge(part).float().cpu() for part in videos.split(batch)])


def score_videos(
    videos: Tensor,
    specs: Sequence[WorldSpec],
    judge: WorldClassifier | None = None,
    real: Tensor | None = None,
    checks: Sequence[Check] | None = None,
) -> dict[str, float]:
    """All that is told of a model: per cent of what its captions ask for (see ``world_check.summary``), steadiness in
    dB, and the Frechet distance to true videos.

    Args:
        videos: (N, 3, T, H, W) in [0, 1], made for the specs' captions.
        specs: what was asked for.
        judge: gives the features; without it there is no ``frechet``.
        real: features of true videos (M, D); by default of those of the same specs with other seeds.
        checks: of the videos, where they were judged already.
    """
    scores = summary(check_videos(videos, specs) if checks is None else checks)
    scores["consistency_db"] = float(consistency_db(videos).mean())
    if judge is not None:
        if real is None:
            real = true_features(judge, specs, videos.device, videos.shape[2], videos.shape[-1])
        scores["frechet"] = frechet_distance(features(judge, videos), real)
    return scores


def true_features(
    judge: WorldClassifier, specs: Sequence[WorldSpec], device: torch.device, frames: int, size_px: int, copies: int = 4
) -> Tensor:
    """Features of painted videos of the specs, each with ``copies`` other seeds, (N * copies, D)."""
    found = []
    for copy in range(copies):
        again = [WorldSpec(s.things, s.relation, s.camera, s.background, s.seed + 1 + copy) for s in specs]
        for start in range(0, len(again), 64):
            found.append(features(judge, render(again[start : start + 64], device, frames, size_px)))
    return torch.cat(found)
