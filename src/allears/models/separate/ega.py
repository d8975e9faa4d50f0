"""Efficient global attention of SepReformer (Shin et al., NeurIPS 2024): softmax attention between pooled frames, with
a learned key for each distance, and a gate of each frame at the full rate.

Shapes: B batch (entries, or entries times talkers), T frames, N = T / ratio pooled frames, F channels, H heads,
D = F / H, M = 2 * max_distance entries of the table.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.nn.layer_scale import LayerScale
from allears.nn.linear import Linear
from allears.nn.norms import LayerNorm

_QUERIES = 512
"""How many queries :func:`shifted_attention` takes at a time."""


def relative_keys(table: Tensor, frames: int) -> Tensor:
    """The key of each pair of frames (N, N, D), table[clamp(i - j)], as the release of SepReformer builds it: a tensor
    whose size grows with the square of the length."""
    place = torch.arange(frames, device=table.device)
    half = table.shape[0] // 2
    return table[(place[:, None] - place[None, :]).clamp(-half, half - 1) + half]


def attention_with_keys(q: Tensor, k: Tensor, v: Tensor, relative: Tensor) -> Tensor:
    """softmax((q_i . k_j + q_i . relative_ij) / sqrt(D)) v, with all its matrices in memory.

    The baseline of the benchmarks: what SepReformer's authors released, operation by operation. Use
    :func:`shifted_attention` for the same values.

    Args:
        q, k, v: (B, H, N, D).
        relative: (N, N, D), of :func:`relative_keys`.
    """
    batch, heads, frames, size = q.shape
    content = q @ k.transpose(-1, -2)
    by_query = q.flatten(0, 1).transpose(0, 1)
    position = (by_query @ relative.transpose(-1, -2)).transpose(0, 1).reshape(batch, heads, frames, frames)
    scores = (content + position) / math.sqrt(size)
    return scores.softmax(-1) @ v


def shifted_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """What :func:`attention_with_keys` computes, by fused attention, without its tensor of keys.

    A query is multiplied with the table's rows in the order of the distance; the bias of pair (i, j) then stands at
    column j - i, and a view whose rows are one number shorter puts it at column j (Huang et al., Music Transformer,
    2019, "skewing"). Queries come a few at a time, so that memory grows with the length and not with its square.

    Args:
        q, k, v: (B, H, N, D).
        table: (M, D).
    """
    frames, scale = q.shape[2], 1.0 / math.sqrt(q.shape[3])
    parts = []
    for first in range(0, frames, _QUERIES):
        some = q[:, :, first : first + _QUERIES]
        bias = _shifted_bias(some * scale, table, first, frames)
        parts.append(F.scaled_dot_product_attention(some, k, v, attn_mask=bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _shifted_bias(q: Tensor, table: Tensor, first: int, frames: int) -> Tensor:
    """q_i . table[clamp(i - j)] of the queries from ``first`` on with all keys: (B, H, n, N), a view. Its strides are
    multiples of 8 where n is, as fused kernels want them."""
    count, half = q.shape[2], table.shape[0] // 2
    lead = -(-(count - 1) // 8) * 8
    width = -(-(frames + lead) // 8) * 8 + 1
    # Column c of row i is the key j = c - lead + i.
    distance = first + lead - torch.arange(width, device=q.device)
    columns = table[distance.clamp(-half, half - 1) + half].to(q.dtype)
    products = (q @ columns.transpose(0, 1)).flatten(-2)
    shifted = products[..., : count * (width - 1)].unflatten(-1, (count, width - 1))
    return shifted[..., lead : lead + frames]


class GlobalAttention(nn.Module):
    """x (B, T, F) + sigmoid(Linear(Norm(x))) * upsampled(attention(Norm'(pooled x))), (B, T, F).

    Args:
        channels: F.
        heads: H.
        ratio: frames that are pooled into one; divides T.
        dropout: of the attention's output, in training.
        fused: by :func:`shifted_attention`; else by :func:`attention_with_keys`. The weights are the same.
    """

    def __init__(self, channels: int, heads: int, ratio: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.ratio, self.fused = heads, ratio, fused
        self.norm, self.gate_norm = LayerNorm(channels), LayerNorm(channels)
        self.q, self.k, self.v, self.out = (Linear(channels, channels) for _ in range(4))
        self.dropout = nn.Dropout(dropout)
        self.scale = LayerScale(channels)
        self.gate = Linear(channels, channels)

    def forward(self, x: Tensor, relative: Tensor) -> Tensor:
        """``relative`` is the table (M, D) if fused, else the keys (N, N, D) of all pairs."""
        pooled = x.unflatten(1, (-1, self.ratio))
        rows = self.norm(pooled.mean(2))
        q, k, v = (f(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = shifted_attention(q, k, v, relative) if self.fused else attention_with_keys(q, k, v, relative)
        y = self.scale(self.dropout(self.out(y.transpose(1, 2).flatten(2))))
        gate = self.gate(self.gate_norm(x)).sigmoid().unflatten(1, (-1, self.ratio))
        return torch.addcmul(pooled, gate, y.unsqueeze(2)).flatten(1, 2)
