"""How a run trains, and what it gives back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Raises ``ValueError`` where one is out of its range."""

    out: str
    """Folder for checkpoints, logs, curves and weights."""
    steps: int
    """Optimiser steps in all. With ``minutes``, whichever ends first."""
    minutes: float | None = None
    """Time in all, over every resumed call, with the last validation and saving in it."""
    lr: float = 1e-3
    """Highest learning rate."""
    final_lr_ratio: float = 0.02
    """Learning rate at the end, relative to ``lr``."""
    warmup_steps: int = 500
    """Steps of linear warm-up; at most a tenth of the run."""
    weight_decay: float = 0.01
    """Decoupled decay of parameters of two or more dimensions; the others have none."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """``muon``: for the matrices, with AdamW for all else (:mod:`allears.train.muon`)."""
    muon_leave_out: tuple[str, ...] = ()
    """Matrices whose names contain one of these are AdamW's: those of the first and the last layer, by custom."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's averaging of the gradient and of its square."""
    grad_clip: float = 1.0
    """Highest norm of the whole gradient; 0 does not clip."""
    accumulate: int = 1
    """Batches a step, each with a share of the loss."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Autocast type of the forward pass; weights and optimiser stay as the model is."""
    ema_decay: float = 0.999
    """Decay per step of the averaged weights."""
    ema_warmup: bool = True
    """Start the average fast: decay is at most (1 + step) / (10 + step)."""
    log_every: int = 50
    """Steps between log rows."""
    validate_every: int = 1000
    """Steps between validations; one more comes at the start and one at the end."""
    save_every_minutes: float = 3.0
    """Time between checkpoints; 0 saves after each step."""
    seed: int = 0
    """Seed of every draw."""
    compile: bool = False
    """Give the loss a ``torch.compile``-d model."""
    device: str = "auto"
    """``auto``, ``cpu`` or ``cuda``."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "save_every_minutes", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: got {self.minutes}, wanted more than 0, or None for no limit")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, wanted more than 0")
        for name in ("final_lr_ratio", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 to 1")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer: got {self.optimizer!r}, wanted 'adamw' or 'muon'")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision: got {self.precision!r}, wanted 'bf16' or 'fp32'")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. The model that was trained holds the averaged weights, in evaluation mode."""

    step: int
    """Optimiser steps done, over every resumed call."""
    elapsed_s: float
    """Time taken, over every resumed call."""
    stop: Literal["steps", "time", "signal"]
    """Why the run ended: all steps done, time over, or SIGINT or SIGTERM (then it can be resumed)."""
    metrics: dict[str, float]
    """The last validation (empty in processes other than the first)."""
    weights: Path
    """Stem of the averaged weights in float32, for :func:`allears.core.weights.load_weights`."""
    skipped: int
    """Steps that were left out because the loss or its gradient was not finite."""
