"""Training of the video model on the small world, from nothing to weights."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import overridden, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import load_weights, save_weights
from allears.data.world import Split, WorldSpec, draw_specs
from allears.data.world_check import check_videos, consistency_db, summary
from allears.data.world_layout import lay_out
from allears.data.world_text import caption, encode
from allears.models.video.config import PRESETS, VideoConfig
from allears.models.video.loss import FlowLoss, Velocity, flow_loss
from allears.models.video.model import VideoNet, use_attention
from allears.models.video.sample import draw_noise, generate
from allears.ops.attention import AttentionSpec
from allears.recipes.video_data import Batch, WorldData, cut_clips, draw_batch, world_videos
from allears.recipes.video_stages import Stage, Stages, Way, first_steps, read_stages, time_stages
from allears.train import TrainConfig, TrainResult, train
from allears.train.checkpoint import checkpoint_paths, load_checkpoint
from allears.train.distributed import Workers

__all__ = ["VideoObjective", "WorldData", "draw_batch", "sample_specs", "train_video", "world_videos"]

_WHOLE = ("prompt_score", "all_right", "colour", "shape", "motion")
_PICTURES = ("colour", "shape", "background")
_CLOCK_EVERY = 10  # steps
_FEWEST_JUDGED = 8  # frames, by the checks
_WARM_STEP = 2**30  # draws of no step of training


class VideoObjective:
    """Rectified flow on the small world; validates by the loss on prompts of both splits, and by checking samples, of
    the clips of the stage it is in.

    Args:
        stages: what is shown when.
        check_clips: held-out prompts to sample and check at each validation; 0 for none.
        check_steps: of their sampler.
        clock: the share of the run that is over, the same in all processes, where stages go by time; asked now and
            then.
    """

    def __init__(
        self, stages: Stages, check_clips: int = 32, check_steps: int = 25, clock: Callable[[], float] | None = None
    ) -> None:
        self.stages, self.check_clips, self.check_steps, self.clock = stages, check_clips, check_steps, clock
        self._now, self._asked = 0, False

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        if self.clock is not None and (step % _CLOCK_EVERY == 0 or not self._asked):
            self.stages.tell(step, self.clock())
            self._asked = True
        self._now = self.stages.index(step)
        return self.loss_in(self._now, model, step, generator)

    def loss_in(
        self, index: int, model: nn.Module, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """:meth:`loss` of the stage with this index."""
        videos, tokens, places = self.stages.data[index](step)
        sample = (videos, torch.full_like(videos[:, 0, 0, 0, 0], 0.5), tokens)
        self.stages.use(model, index, sample if places is None else (*sample, places))
        total, parts = flow_loss(model, videos, tokens, self.stages.losses[index], generator, places)
        return total, dict(parts)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """``frames`` says of which clips. Of parts of clips single pictures are judged, not motion and camera."""
        stage, config, device = self.stages.stages[self._now], self.stages.config, self.stages.device
        scores: dict[str, float] = {"frames": stage.frames}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for split in ("train", "test"):
                scores[f"loss_{split}"] = self._loss_on(model, split)
            if not self.check_clips:
                return scores
            specs = draw_specs(self.check_clips, 1, "test")
            whole = stage.part.cuts(config) == 1
            places = None if whole else stage.part.places(config, torch.tensor(0)).to(device)
            videos = sample_specs(model, config, specs, device, self.check_steps, None, stage.frames, places=places)
        kinds = (
            ("prompt_score", "all_right", "colour", "shape", "motion") if whole else ("colour", "shape", "background")
        )
        found = summary(check_videos(videos.repeat_interleave(-(-_FEWEST_JUDGED // stage.frames), 2), specs))
        scores |= {name: found[name] for name in kinds if name in found}
        return scores | ({"consistency_db": float(consistency_db(videos).mean())} if whole else {})

    def _loss_on(self, model: nn.Module, split: Split) -> float:
        config, device, part = self.stages.config, self.stages.device, self.stages.stages[self._now].part
        specs = draw_specs(16, 2, split)
        tokens = torch.tensor([encode(caption(spec), config.words, config.text_words) for spec in specs])
        if part.cuts(config) == 1:
            source = Batch(tokens, lay_out(specs, part.frames))
            batch = (*world_videos(source, config, device), None)
        else:
            first = torch.arange(16) % (config.frames // part.frames)
            batch = cut_clips(Batch(tokens, lay_out(specs, config.frames)), config, part, first, device)
        options = replace(self.stages.losses[self._now], drop_caption=0.0)
        generator, losses = torch.Generator().manual_seed(3), []
        for start in range(0, len(batch[0]), 8):
            videos, words, places = (None if x is None else x[start : start + 8] for x in batch)
            losses.append(flow_loss(model, videos, words, options, generator, places)[0].detach())  # type: ignore
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
    places: Tensor | None = None,
) -> Tensor:
    """A video (3, T, H, W) in [0, 1] for the plain caption of each spec, by its seed: (N, 3, T, H, W) on ``device``.

    Args:
        velocity, steps, guidance: see :func:`allears.models.video.sample.generate`.
        frames: of the videos, where they are not the configuration's.
        batch: videos at a time.
        places: of the frames of tokens in time, (N,), for a ``velocity`` that is a :class:`VideoNet`; see there.
    """
    config = config.with_frames(frames)
    velocity = velocity if places is None else partial(velocity, places=places)  # type: ignore[call-arg]
    made = []
    for start in range(0, len(specs), batch):
        part = specs[start : start + batch]
        tokens = torch.tensor([encode(caption(spec), config.words, config.text_words) for spec in part], device=device)
        noise = draw_noise(config, [spec.seed for spec in part]).to(device)
        made.append(generate(velocity, config, tokens, noise, steps, guidance).float())
    return torch.cat(made)


def prepare(
    net: VideoNet, objective: VideoObjective, settings: TrainConfig, steps: int | None, workers: Workers
) -> TrainConfig:
    """Compile the stages that are to be compiled and say when each begins; gives the settings with the time left.

    Args:
        steps: in all, where the run is to be shared out by these; else it is by time.
    """
    shown, begun = objective.stages, time.monotonic()
    if "compile" in shown.ways:
        net.to(workers.device)
        generator = torch.Generator(workers.device).manual_seed(settings.seed)

        def step(index: int, number: int) -> None:
            with torch.autocast(workers.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                total, _ = objective.loss_in(index, net, _WARM_STEP + number, generator)
            total.backward()

        time_stages(shown, net, step, workers.device)
    (took_s,) = workers.highest(time.monotonic() - begun)
    if steps is not None:
        shown.begins = first_steps(shown.stages, steps)
    if settings.minutes is None:
        return settings
    settings = replace(settings, minutes=max(settings.minutes - took_s / 60, 1e-3))
    if steps is None and len(shown.stages) > 1:
        paths = checkpoint_paths(Path(settings.out))
        earlier_s = load_checkpoint(paths[-1]).meta["elapsed_s"] if paths else 0.0
        begun, whole_s = time.monotonic() - earlier_s, 60 * (settings.minutes or 0.0)
        objective.clock = lambda: workers.highest(time.monotonic() - begun)[0] / whole_s
    return settings


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
    stages: Sequence[Any] = (),
    start: str | None = None,
    attention: AttentionSpec | Mapping[str, Any] = AttentionSpec(),  # noqa: B008
    loss: FlowLoss | Mapping[str, Any] = FlowLoss(),  # noqa: B008
    compile: bool = False,
    graphs: bool = False,
    processes: int = 0,
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
        stages: in place of ``batch`` and ``frames``: what is shown first, next, and last, as
            :class:`~allears.recipes.video_stages.Stage` or (frames, share, batch); see there.
        start: weights to start from, a path stem.
        attention: over space and time, whole or as the fields that differ, such as ``{"kernel": "sdpa-cudnn"}``; the
            weights do not depend on it.
        loss: how times and captions are drawn, whole or as the fields that differ.
        compile, graphs: the blocks by ``torch.compile``, or CUDA graphs of the passes, one of them at most; in stages
            that name no way of their own.
        processes: that draw scenes and captions, which is a thread's work otherwise: with a GPU at few frames it takes
            more time than the step. A script that asks for them must guard its main part.
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
    use_attention(net, overridden(AttentionSpec(), attention, "attention"))
    if start is not None:
        tensors, origin = load_weights(start)
        net.load_state_dict(tensors)
        before = origin.get("training", {"steps": origin.get("step")})
    plan = read_stages(stages) or (Stage(frames or config.frames, 1.0, batch, None, False, options.mean),)
    way: Way = "compile" if compile else "graphs" if graphs else "eager"
    shown = Stages(config, plan, options, seed, where, way, processes)
    objective = VideoObjective(shown, check_clips, check_steps)
    settings = TrainConfig(
        out=out,
        steps=steps or 100_000,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        grad_clip=grad_clip,
        final_lr_ratio=final_lr_ratio,
        warmup_steps=warmup_steps,
        ema_decay=ema_decay,
        validate_every=validate_every,
        accumulate=accumulate,
    )
    try:
        with Workers(device) as workers:
            settings = prepare(net, objective, settings, steps, workers)
            result = train(net, objective, settings)
    finally:
        shown.close()
    if not workers.first:
        return result
    record = {
        "model": "video",
        "config": to_dict(config),
        "training": {
            "recipe": "video",
            "started_from": before,
            "preset": preset,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": plan[-1].batch * accumulate,
            "frames": plan[-1].frames,
            "stages": [to_dict(stage) for stage in plan],
            "first_steps": shown.begins,
            "attention": net.attentions()[0].spec.kernel,
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
