"""A run's log: JSON lines, and tensorboard where it is installed."""

import json
import logging
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class Window:
    """Values since the last log row. Tensors stay on their device until then: no step waits for the GPU."""

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)

    def add(self, values: dict[str, Any]) -> None:
        """Note numbers or tensors of shape ()."""
        for name, value in values.items():
            self._values[name].append(value.detach() if isinstance(value, Tensor) else float(value))

    def state_dict(self) -> dict[str, Tensor]:
        """The values by name, float64 on the CPU."""
        state = {}
        for name, values in self._values.items():
            devices = {value.device if isinstance(value, Tensor) else None for value in values}
            if len(devices) == 1 and None not in devices:  # one transfer a name
                state[name] = torch.stack([torch.as_tensor(value).reshape(()).double() for value in values]).cpu()
            else:
                state[name] = torch.tensor([float(value) for value in values], dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._values = defaultdict(list, {name: values.tolist() for name, values in state.items()})

    def take_means(self) -> dict[str, float]:
        """Mean of the finite values of each name (NaN if there is none), and start anew."""
        means = {}
        for name, values in self.state_dict().items():
            finite = values[values.isfinite()]
            means[name] = float(finite.mean()) if len(finite) else math.nan
        self._values.clear()
        return means


class RunLog:
    """``log.jsonl`` in ``out``, one row an event. ``resume_bytes`` cuts off what came after a checkpoint."""

    def __init__(self, out: Path, resume_bytes: int = 0, resume_step: int | None = None) -> None:
        self.path = out / "log.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > resume_bytes:
            os.truncate(self.path, resume_bytes)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("tensorboard is not installed: the log is %s alone", self.path)
        else:
            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    @property
    def bytes(self) -> int:
        """Length of the file, for a checkpoint."""
        self._file.flush()
        return self.path.stat().st_size

    def write(self, kind: str, step: int, elapsed_s: float, values: dict[str, float]) -> None:
        """Add a row; a value that is not finite is written as null."""
        row: dict[str, Any] = {"kind": kind, "step": step, "elapsed_s": round(elapsed_s, 3)}
        row |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        log.info("%s", ", ".join([f"{kind}: step {step}", *(f"{name} {value:.4g}" for name, value in values.items())]))
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``log.jsonl``; a last line that was cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            log.warning("%s: a line cut short was left out", path)
    return rows
