"""Self-attention as a module: query-key norm, rotary positions, and any kernel of the engine through its spec."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.nn.rope import apply_rope, rope_table
from allears.ops.attention import AttentionSpec, attention


class SelfAttention(nn.Module):
    """x (B, L, C) to (B, L, C).

    Args:
        channels: C, a multiple of ``heads``.
        heads: number of heads.
        rope: rotate queries and keys by position; without it the order of x has no meaning.
        qk_norm: RMS-normalise queries and keys per head (steadier training at large sizes).
        spec: which attention; see :class:`AttentionSpec`.
    """

    def __init__(
        self, channels: int, heads: int, rope: bool = True, qk_norm: bool = False, spec: AttentionSpec | None = None
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: {heads} does not divide channels {channels}")
        self.heads = heads
        self.head_dim = channels // heads
        self.rope = rope
        self.spec = spec or AttentionSpec()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        qk, v = self.qkv(x).split((2 * channels, channels), dim=-1)
        qk = qk.view(batch, length, 2 * self.heads, self.head_dim)
        v = v.view(batch, length, self.heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.chunk(2, dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2).to(v.dtype)
        if self.rope:
            qk = apply_rope(qk, rope_table(length, self.head_dim, x.device))
        q, k = qk.chunk(2, dim=2)
        return self.out(attention(q, k, v, self.spec).reshape(batch, length, channels))


class GatedConv(nn.Module):
    """Feed-forward with a neighbourhood: a 3x3 convolution to a gated width, then back (after the Conv-SwiGLU of
    TF-Locoformer, in 2-D).

    x (B, T, F, C) to (B, T, F, C).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.widen = ChannelsLastConv(channels, 2 * hidden, kernel_size=3, padding=1)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.glu(self.widen(x)))


class ChannelsLastConv(nn.Conv2d):
    """A 2-D convolution on (B, T, F, C): the layout in which linear layers and norms need no copies."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
