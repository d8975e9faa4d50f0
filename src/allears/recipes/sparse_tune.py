"""Stage 2 of SLA2: tune a model whose attention is sparse, with the hard maps of inference and frozen routers.

arXiv 2602.12675, section 5: 500 steps on the model's own loss; its low-bit forward is trained by 16-bit gradients.
"""

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.config import from_dict, to_dict
from allears.core.device import resolve_device
from allears.core.weights import load_weights, read_sidecar, save_weights
from allears.models.enhance.config import EnhanceConfig
from allears.models.enhance.loss import LossWeights
from allears.models.enhance.model import EnhanceNet
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear.options import Backward, Precision
from allears.recipes.enhance import EnhanceObjective
from allears.recipes.enhance_data import TRAIN_MIX, EnhanceData, load_data
from allears.train import TrainConfig, TrainResult, train
from allears.train.objective import Objective
from allears.turbo.sparse import Installed, apply
from allears.turbo.sparse.install import install

log = logging.getLogger(__name__)


class MatchDense:
    """Objective: the outputs of the dense model on the same inputs, in relative squared error.

    Args:
        teacher: the dense model, in evaluation mode; it is not trained.
        draw: (step, generator) to a batch; see ``call``.
        held_out: batches for the validation, ``rel_err``.
        call: (model, batch) to the output; by default ``model(*batch)``.
    """

    def __init__(
        self,
        teacher: nn.Module,
        draw: Callable[[int, torch.Generator], Any],
        held_out: Sequence[Any],
        call: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.teacher, self.draw, self.held_out = teacher, draw, held_out
        self.call = call or (lambda model, batch: model(*batch))

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        off, size = self._off(model, self.draw(step, generator))
        return off / size, {}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Relative L2 error over the held-out batches joined."""
        pairs = [self._off(model, batch) for batch in self.held_out]
        return {"rel_err": math.sqrt(sum(float(off) for off, _ in pairs) / sum(float(size) for _, size in pairs))}

    def _off(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.call(self.teacher, batch).float()
        return (self.call(model, batch).float() - wanted).square().sum(), wanted.square().sum()


def tune_sparse(
    model: nn.Module,
    sparse: str | os.PathLike[str] | Mapping[str, SparseLinearAttention],
    objective: Objective,
    config: TrainConfig,
    precision: Precision = "exact",
    backward: Backward = "drop_in",
) -> tuple[TrainResult, Installed]:
    """Install what :func:`allears.turbo.sparse.sparsify` left at ``sparse`` and train ``model`` with it.

    ``sparse`` may also be fitted cores by layer; they are copied.

    All weights train but the routers'. The averaged weights are in ``config.out/ema``, cores included, and
    ``log.jsonl`` beside it has the loss and the norm of the gradient, by which ``drop_in`` and ``matched`` compare.

    Args:
        model: dense, on any device; afterwards in evaluation mode, sparse, with averaged weights.
        objective: the model's own loss, or :class:`MatchDense`.
        config: of the training; a run that is in ``config.out`` is resumed.
        precision: of the sparse branch in the forward pass.
        backward: gradient of an ``int8_fp8`` forward; see :class:`SparseLinear`.

    Returns:
        The result, and the handle whose ``restore()`` makes the (tuned) model dense.

    Raises:
        WeightsError: the files at ``sparse`` are missing or do not fit.
        DivergedError: the loss stopped being finite.
    """
    if isinstance(sparse, Mapping):
        cores = {name: copy.deepcopy(core) for name, core in sparse.items()}
        for core in cores.values():
            core.options = replace(core.options, precision=precision, backward=backward)
        installed = install(model, cores)
    else:
        installed = apply(model, sparse, precision=precision, backward=backward)
    installed.set_stage("hard")
    try:
        result = train(model, objective, config)
    except BaseException:
        installed.restore()
        raise
    return result, installed


def load_tuned(
    model: nn.Module, sparse: str | os.PathLike[str], out: str | os.PathLike[str], **changes: Any
) -> Installed:
    """Give ``model`` the weights that :func:`tune_sparse` left in the folder ``out``, cores included.

    Args:
        changes: see :func:`allears.turbo.sparse.apply`.

    Raises:
        WeightsError: a file is missing, or was trained with other blocks.
    """
    installed = apply(model, sparse, **changes)
    tensors, _ = load_weights(Path(out) / "ema")
    try:
        model.load_state_dict(tensors)
    except BaseException:
        installed.restore()
        raise
    return installed


def tune_enhancer(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str | None = None,
    seed: int = 0,
    *,
    start: str,
    sparse: str,
    precision: Precision = "exact",
    backward: Backward = "drop_in",
    batch: int = 2,
    seconds: float = 60.0,
    rirs: int = 2000,
    lr: float = 1e-4,
    validation_clips: int = 16,
    rooms_folder: str | None = None,
    data: EnhanceData | None = None,
) -> TrainResult:
    """Tune the enhancer with sparse attention on long windows; leaves ``out/export.safetensors``, float16.

    Args:
        corpus: folders made by ``allears data prepare`` or ``allears data pack``.
        preset: must be left out: the size is that of ``start``.
        start: the dense weights, a path stem.
        sparse: what :func:`allears.turbo.sparse.sparsify` made of them, a path stem.
        precision, backward: see :func:`tune_sparse`.
        batch, seconds: windows a step, and their length.
        rirs, validation_clips, rooms_folder, data: see :func:`allears.recipes.enhance.train_enhance`.

    Raises:
        ValueError: a preset is given.
        WeightsError: a file is missing, corrupt, or does not fit.
    """
    if preset is not None:
        raise ValueError(f"preset: {preset!r} given; the tuned model has the size of the dense one, so choose by start")
    where = resolve_device(device)
    tensors, origin = load_weights(start)
    config = from_dict(EnhanceConfig, origin["config"], "config")
    net = EnhanceNet(config)
    net.load_state_dict(tensors)
    net = net.to(where)
    if data is None:
        data = load_data(corpus, where, rirs, seed, validation_clips, rooms_folder)
    mix = replace(TRAIN_MIX, seconds=seconds, rirs=data.room_count)
    settings = TrainConfig(
        out=out,
        steps=steps or 500,
        minutes=minutes,
        lr=lr,
        seed=seed,
        device=device,
        precision="bf16" if where.type == "cuda" else "fp32",
        warmup_steps=20,
        log_every=10,
        validate_every=100,
    )
    objective = EnhanceObjective(config, data, mix, batch, seed, LossWeights())
    result, _ = tune_sparse(net, sparse, objective, settings, precision, backward)
    record = {
        "model": "enhance",
        "config": to_dict(config),
        "sparse": {**read_sidecar(sparse)["settings"], "tuned_precision": precision, "tuned_backward": backward},
        "training": {
            "recipe": "sparse_tune",
            "started_from": origin.get("training"),
            "steps": result.step,
            "seconds_of_training": round(result.elapsed_s),
            "batch": batch,
            "clip_seconds": seconds,
            "lr": lr,
            "seed": seed,
        },
        "validation": result.metrics,
    }
    save_weights(Path(out) / "export", {name: tensor.cpu() for name, tensor in net.state_dict().items()}, record)
    return result
