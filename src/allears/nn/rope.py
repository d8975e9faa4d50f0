"""Rotary position embedding (Su et al., RoFormer, 2021)."""

import torch
from torch import Tensor


def rope_table(
    length: int, head_dim: int, device: torch.device, base: float = 10_000.0, start: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the positions from ``start`` on, each (length, head_dim), float32; the two halves of
    the head are the pairs' real and imaginary parts.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim: {head_dim} given; rotary embedding needs an even size")
    rates = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(start, start + length, device=device, dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x (B, L, H, D) by position."""
    cos, sin = (part[:, None, :].to(x.dtype) for part in table)
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin
