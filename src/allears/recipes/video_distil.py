"""Distillation of the video model to four steps or fewer by rCM (arXiv 2510.08431), with its guidance built in.

Shapes: B videos, T frames, H rows, W columns, M words.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import overridden, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import find_weights, read_sidecar, save_weights
from allears.data.world import WorldSpec, draw_specs
from allears.data.world_check import check_videos, consistency_db, summary
from allears.data.world_text import caption, encode
from allears.diffusion.angles import LogNormalTimes, ShiftedTimes
from allears.diffusion.rcm import RcmSettings, RcmStep
from allears.diffusion.tangent import tangent_error
from allears.models.video.config import MOST_FEW_STEPS, VideoConfig
from allears.models.video.loss import Velocity
from allears.models.video.pipeline import DEFAULT
from allears.models.video.sample import generate_few
from allears.recipes.rcm_objective import PUBLISHED_ADAMW, RcmObjective, StudentAndCritic
from allears.recipes.video_tune import DistillationKit, distillation_kit
from allears.train import TrainConfig, TrainResult, train

VIDEO_RCM = RcmSettings(
    warmup_steps=200,
    student_every=3,
    consistency_angles=LogNormalTimes(mean=1.6, std=1.4),
    score_angles=ShiftedTimes(shift=3.0),
)
"""How the video model is distilled unless told otherwise: most noise levels are high, since its flat colours are seen
through much noise, and few are low, where the field is the clean video's error over t; and the student has more of the
steps than published, since there are few."""

_WORST_TANGENT = 0.05


class VideoScores:
    """Scores of a student: samples of 4, 2 and 1 steps on held-out prompts, checked by program.

    Args:
        config: of the model.
        clips: prompts; 0 for no scores.
        device: of the student.
    """

    def __init__(self, config: VideoConfig, clips: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.specs = draw_specs(clips, 1, "test") if clips else []

    def __call__(self, net: nn.Module) -> dict[str, float]:
        """``prompt_score_4`` in per cent, ``consistency_db_4``, and so on for the other numbers of steps."""
        scores: dict[str, float] = {}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for steps in (4, 2, 1) if self.specs else ():
                videos = sample_few_specs(net, self.config, self.specs, self.device, steps)
                found = summary(check_videos(videos, self.specs))
                scores |= {f"{name}_{steps}": found[name] for name in ("prompt_score", "all_right", "motion")}
                scores[f"consistency_db_{steps}"] = float(consistency_db(videos).mean())
        return scores


@torch.no_grad()
def sample_few_specs(
    velocity: Velocity,
    config: VideoConfig,
    specs: list[WorldSpec],
    device: torch.device,
    steps: int | None = None,
    batch: int = 16,
) -> Tensor:
    """A video (3, T, H, W) in [0, 1] for the plain caption of each spec, by its seed: (N, 3, T, H, W) on ``device``.

    Args:
        velocity: a distilled network; see :func:`allears.models.video.sample.generate_few`.
        batch: videos at a time.
    """
    made = []
    for start in range(0, len(specs), batch):
        part = specs[start : start + batch]
        tokens = torch.tensor([encode(caption(spec), config.words, config.text_words) for spec in part], device=device)
        made.append(generate_few(velocity, config, tokens, [spec.seed for spec in part], steps).float())
    return torch.cat(made)


def check_tangent(kit: DistillationKit, device: torch.device) -> float:
    """Relative error of the student's forward-mode derivative against a difference, in float32.

    Raises:
        ValueError: it is above 5 %: some kernel on this device has no forward mode and cuts the derivative.
    """
    videos, tokens = kit.data(0)
    videos, tokens = videos[:2], tokens[:2]
    generator = torch.Generator(device).manual_seed(0)
    x, d_x = (torch.randn(videos.shape, generator=generator, device=device) for _ in range(2))
    t = torch.tensor([0.4, 0.9], device=device)[: len(videos)]
    with matmul_precision("highest"):
        error = tangent_error(kit.student, x, t, tokens, d_x, torch.full_like(t, 0.3), 1e-3)
    if not error < _WORST_TANGENT:
        raise ValueError(
            f"teacher: the derivative of the network is off by {error:.1%} on {device}; use attention with a forward "
            "mode (exact, dense), or rcm with derivative='finite'"
        )
    return error


@matmul_precision("high")
def distil_video(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str | None = None,
    seed: int = 0,
    *,
    teacher: str = DEFAULT,
    guidance: float | None = None,
    sampler_steps: int = 4,
    batch: int = 32,
    lr: float = 1e-4,
    rcm: RcmSettings | Mapping[str, Any] = VIDEO_RCM,
    ema_decay: float = 0.999,
    validate_every: int = 500,
    check_clips: int = 32,
    compile: bool = False,
) -> TrainResult:
    """Distil the video model; leaves the student as ``out/export.safetensors``, float16, and a run that can be resumed.

    Args:
        corpus: must be empty: the world is painted as it is needed.
        preset: must be left out: the size is that of the teacher.
        teacher: by the name of shipped weights or as a path stem; dense, since attention needs a forward mode.
        guidance: of the teacher, which becomes part of the student; by default the teacher's own.
        sampler_steps: steps that the export is meant for, 1 to 4.
        batch: videos a step; 32 of 4,096 tokens take some 40 GB.
        lr: highest learning rate, of student and critic.
        rcm: settings of the distillation; those that a mapping does not name are as in :data:`VIDEO_RCM`.
            ``score_weight=0`` leaves out score distillation and its critic (the DMD term).
        ema_decay, validate_every: see :class:`allears.train.TrainConfig`.
        check_clips: held-out prompts of each validation; 0 for none.
        compile: the blocks by ``torch.compile``, but for the derivative.

    Raises:
        ValueError: a setting is unknown or out of its range, a corpus or a preset is given, or the derivative of the
            teacher is wrong on this device.
        WeightsError: the teacher is missing or corrupt.
    """
    if preset is not None:
        raise ValueError(f"preset: {preset!r} given; a student has the size of its teacher, so choose by teacher")
    if corpus:
        raise ValueError(f"corpus: {corpus[0]!r} given, but this world is painted as it is needed; leave it out")
    if not 1 <= sampler_steps <= MOST_FEW_STEPS:
        raise ValueError(f"sampler_steps: {sampler_steps} given; the sampler takes 1 to {MOST_FEW_STEPS}")
    settings = overridden(VIDEO_RCM, rcm, "rcm")
    where = resolve_device(device)
    kit = distillation_kit(teacher, batch, device, seed, guidance, compile)
    error = check_tangent(kit, where) if settings.derivative != "finite" else None
    model = StudentAndCritic(kit.student, with_critic=settings.score_weight > 0)
    objective = RcmObjective(
        RcmStep(settings),
        kit.student,
        lambda net: net,
        lambda step, generator: kit.data(step),
        VideoScores(kit.config, check_clips, where),
        kit.teacher,
    )
    run = TrainConfig(
        out=out,
        steps=steps or 20_000,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        warmup_steps=50,
        ema_decay=ema_decay,
        validate_every=validate_every,
        **PUBLISHED_ADAMW,
    )
    result = train(model, objective, run)
    config = replace(kit.config, steps=sampler_steps, guidance=1.0, distilled=True)
    origin = read_sidecar(find_weights(teacher, "video"))
    record = {
        "model": "video",
        "config": to_dict(config),
        "training": {
            "recipe": "video-rcm",
            "started_from": origin.get("training"),
            "teacher": Path(teacher).name,
            "guidance": kit.config.guidance if guidance is None else guidance,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "lr": lr,
            "ema_decay": ema_decay,
            "seed": seed,
            "rcm": to_dict(settings),
            "tangent_error": error,
            "data": "painted by allears.data.world; no recordings",
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {n: x.cpu() for n, x in model.student.state_dict().items()}, record)
    return result
