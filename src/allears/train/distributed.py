"""Data parallel processes, as ``torchrun`` starts them.

Gradients are averaged in one exchange a step, after the last accumulated batch, and not by a wrapper around the model:
an objective may then call any method of the model, any number of times, and a compiled model stays as it is.
"""

import atexit
import os
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allears.core.device import resolve_device

_PATIENCE = timedelta(hours=6)
"""How long the others wait for the first process, which alone validates and saves."""


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Workers:
    """This process's place among the others; a block around a run. Alone, every method is a no-op.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; with several processes each takes the GPU of its local rank.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = resolve_device(device)
        join = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        parallel = join or dist.is_initialized()
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if join:  # once a process: a group that was left cannot be joined again, and a recipe may train twice
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(_leave)
        self.rank = dist.get_rank() if parallel else 0
        self.world = dist.get_world_size() if parallel else 1
        self._control: Any = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.world > 1 else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._control is not None and kind is None:
            dist.destroy_process_group(self._control)

    @property
    def first(self) -> bool:
        """Whether this process is the one that validates and writes."""
        return self.rank == 0

    def share_model(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.world > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.detach().copy_(whole)

    def highest(self, *values: float) -> list[float]:
        """The highest of each value over the processes. Waits for all of them; the GPU is not touched."""
        if self.world == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._control)
        return shared.tolist()

    def average_gradients(self, parameters: Sequence[nn.Parameter], flag: Tensor) -> Tensor:
        """Replace gradients by their mean over the processes, and give the mean of ``flag``, a float32 of shape ().

        A parameter without a gradient in some process counts as zero there.
        """
        if self.world == 1:
            return flag
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.reshape(-1).float() for part in parts] + [flag.reshape(1)])
        dist.all_reduce(flat)
        flat /= self.world
        *means, shared = flat.split([part.numel() for part in parts] + [1])
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)
        return shared.reshape(())

    def gather(self, row: Tensor) -> list[Tensor]:
        """Every process's ``row`` (CPU, one shape everywhere), in order of rank."""
        if self.world == 1:
            return [row]
        rows = [torch.empty_like(row) for _ in range(self.world)]
        dist.all_gather(rows, row, group=self._control)
        return rows
