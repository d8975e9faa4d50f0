"""Packed sequences of different lengths: each runs by itself.

Shapes: T_q, T_k tokens of all sequences, S sequences, H query heads, G key heads, D head size.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def over_sequences(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor]:
    """Run ``attend(q, k, v) -> (out, lse)`` on each sequence, with B = 1. Differentiable where ``attend`` is.

    Args:
        q: (T_q, H, D).
        k, v: (T_k, G, D).
        cu_seqlens_q, cu_seqlens_k: int (S + 1): 0, where each next sequence begins, and T_q or T_k. A sequence may be
        empty.

    Returns:
        Output (T_q, H, D) and log-sum-exp (H, T_q).

    Raises:
        ValueError: the starts do not fit the tensors.
    """
    starts_q, starts_k = _starts("cu_seqlens_q", cu_seqlens_q, q), _starts("cu_seqlens_k", cu_seqlens_k, k)
    if len(starts_q) != len(starts_k):
        raise ValueError(
            f"cu_seqlens_k: {len(starts_k) - 1} sequences beside {len(starts_q) - 1} in cu_seqlens_q; make them equal"
        )
    outs, sums = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(q.shape[1], 0, dtype=torch.float32)]
    for i in range(len(starts_q) - 1):
        of_q, of_k = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        out, lse = attend(q[None, of_q], k[None, of_k], v[None, of_k])
        outs.append(out[0])
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, dim=1)


def _starts(name: str, starts: Tensor, packed: Tensor) -> list[int]:
    if packed.dim() != 3:
        raise ValueError(f"{name}: tokens of shape {tuple(packed.shape)} given; packed sequences are (T, H, D)")
    if starts.dim() != 1 or starts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: {starts.dtype} {tuple(starts.shape)} given; give int32 or int64 of shape (S + 1,)")
    listed = [int(start) for start in starts.tolist()]
    rising = all(a <= b for a, b in pairwise(listed))
    if not listed or listed[0] != 0 or listed[-1] != packed.shape[0] or not rising:
        raise ValueError(f"{name}: {listed} given; it must rise from 0 to the number of tokens, {packed.shape[0]}")
    return listed
