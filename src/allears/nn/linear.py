"""The linear layer of models with few channels and many rows."""

import torch
from torch import Tensor, nn

from allears.ops.rows import functions


class Linear(nn.Linear):
    """``nn.Linear``, whose backward pass on a GPU sums the bias's gradient by a kernel for many short rows."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            return super().forward(input)
        return functions.linear(input, self.weight, self.bias)
