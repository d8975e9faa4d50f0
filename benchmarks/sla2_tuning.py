"""Stage 2 in short: the enhancer tuned with sparse attention, in full and in low precision, by both backward forms.

Shapes: T samples of a window, S frames, F bins of a state.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allears.diffusion.path import LinearPath
from allears.models.enhance.model import EnhanceNet
from allears.models.enhance.state import level_of, to_state
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear.options import Backward, Precision
from allears.recipes.sparse_tune import MatchDense, tune_sparse
from allears.train import TrainConfig
from allears.train.logs import read_log

from . import results

ARMS: dict[str, tuple[Precision, Backward]] = {
    "exact": ("exact", "drop_in"),
    "int8fp8-drop-in": ("int8_fp8", "drop_in"),
    "int8fp8-matched": ("int8_fp8", "matched"),
}
LOW_BIT = "rel_err_in_int8fp8"


@dataclass(frozen=True)
class Windows:
    """What the enhancer is called with, from a noisy recording (T,): state, recording and flow time at the prior."""

    net: EnhanceNet
    noisy: Tensor
    samples: int

    def at(self, start: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The window from sample ``start`` on: (1, S, F, 2) twice, and (1,)."""
        config = self.net.config
        window = self.noisy[None, start : start + self.samples]
        y = to_state(window / level_of(window), config)
        path = LinearPath(config.sigma)
        mean = y if config.prior == "noisy" else torch.zeros_like(y)
        return path.prior(mean, path.noise(y, generator)), y, torch.ones(1, device=y.device)

    def draw(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A window from anywhere."""
        last = self.noisy.shape[0] - self.samples
        start = int(torch.randint(last + 1, (), generator=torch.Generator().manual_seed(step)))
        return self.at(start, generator)

    def spread(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``count`` windows, evenly from the first to the last."""
        last = self.noisy.shape[0] - self.samples
        generator = torch.Generator(self.noisy.device).manual_seed(5)
        return [self.at(last * index // max(count - 1, 1), generator) for index in range(count)]


def tune_arms(
    net: nn.Module,
    cores: dict[str, SparseLinearAttention],
    draw: Callable[[int, torch.Generator], Any],
    held_out: list[Any],
    steps: int,
    lr: float,
    case_name: str,
    device: str,
    arms: tuple[str, ...] = tuple(ARMS),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Tune a copy of ``net`` in each arm to the dense model's outputs; rows of errors, and of the loss by step.

    Every arm starts from the same cores and sees the same windows. ``rel_err_before`` and ``rel_err`` are of the
    arm's own numbers, ``rel_err_in_int8fp8`` of low-bit inference, whatever was trained; ``loss`` rows have the step in
    their case.
    """
    rows: list[dict[str, Any]] = []
    for arm in arms:
        precision, backward = ARMS[arm]
        student = copy.deepcopy(net).requires_grad_(True)
        objective = MatchDense(net, draw, held_out)
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                out=folder,
                steps=steps,
                lr=lr,
                warmup_steps=steps // 10,
                precision="bf16" if device == "cuda" else "fp32",
                ema_decay=0.0,
                log_every=max(1, steps // 20),
                validate_every=steps,
                save_every_minutes=1e9,
                device=device,
            )
            result, installed = tune_sparse(student, cores, objective, config, precision, backward)
            log = read_log(Path(folder) / "log.jsonl")
        before = next(row["rel_err"] for row in log if row["kind"] == "validate")
        with torch.no_grad():
            for core in installed.cores.values():
                core.options = replace(core.options, precision="int8_fp8")
            low_bit = objective.validate(student)["rel_err"]
        found = {"rel_err_before": before, **result.metrics, LOW_BIT: low_bit, "skipped_steps": float(result.skipped)}
        rows += [results.row(case_name, arm, name, value) for name, value in found.items()]
        for row in log:
            if row["kind"] == "train":
                at = f"{case_name}, step {row['step']}"
                rows += [
                    results.row(at, arm, name, row[name]) for name in ("loss", "grad_norm") if row[name] is not None
                ]
        say(f"{case_name}, {arm}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return rows
