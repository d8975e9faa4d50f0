"""Embedding of the flow time t in [0, 1]."""

import math

import torch
from torch import Tensor, nn


class TimestepEmbedding(nn.Module):
    """t (B,) to (B, C): 64 Fourier features of t, then two linear layers."""

    def __init__(self, channels: int, features: int = 64) -> None:
        super().__init__()
        rates = torch.exp(torch.linspace(0.0, math.log(200.0), features // 2))
        self.register_buffer("rates", rates, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(torch.float32)[:, None] * self.rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
