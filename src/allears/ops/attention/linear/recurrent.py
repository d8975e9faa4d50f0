"""Causal linear attention row by row, as a recurrent network: the plainest form, against which the chunks are tested.

Shapes: B batch, L rows, H heads, D head size.
"""

import torch
from torch import Tensor


def causal_recurrent(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, kv: Tensor, k_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and returns as :func:`~allears.ops.attention.linear.chunked.causal_chunked`; one row after another."""
    values, weights = [v[:, :0]], [v[:, :0, :, 0]]
    for i in range(v.shape[1]):
        kv = kv + phi_k[:, i, :, :, None] * v[:, i, :, None, :]
        k_sum = k_sum + phi_k[:, i]
        values.append((phi_q[:, i, :, :, None] * kv).sum(2)[:, None])
        weights.append((phi_q[:, i] * k_sum).sum(2)[:, None])
    return torch.cat(values, dim=1), torch.cat(weights, dim=1), kv, k_sum
