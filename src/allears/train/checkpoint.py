"""Checkpoints: a folder a step with ``state.safetensors`` and ``state.json``, complete or not there. No pickle."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.core.weights import load_weights, save_weights

_NAME = re.compile(r"step-(\d+)-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """``groups``: tensors by group (``model``, ``ema``, ``optimizer`` ...) and name. ``meta``: JSON types."""

    groups: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def checkpoint_paths(out: Path) -> list[Path]:
    """Complete checkpoints in ``out``, the newest last."""
    folder = out / "checkpoints"
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_order)


def save_checkpoint(out: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under a temporary name, rename it, and only then remove those before it."""
    folder = out / "checkpoints"
    before = checkpoint_paths(out)
    number = 1 + max((count for at, count in map(_order, before) if at == step), default=0)
    name = f"step-{step:09d}-{number}"
    target, part = folder / name, folder / f".part-{name}"
    for left_over in folder.glob(".part-*") if folder.is_dir() else ():
        shutil.rmtree(left_over)
    flat = {f"{group}/{name}": value for group, values in checkpoint.groups.items() for name, value in values.items()}
    try:
        save_weights(part / "state", flat, checkpoint.meta, dtype=None)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for path in before:
        shutil.rmtree(path)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder, tensors on the CPU.

    Raises:
        WeightsError: a file is missing or corrupt.
    """
    tensors, meta = load_weights(path / "state", dtype=None)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        group, _, rest = name.partition("/")
        groups.setdefault(group, {})[rest] = value
    return Checkpoint(groups, meta)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``parameter/entry`` -> tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave, each tensor on the device of its parameter and, where it has its
    shape, in its memory order: a fused optimiser takes the elements of both as they lie.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        owner, _, entry = name.rpartition("/")
        parameter = parameters[owner]
        kept = value.to(parameter.device)
        if kept.shape == parameter.shape:
            kept = torch.empty_like(parameter, dtype=kept.dtype, requires_grad=False).copy_(kept)
        optimizer.state[parameter][entry] = kept
