"""Training of the echo canceller, from corpus to weights: a linear canceller in front first, then end to end."""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.audio.kalman import KalmanConfig, KalmanEchoFilter
from allears.core.config import overridden, to_dict
from allears.core.device import matmul_precision, resolve_device
from allears.core.weights import load_weights, read_sidecar, save_weights
from allears.data.echo import EchoMixConfig
from allears.data.echo_render import EchoBatch
from allears.models.echo.config import PRESETS
from allears.models.echo.loss import LossWeights, echo_loss, progressive_targets
from allears.models.echo.model import EchoNet, transfer_from_linear
from allears.nn.causal import in_float32
from allears.recipes.echo_data import (
    TRAIN_MIX,
    Clips,
    EchoData,
    Stage,
    chosen_stages,
    load_data,
    scores,
    stage_mix,
    validation_set,
)
from allears.train import TrainConfig, TrainResult, train
from allears.train.checkpoint import checkpoint_paths
from allears.train.graphs import graphed

log = logging.getLogger(__name__)

LinearFilter = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Microphone and reference (B, S) to what is left of the microphone and the echo that was found, (B, S) both."""
DEFAULT_LOSS = LossWeights(complex=0.5, over=1.0, quiet=0.0001, waveform=0.003, reverberation=1.0, voice=0.1)
"""That the near end keeps its room is no part of the published recipe: whoever talks should be as he was."""
_AT_ONCE = 16


class WithLoss(nn.Module):
    """The network with its loss, and the linear canceller where there is one: a whole step, to be captured as one.

    Takes the tensors of an :class:`EchoBatch`, in their order, to the loss and its terms, named in ``terms``.
    """

    def __init__(self, net: EchoNet, weights: LossWeights, linear: LinearFilter | None) -> None:
        super().__init__()
        self.net, self.weights = net, weights
        self.linear = linear if net.config.linear_input else None
        self.terms: tuple[str, ...] = ()

    def left(self, mic: Tensor, reference: Tensor) -> Tensor | None:
        """What the linear canceller leaves of the microphone; ``None`` where there is no such canceller."""
        if self.linear is None:
            return None
        with torch.no_grad(), in_float32(mic.device):
            return self.linear(mic, reference)[0]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        batch = EchoBatch(*tensors)
        output = self.net(batch.mic, batch.reference, self.left(batch.mic, batch.reference))
        parts = batch.near, batch.near_reverberant, batch.echo, batch.noise
        targets = progressive_targets(*parts, reverberation=self.weights.reverberation)
        with in_float32(batch.mic.device):
            labels = batch.delay_frames, batch.far_active, batch.voice
            total, terms = echo_loss(output, batch.mic, targets, *labels, self.weights)
        self.terms = tuple(terms)
        return total, torch.stack(list(terms.values()))


class EchoObjective:
    """Draws the clips of one stage, seeded by the step; validates on fixed clips of other people, noises and rooms.

    Args:
        mix: of the stage.
        graphs: capture the step's passes as CUDA graphs when it is first made.
    """

    def __init__(
        self, data: EchoData, mix: EchoMixConfig, batch: int, seed: int, validation_clips: int, graphs: bool = False
    ) -> None:
        self._clips, self._graphs = Clips(data, mix, batch, seed), graphs
        self._validation = validation_set(data, mix, validation_clips)

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        assert isinstance(model, WithLoss)
        batch = self._clips(step)
        if self._graphs:
            kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
            graphed(model, *batch)
            for buffer, before in kept:  # the passes of the capture have moved the batch norms' means
                buffer.copy_(before)
            self._graphs = False
        total, terms = model(*batch)
        # Of a graph these are the same memory in every step, and the log reads them later.
        return total.clone(), dict(zip(model.terms, terms.detach().clone().unbind(), strict=True))

    def validate(self, model: nn.Module) -> dict[str, float]:
        assert isinstance(model, WithLoss)
        clips, kind = self._validation.clips, self._validation.clips.mic.device.type
        parts = []
        for mic, reference in zip(clips.mic.split(_AT_ONCE), clips.reference.split(_AT_ONCE), strict=True):
            left = model.left(mic, reference)
            with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
                parts.append(model.net(mic, reference, left))
        near = torch.cat([part.near for part in parts])
        alignment, voice = (
            None if found[0] is None else torch.cat(found).float()
            for found in ([part.alignment for part in parts], [part.voice for part in parts])
        )
        return scores(near, alignment, voice, self._validation, model.weights.reverberation)


def kalman() -> LinearFilter:
    """The linear canceller of the pretraining: long enough for its delays and a room, in blocks so long that it takes
    no more time than the network."""
    return KalmanEchoFilter(KalmanConfig(block=320, filter_ms=320.0))


@matmul_precision("high")
def train_echo(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str = "base",
    seed: int = 0,
    batch: int = 32,
    stages: Sequence[str] | Mapping[str, float] | None = None,
    seconds: float | None = None,
    rirs: int = 1000,
    lr: float = 1e-3,
    start: str | None = None,
    graphs: bool = False,
    validation_clips: int = 48,
    config: Mapping[str, Any] | None = None,
    mix: EchoMixConfig | Mapping[str, Any] | None = None,
    loss: LossWeights | Mapping[str, Any] | None = None,
    grad_clip: float = 5.0,
    warmup_steps: int = 200,
    ema_decay: float = 0.999,
    validate_every: int = 500,
    save_every_minutes: float = 3.0,
    rooms_folder: str | None = None,
    linear: LinearFilter | None = None,
    data: EchoData | None = None,
) -> TrainResult:
    """Train an echo canceller in stages (:data:`allears.recipes.echo_data.STAGES`), each in a folder of its own in
    ``out``, and leave float16 weights as ``out/export.safetensors`` with their configuration.

    A call that was stopped goes on in the last stage that was begun. Time and steps are of all stages together; what
    is read and simulated before the first one is not in it.

    Args:
        corpus: folders made by ``allears data prepare``, ``allears data voices`` or ``allears data pack``.
        preset: a size of :data:`PRESETS`.
        batch: clips a step.
        stages: some of the stages by name, or all or some with their shares of the run, which need not add up to 1.
        seconds: length of the clips, in place of the stages' own.
        rirs: simulated rooms for training; 0 for none.
        start: weights to start from, a path stem; what fits is taken.
        graphs: replay each step's passes, with the linear canceller and the loss, as CUDA graphs: launching the many
            small kernels takes longer than running them.
        config: fields of the network's configuration that differ from the preset's.
        mix: the clips, whole or as the fields that differ; the stages set their length, longest delay and changes.
        loss: likewise.
        grad_clip, warmup_steps, ema_decay, validate_every, save_every_minutes: of each stage, see
            :class:`allears.train.TrainConfig`.
        rooms_folder: keep the simulated rooms here for the next run.
        linear: the linear canceller of the pretraining; by default :func:`kalman`.
        data: what :func:`load_data` gave, in place of ``corpus``, ``rirs``, ``rooms_folder``.

    Returns:
        Of the last stage, with the steps, the time and the skipped steps of all.

    Raises:
        ValueError: the preset, a stage, or a field of the configuration, the clips or the loss is unknown.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: {preset!r} is unknown; known are {', '.join(PRESETS)}")
    plan = chosen_stages(stages, seconds)
    sizes = overridden(PRESETS[preset], config, "config")
    sizes = replace(sizes, voice=sizes.voice and any(stage.voice for stage in plan), linear_input=False)
    mixing, weights = overridden(TRAIN_MIX, mix, "mix"), overridden(DEFAULT_LOSS, loss, "loss")
    where = resolve_device(device)
    if data is None:
        data = load_data(corpus, where, rirs, seed, rooms_folder)
    if linear is None and plan[0].linear:
        linear = kalman()
    net = EchoNet(sizes)
    before_all = read_sidecar(start).get("training") if start is not None else None
    history: list[dict[str, Any]] = []
    result, done = None, 0.0
    begun = max((n for n, stage in enumerate(plan) if checkpoint_paths(Path(out) / stage.name)), default=0)
    for number, stage in enumerate(plan):
        folder = Path(out) / stage.name
        before, done = done, done + stage.share
        if number < begun:
            history.append(_told(stage, read_sidecar(checkpoint_paths(folder)[-1] / "state")))
            continue
        torch.manual_seed(seed + number)
        trained = net
        net = EchoNet(replace(sizes, linear_input=stage.linear, voice=sizes.voice and stage.voice))
        if number:
            transfer_from_linear(net, trained.state_dict())
        elif start is not None:
            transfer_from_linear(net, load_weights(start)[0])
        log.info("stage %s: delays to %.0f ms, clips of %.1f s", stage.name, stage.longest_delay_ms, stage.seconds)
        settings = TrainConfig(
            out=str(folder),
            steps=100_000 if steps is None else max(1, round(steps * done) - round(steps * before)),
            minutes=None if minutes is None else minutes * stage.share,
            lr=lr * stage.lr,
            seed=seed + number,
            device=device,
            precision="bf16" if where.type == "cuda" else "fp32",
            grad_clip=grad_clip,
            final_lr_ratio=stage.final_lr_ratio,
            warmup_steps=warmup_steps,
            ema_decay=ema_decay,
            validate_every=validate_every,
            save_every_minutes=save_every_minutes,
        )
        objective = EchoObjective(
            data, stage_mix(mixing, stage, data.room_count), batch, seed + number, validation_clips, graphs
        )
        result = train(WithLoss(net, replace(weights, quiet=weights.quiet * stage.quiet), linear), objective, settings)
        history.append(_told(stage, {"step": result.step, "elapsed_s": result.elapsed_s, "metrics": result.metrics}))
        del objective
        gc.collect()  # the graphs of a stage hold much of a GPU
        if where.type == "cuda":
            torch.cuda.empty_cache()
        if result.stop == "signal":
            break
    assert result is not None
    final = EchoNet(sizes)
    transfer_from_linear(final, net.state_dict())
    training = {
        "recipe": "echo",
        "preset": preset,
        "started_from": before_all,
        "stages": history,
        "batch": batch,
        "rooms": data.room_count,
        "lr": lr,
        "grad_clip": grad_clip,
        "warmup_steps": warmup_steps,
        "ema_decay": ema_decay,
        "seed": seed,
        "loss": to_dict(weights),
        "mix": to_dict(mixing),
        "speech_hours": round(data.speech.seconds / 3600, 2),
        "speakers": len(data.speech.speakers()),
        "noise_hours": round(data.noise.seconds / 3600, 2),
        "licences": sorted({item.licence for bank in (data.speech, data.noise) for item in bank.items}),
        "packages": sorted({item.package for bank in (data.speech, data.noise) for item in bank.items}),
    }
    record = {"model": "echo", "config": to_dict(sizes), "training": training, "validation": result.metrics}
    save_weights(Path(out) / "export", {name: x.cpu() for name, x in final.state_dict().items()}, record)
    total, time_s = sum(told["steps"] for told in history), sum(told["seconds_of_training"] for told in history)
    return replace(result, step=total, elapsed_s=time_s)


def _told(stage: Stage, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of a stage; ``state`` as of a checkpoint."""
    scored = {name: round(value, 3) for name, value in state["metrics"].items()}
    facts = to_dict(stage) | {"share": round(stage.share, 4)}
    return facts | {"steps": state["step"], "seconds_of_training": round(state["elapsed_s"], 1), "validation": scored}
