"""The one training loop: AdamW or Muon, averaged weights, a cosine that ends with the steps or the time, exact
resume.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from allears.core.config import to_dict
from allears.core.errors import WeightsError
from allears.core.weights import check_keys, save_weights
from allears.train.checkpoint import (
    Checkpoint,
    checkpoint_paths,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from allears.train.config import TrainConfig, TrainResult
from allears.train.curves import draw_curves
from allears.train.distributed import Workers
from allears.train.ema import Ema
from allears.train.logs import RunLog, Window
from allears.train.muon import MuonAdamW, matrices
from allears.train.objective import Objective
from allears.train.rng import pack_states, restore_states, seed_all
from allears.train.schedule import learning_rate, run_progress
from allears.train.signals import StopSignals

log = logging.getLogger(__name__)

MAX_BAD_IN_ROW = 20
_GPU_LOOK_EVERY = 10
_MARGIN_S = 0.5
_VALIDATION_STEP = 2**31
_STOPS: tuple[Literal["", "steps", "time", "signal"], ...] = ("", "steps", "time", "signal")
_FREE_TO_CHANGE = {"out", "steps", "minutes", "device", "compile", "log_every", "validate_every", "save_every_minutes"}


class DivergedError(ValueError):
    """The loss or its gradient was not finite many times in a row."""


def train(model: nn.Module, objective: Objective, config: TrainConfig, resume: bool = True) -> TrainResult:
    """Train ``model`` in place on what ``objective`` draws, until the steps or the minutes of ``config`` are over.

    Writes to ``config.out``: ``checkpoints/`` (the newest one), ``log.jsonl``, ``tensorboard/`` and ``curves.png``
    where their packages are installed, and at the end ``ema.safetensors`` + ``ema.json`` (averaged weights, float32).
    Under ``torchrun`` the processes share the work: each draws its own batches and gradients are averaged.

    Args:
        model: moved to the device; afterwards it holds the averaged weights, in evaluation mode.
        objective: gives losses and validations.
        config: all settings.
        resume: go on from the checkpoint in ``config.out`` if there is one. An unbroken run and a resumed one give
            the same weights, bit for bit, where the device's kernels are deterministic and ``minutes`` is not set.

    Raises:
        DivergedError: 20 steps in a row had a loss or gradient that was not finite.
        WeightsError: the checkpoint is corrupt or does not fit ``model``.
        ValueError: ``resume`` is false and ``config.out`` holds a run.
    """
    with Workers(config.device) as workers, StopSignals() as signals:
        return _Run(model, objective, config, workers).go(signals, resume)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Matrices by Muon if asked; the rest by AdamW, decayed where it has two or more dimensions."""
    by_muon = matrices(model, config.muon_leave_out) if config.optimizer == "muon" else []
    taken = {id(parameter) for parameter in by_muon}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not by_muon:
        return torch.optim.AdamW(groups, config.lr, config.betas, fused=True)
    return MuonAdamW(
        [*groups, {"params": by_muon, "weight_decay": config.weight_decay, "muon": True}], config.lr, config.betas
    )


class _Run:
    def __init__(self, model: nn.Module, objective: Objective, config: TrainConfig, workers: Workers) -> None:
        self.started = time.monotonic()
        self.config, self.workers, self.objective = config, workers, objective
        self.device, self.out = workers.device, Path(config.out)
        self.model = model.to(self.device)
        workers.share_model(self.model)
        self.callee: Any = torch.compile(self.model) if config.compile else self.model
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = _optimizer(self.model, config)
        self.ema = Ema(self.model, config.ema_decay, config.ema_warmup)
        self.generator = seed_all(config.seed, workers.rank, self.device)
        self.window = Window()
        self.bad_in_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros_like(self.bad_in_row)
        self.step, self.earlier_s = 0, 0.0
        self.metrics: dict[str, float] = {}
        self.validated_at = self.saved_at = -1
        self.costs_s: dict[str, float] = {}
        self.step_s = 0.0
        self.journal: RunLog | None = None

    def elapsed_s(self) -> float:
        return self.earlier_s + time.monotonic() - self.started

    @contextmanager
    def costing(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.costs_s[name] = max(self.costs_s.get(name, 0.0), time.monotonic() - start)

    def go(self, signals: StopSignals, resume: bool) -> TrainResult:
        self.restore(resume)
        try:
            stop = self.loop(signals)
            if stop != "signal":  # an interrupted run keeps its half-filled window for the row after the resumption
                self.write_window({"skipped": int(self.skipped)})
                self.validate()
            self.save()
            weights = self.out / "ema"
            if self.workers.first:
                with self.ema.in_model():
                    record = {"step": self.step, "metrics": self.metrics, "train": to_dict(self.config)}
                    save_weights(weights, self.model.state_dict(), record, dtype="float32")
        finally:
            if self.journal is not None:
                self.journal.close()
        self.ema.copy_to_model()
        self.model.eval()
        self.workers.highest(0.0)  # all wait until the files are written
        result = TrainResult(self.step, self.elapsed_s(), stop, self.metrics, weights, int(self.skipped))
        log.info("stopped (%s) at step %d after %.0f s, %d skipped", stop, self.step, result.elapsed_s, result.skipped)
        return result

    def loop(self, signals: StopSignals) -> Literal["steps", "time", "signal"]:
        """Step until something ends the run; saving and stopping are decided in the first process, for all alike."""
        config = self.config
        window_start, window_step = time.monotonic(), self.step
        saved = time.monotonic() if self.step else -math.inf  # a fresh run saves at once: a full disk shows early
        if self.step == 0:
            self.validate()
        self.model.train()
        while True:
            start = time.monotonic()
            stop, progress = 3 if signals.asked else 0, run_progress(self.step, config.steps)
            if config.minutes is not None and self.workers.first:
                reserve_s = 1.2 * self.costs_s.get("validate", 0.0) + 2.0 * self.costs_s.get("save", 0.0) + _MARGIN_S
                budget_s = 60 * config.minutes - reserve_s
                progress = run_progress(self.step, config.steps, self.elapsed_s(), budget_s)
                stop = max(stop, 2 * (self.elapsed_s() + self.step_s >= budget_s))
            save = start - saved >= 60 * config.save_every_minutes and self.saved_at != self.step
            stop, progress, save = self.workers.highest(stop, progress, save and self.workers.first)
            if save:
                self.save()
                saved = time.monotonic()
            if stop or self.step >= config.steps:
                return _STOPS[int(stop) or 1]  # type: ignore[return-value]
            rate = self.one_step(progress)
            if self.device.type == "cpu" or self.step % _GPU_LOOK_EVERY == 0:
                self.stop_if_diverged()
            if self.step % config.log_every == 0:
                steps_per_s = (self.step - window_step) / (time.monotonic() - window_start)
                self.write_window({"lr": rate, "skipped": int(self.skipped), "steps_per_s": steps_per_s})
                window_start, window_step = time.monotonic(), self.step
            took = time.monotonic() - start
            self.step_s = 0.8 * self.step_s + 0.2 * took if self.step_s else took
            if self.step % config.validate_every == 0 and self.step < config.steps:
                self.validate()
                self.model.train()
                window_start += time.monotonic() - start - took

    def one_step(self, progress: float) -> float:
        """One optimiser step; the learning rate it had. A step that is not finite changes no weight, without a wait."""
        config = self.config
        rate = learning_rate(self.step, progress, config.lr, config.final_lr_ratio, config.warmup_steps)
        bad = torch.zeros((), device=self.device)
        for _ in range(config.accumulate):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, parts = self.objective.loss(self.callee, self.step, self.generator)
            (loss / config.accumulate).backward()
            bad += ~torch.isfinite(loss.detach())
            self.window.add({"loss": loss, **parts})
        bad = self.workers.average_gradients(self.parameters, bad)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip or math.inf)
        self.window.add({"grad_norm": norm})
        self.update(bad + ~torch.isfinite(norm) > 0, rate)
        self.step += 1
        return rate

    def update(self, bad: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Where found_inf is 1 the fused AdamW leaves weights, moments and counts alone, as it does for a GradScaler.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.step)
        self.skipped += bad
        self.bad_in_row = torch.where(bad, self.bad_in_row + 1, 0)

    def stop_if_diverged(self) -> None:
        if (count := int(self.bad_in_row)) >= MAX_BAD_IN_ROW:
            raise DivergedError(
                f"loss: not finite {count} steps in a row, up to step {self.step}; lower lr (now {self.config.lr:g}), "
                f"try precision='fp32', or look for bad data; the last checkpoint is in {self.out / 'checkpoints'}"
            )

    def write(self, kind: str, values: dict[str, float]) -> None:
        if self.journal is not None and values:
            self.journal.write(kind, self.step, self.elapsed_s(), values)

    def write_window(self, more: dict[str, float]) -> None:
        means = self.window.take_means()
        self.write("train", {**means, **more} if means else {})

    def validate(self) -> None:
        """Score the averaged weights, once a step; the draws of training are the same with and without it."""
        if not self.workers.first or self.validated_at == self.step:
            return
        with self.costing("validate"):
            before = pack_states(self.generator)
            seed_all(self.config.seed, 0, self.device, _VALIDATION_STEP)
            self.model.eval()
            with torch.no_grad(), self.ema.in_model():
                self.metrics = {name: float(value) for name, value in self.objective.validate(self.model).items()}
            restore_states(before, self.generator)
        self.write("validate", self.metrics)
        self.validated_at = self.step

    def save(self) -> None:
        """Write a checkpoint and the curves. Every process must call it, for its random state."""
        rows = self.workers.gather(pack_states(self.generator))
        self.saved_at = self.step
        if not self.workers.first:
            return
        with self.costing("save"):
            counters = torch.stack([self.bad_in_row, self.skipped])
            groups = {
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": optimizer_tensors(self.model, self.optimizer),
                "rng": {str(rank): row for rank, row in enumerate(rows)},
                "window": self.window.state_dict(),
                "counters": {"bad_in_row_skipped": counters},
            }
            meta = {
                "step": self.step,
                "elapsed_s": self.elapsed_s(),
                "validated_at": self.validated_at,
                "metrics": self.metrics,
                "costs_s": self.costs_s,
                "log_bytes": self.journal.bytes if self.journal is not None else 0,
                "train": to_dict(self.config),
            }
            save_checkpoint(self.out, self.step, Checkpoint(groups, meta))
            draw_curves(self.out)

    def restore(self, resume: bool) -> None:
        paths = checkpoint_paths(self.out)
        if paths and not resume:
            raise ValueError(f"out: {str(self.out)!r} holds a run already; resume it, or give another folder")
        checkpoint = load_checkpoint(paths[-1]) if paths else None
        meta = checkpoint.meta if checkpoint is not None else {}
        if checkpoint is not None:
            groups = checkpoint.groups
            check_keys(self.model, groups["model"])
            self.model.load_state_dict(groups["model"])
            self.ema.load_state_dict(groups["ema"])
            try:
                restore_optimizer(self.model, self.optimizer, groups.get("optimizer", {}))
            except KeyError as error:
                raise WeightsError(
                    f"checkpoint {str(paths[-1])!r}: optimiser state for {error} unknown here"
                ) from error
            self.window.load_state_dict(groups.get("window", {}))
            self.bad_in_row, self.skipped = groups["counters"]["bad_in_row_skipped"].to(self.device).unbind()
            self.skipped = self.skipped.clone()
            self.step, self.earlier_s, self.metrics = meta["step"], meta["elapsed_s"], meta["metrics"]
            self.validated_at, self.costs_s, self.saved_at = meta["validated_at"], meta["costs_s"], self.step
            own = groups["rng"].get(str(self.workers.rank))
            if own is None or not restore_states(own, self.generator):
                log.warning("the checkpoint is of other devices: process %d draws anew from here", self.workers.rank)
                self.generator = seed_all(self.config.seed, self.workers.rank, self.device, self.step)
            for name, value in to_dict(self.config).items():
                if name not in _FREE_TO_CHANGE and meta["train"].get(name) != value:
                    log.warning("resumed with %s = %r; it was %r", name, value, meta["train"].get(name))
            log.info("resumed at step %d, %.0f s", self.step, self.earlier_s)
        if self.workers.first:
            self.journal = RunLog(self.out, meta.get("log_bytes", 0), self.step if meta else None)
