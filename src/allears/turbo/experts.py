"""Two experts, one on the device: the blocks of the other wait in the host's memory (Wan 2.2).

Which expert a step needs follows from its noise, so that over a video they change once. Weights do not change in
inference: an expert that leaves is dropped on the device and its host copy, made once, stays.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ExpertSwap:
    """Keeps the blocks of at most one transformer on the device, as its forward asks.

    What is outside the blocks, about 2 % of the weights, stays on the device, so that a pipeline goes on to find its
    device there.

    Args:
        models: transformers by name, at least two; each has ``blocks``.
        device: where they run.
        pin: page-locked host copies, from which a GPU loads faster; ``None``: with CUDA.

    Raises:
        ValueError: fewer than two models.
    """

    def __init__(self, models: Mapping[str, nn.Module], device: torch.device | str, pin: bool | None = None) -> None:
        if len(models) < 2:
            raise ValueError(f"models: {len(models)} given; swapping needs two experts: leave offload at 'none'")
        self.device = torch.device(device)
        pin = self.device.type == "cuda" if pin is None else pin
        self.resident: str | None = None
        self.swaps = 0
        self._places: dict[str, list[tuple[Tensor, torch.device]]] = {}
        self._hosts: dict[str, list[Tensor]] = {}
        self._hooks = []
        for name, model in models.items():
            blocks: Any = model.blocks
            inside = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
            outside = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
            swapped = [*blocks.parameters(), *blocks.buffers()]
            self._places[name] = [(tensor, tensor.device) for tensor in (*swapped, *outside)]
            self._hosts[name] = [_to_host(tensor, pin) for tensor in swapped]
            for tensor, host in zip(swapped, self._hosts[name], strict=True):
                tensor.data = host
            for tensor in outside:
                tensor.data = tensor.data.to(self.device)
            hook = model.register_forward_pre_hook(self._hook(name), prepend=True)
            self._hooks.append(hook)

    def load(self, name: str) -> None:
        """Bring the blocks of one expert to the device, and drop the other's there."""
        if self.resident == name:
            return
        if self.resident is not None:
            for (tensor, _), host in zip(self._places[self.resident], self._hosts[self.resident], strict=False):
                tensor.data = host
            self.swaps += 1
        for (tensor, _), host in zip(self._places[name], self._hosts[name], strict=False):
            tensor.data = self._bring(host)
        self.resident = name

    def undo(self) -> None:
        """All weights where they were, and no more swapping. A second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        for name, places in self._places.items():
            for (tensor, place), host in zip(places, self._hosts[name], strict=False):
                tensor.data = host.to(place)
            for tensor, place in places[len(self._hosts[name]) :]:
                tensor.data = tensor.data.to(place)
        self._hooks, self._places, self._hosts, self.resident = [], {}, {}, None

    def _bring(self, host: Tensor) -> Tensor:
        return host.to(self.device, non_blocking=True)

    def _hook(self, name: str):
        def before(model: nn.Module, args: tuple[Any, ...]) -> None:
            self.load(name)

        return before


def _to_host(tensor: Tensor, pin: bool) -> Tensor:
    host = tensor.data.to("cpu")
    return host.pin_memory() if pin else host
