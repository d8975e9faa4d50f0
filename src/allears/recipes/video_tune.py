"""What is built on a trained video model: sparse-linear attention fitted and tuned, and what distillation takes.

Stage 1 of SLA2 (arXiv 2602.12675, section 5) fits routers to recorded queries, keys and values; stage 2 tunes the model
with them, here to match the dense one.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import to_dict
from allears.core.device import resolve_device
from allears.core.weights import load_pretrained, read_sidecar, save_weights
from allears.data.world import Split, draw_specs
from allears.data.world_text import caption, encode
from allears.diffusion.path import LinearPath
from allears.models.video.build import SparseLayers, load_net
from allears.models.video.config import VideoConfig
from allears.models.video.loss import FlowLoss, Velocity, draw_times
from allears.models.video.model import VideoNet, compiled_blocks
from allears.models.video.sample import guided
from allears.ops.attention.sparse_linear.options import Backward, Precision
from allears.recipes.sparse_tune import MatchDense, tune_sparse
from allears.recipes.video import WorldData
from allears.train import TrainConfig, TrainResult
from allears.turbo.sparse import SparseSettings, sparsify


def load_teacher(name_or_stem: str | Path, device: str | torch.device = "auto") -> VideoNet:
    """A trained model in evaluation mode, on ``device``, whose weights ask for no gradient; with the sparse layers that
    it may have.

    Raises:
        WeightsError: nothing is found there, or it is of another model.
    """
    net = load_net(load_pretrained(name_or_stem, "video", VideoConfig))
    return net.to(resolve_device(device)).eval().requires_grad_(False)


@dataclass(frozen=True)
class NoisyVideos:
    """Draws what a model is called with in training, ``(x_t, t, tokens)``, seeded by the step.

    Args:
        data: painted videos.
        options: how flow times are drawn, and how many captions are left out, which guidance needs too.
    """

    data: WorldData
    options: FlowLoss = field(default_factory=FlowLoss)

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        videos, tokens = self.data(step)
        t = draw_times(len(videos), self.options, generator).to(videos.device)
        dropped = torch.rand(len(videos), generator=generator, device=generator.device).to(videos.device)
        tokens = torch.where(dropped[:, None] < self.options.drop_caption, torch.zeros_like(tokens), tokens)
        path = LinearPath(1.0)
        return path.sample(videos, torch.zeros_like(videos), t, path.noise(videos, generator)), t, tokens


def times_of(config: VideoConfig) -> FlowLoss:
    """The flow times at which a model is called: those of training, or of distilled weights those of few steps, which
    are higher, always with a caption."""
    return FlowLoss(mean=2.0, deviation=1.4, drop_caption=0.0) if config.distilled else FlowLoss()


def calibration(net: VideoNet, batches: int, batch: int, seed: int = 100) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs to record a model's attention on, see :func:`allears.turbo.sparse.record`; not training's videos."""
    device = next(net.parameters()).device
    data, generator = WorldData(net.config, batch, seed, device), torch.Generator(device)
    draw = NoisyVideos(data, times_of(net.config))
    generator.manual_seed(seed)
    for step in range(batches):
        yield draw(step, generator)


def sparsify_video(
    teacher: str,
    out: str,
    settings: SparseSettings | None = None,
    device: str = "auto",
    batches: int = 8,
    batch: int = 4,
) -> list[Any]:
    """Stage 1: fit sparse-linear attention to each layer of ``teacher``, and leave it at the path stem ``out``.

    Layers too short for blocks (those of the text) stay dense, as the report of each says.
    """
    net = load_teacher(teacher, device)
    kind = next(net.parameters()).device.type

    def call(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return model(*inputs)

    return sparsify(net, list(calibration(net, batches, batch)), out, settings, call=call)


def tune_video(
    out: str,
    teacher: str,
    sparse: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    seed: int = 0,
    batch: int = 16,
    lr: float = 1e-4,
    precision: Precision = "exact",
    backward: Backward = "drop_in",
    compile: bool = False,
) -> TrainResult:
    """Stage 2: tune the model with the sparse layers of ``sparse`` to give what the dense ``teacher`` gives.

    ``precision="int8_fp8"`` trains for 8-bit kernels (quantisation-aware). ``teacher`` may be distilled to few steps;
    the tuned model is so too then. ``out/ema`` holds weights and cores, for
    :func:`allears.recipes.sparse_tune.load_tuned`; ``out/export`` the same in float16, for
    :class:`allears.models.video.VideoGenerator`. ``compile`` compiles the blocks of both.
    """
    if all(layer["keep"] is None for layer in read_sidecar(sparse)["layers"].values()):
        raise ValueError(f"sparse: all layers of {sparse!r} are dense; fit with a higher max_error")
    dense = load_teacher(teacher, device)
    where = next(dense.parameters()).device
    if compile:
        dense.train()  # nothing in it but the choice of blocks depends on the mode
        dense.training_block = compiled_blocks()
    model = copy.deepcopy(dense).requires_grad_(True)
    held_out = [tuple(x[:4] for x in inputs) for inputs in calibration(dense, 2, 4, seed=101)]
    draw = NoisyVideos(WorldData(dense.config, batch, seed + 1, where), times_of(dense.config))
    settings = TrainConfig(
        out=out,
        steps=steps or 500,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        warmup_steps=min(20, (steps or 500) // 10),
        log_every=10,
        validate_every=100,
    )
    result, _ = tune_sparse(model, sparse, MatchDense(dense, draw, held_out), settings, precision, backward)
    layers = SparseLayers.of(model)
    assert layers is not None
    record = {
        "model": "video",
        "config": to_dict(dense.config),
        "sparse": layers.to_record(),
        "training": {
            "recipe": "video_tune",
            "teacher": Path(teacher).name,
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "lr": lr,
            "seed": seed,
            "precision": precision,
            "backward": backward,
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in model.state_dict().items()}, record)
    return result


@dataclass(frozen=True)
class DistillationKit:
    """What few-step distillation takes, whatever its method.

    Args:
        config: of the model.
        teacher: (x_t, t, tokens) to the velocity with guidance.
        student: the network that learns, a copy of the teacher's; it is a velocity of the same signature.
        data: step to videos (B, 3, T, H, W) in [-1, 1] and captions (B, M).
    """

    config: VideoConfig
    teacher: Velocity
    student: VideoNet
    data: WorldData


def distillation_kit(
    teacher: str,
    batch: int,
    device: str = "auto",
    seed: int = 0,
    guidance: float | None = None,
    compile: bool = False,
) -> DistillationKit:
    """Teacher, student and data for distillation; guidance, by default the configuration's, becomes part of the
    teacher. ``compile`` compiles the blocks of both, where they train or teach."""
    net = load_teacher(teacher, device)
    if compile:
        net.train()
        net.training_block = compiled_blocks()
    velocity = guided(net, net.config.guidance if guidance is None else guidance)
    student = copy.deepcopy(net).train().requires_grad_(True)
    return DistillationKit(
        net.config, velocity, student, WorldData(net.config, batch, seed + 2, next(net.parameters()).device)
    )


def held_out_prompts(config: VideoConfig, count: int, seed: int = 1, split: Split = "test") -> tuple[list[str], Tensor]:
    """Plain captions and their numbers (N, M), of scenes that training does not show."""
    texts = [caption(spec) for spec in draw_specs(count, seed, split)]
    return texts, torch.tensor([encode(text, config.words, config.text_words) for text in texts])
