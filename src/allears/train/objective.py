"""What a model's training brings to the loop."""

from typing import Protocol

import torch
from torch import Tensor, nn


class Objective(Protocol):
    """A loss and a validation.

    For a resumed run to equal an unbroken one, what ``loss`` draws must follow from ``step``, from ``generator``, or
    from the global generators of torch, numpy and ``random``: a checkpoint holds these, and nothing of the objective.
    """

    def loss(self, model: nn.Module, step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Draw one batch and give its mean loss.

        Args:
            model: the network in training mode, compiled where the run asks for it. Called under autocast.
            step: optimiser steps done so far; the same number again for each part of an accumulated batch.
            generator: on the training device (``generator.device``), seeded differently in each process.

        Returns:
            A loss of shape () with its graph, and named parts of shape () for the log. Parts need no graph, and on a
            GPU a tensor is better than a float: it is read only when a log row is written.
        """
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Score ``model``, which holds the averaged weights, in evaluation mode, without gradients or autocast.

        Called in the first process only. The global generators are seeded alike before each call and put back after
        it, so each validation hears the same draws and training is not changed by it.
        """
        ...
