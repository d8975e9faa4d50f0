"""Random inputs of a shape. B batch, L length, H query heads, G key heads, D head size."""

from dataclasses import dataclass

import torch
from torch import Tensor

from allears.bench.attention.cases import Shape

OFFSET = 2.5
"""Standard deviation of the offset of K's channels: keys of trained models have one, and K smoothing takes it off."""
_ROTATE_BYTES = 2**28  # below this, several sets are made, so that no set stays in the second-level cache
_MAX_SETS = 4


@dataclass(frozen=True)
class Inputs:
    """q and the gradient of the output (B, L, H, D), k and v (B, L, G, D), all of one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor

    def copies(self, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of q, k, v that a system may spoil."""
        q, k, v = (tensor.clone().requires_grad_(requires_grad) for tensor in (self.q, self.k, self.v))
        return q, k, v

    def equal(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether the tensors still hold what these do."""
        return torch.equal(self.q, q) and torch.equal(self.k, k) and torch.equal(self.v, v)


def make_inputs(shape: Shape, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Standard normal tensors; K has a fixed normal offset of size :data:`OFFSET` on each channel of each head."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(length: int, heads: int) -> Tensor:
        size = (shape.batch, length, heads, shape.head_dim)
        return torch.randn(size, device=device, generator=generator)

    offset = OFFSET * normal(1, shape.kv_heads)
    return Inputs(
        normal(shape.length, shape.heads).to(dtype),
        (normal(shape.length, shape.kv_heads) + offset).to(dtype),
        normal(shape.length, shape.kv_heads).to(dtype),
        normal(shape.length, shape.heads).to(dtype),
    )


def make_input_sets(shape: Shape, device: torch.device, seed: int) -> list[Inputs]:
    """One set of a large shape, several of a small one; the timed calls rotate among them."""
    first = make_inputs(shape, device, seed)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (first.q, first.k, first.v))
    count = min(_MAX_SETS, max(1, _ROTATE_BYTES // size))
    return [first, *(make_inputs(shape, device, seed + index) for index in range(1, count))]
