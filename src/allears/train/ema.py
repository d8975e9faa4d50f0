"""Exponential moving average of a model's parameters, kept in float32 (Polyak averaging with a fading memory)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The averaged copy. Buffers are not averaged: they stay the model's own.

    Args:
        model: its parameters are the first average.
        decay: share of the old average kept at each update, 0 to 1.
        warmup: keep at most ``(1 + n) / (10 + n)`` at update ``n``, so that the first weights are forgotten soon.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        named = dict(model.named_parameters())
        self._names = list(named)
        self._live = list(named.values())
        self._average = [parameter.detach().float().clone() for parameter in self._live]
        self._decay, self._warmup = decay, warmup

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Move towards the model's parameters; ``count`` is the number of updates before this one."""
        decay = min(self._decay, (1 + count) / (10 + count)) if self._warmup else self._decay
        live = [parameter.detach().float() for parameter in self._live]
        torch._foreach_lerp_(self._average, live, 1.0 - decay)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Overwrite the model's parameters with the average."""
        torch._foreach_copy_([parameter.detach() for parameter in self._live], self._average)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Lend the average to the model; its own parameters are back, bit for bit, at the end of the block."""
        own = [parameter.detach().clone() for parameter in self._live]
        self.copy_to_model()
        try:
            yield
        finally:
            torch._foreach_copy_([parameter.detach() for parameter in self._live], own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32, not copied."""
        return dict(zip(self._names, self._average, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take averages that :meth:`state_dict` gave, on any device."""
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])
