"""Packed sequences of different lengths: each runs by itself.

Shapes: T_q, T_k tokens of all sequences, S sequences, H query heads, G key heads, D head size.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]
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


def backward_over_sequences(
    backward: Callable[..., Gradients],
    of_queries: tuple[Tensor, ...],
    of_keys: tuple[Tensor, ...],
    of_sums: tuple[Tensor | None, ...],
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
) -> Gradients:
    """Run ``backward(*of_queries, *of_keys, *of_sums)`` on each packed sequence, with B = 1.

    Args:
        of_queries: (T_q, H, D) each, q first.
        of_keys: (T_k, G, D) each, k first.
        of_sums: (H, T_q) each, or None.
        cu_seqlens_q, cu_seqlens_k: int (S + 1), checked by the forward.

    Returns:
        dQ (T_q, H, D), dK and dV (T_k, G, D).
    """
    d_q, d_k, d_v = (torch.zeros_like(x) for x in (of_queries[0], of_keys[0], of_keys[0]))
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        d_q[q0:q1], d_k[k0:k1], d_v[k0:k1] = (
            grad[0]
            for grad in backward(
                *(x[None, q0:q1] for x in of_queries),
                *(x[None, k0:k1] for x in of_keys),
                *(None if x is None else x[None, :, q0:q1] for x in of_sums),
            )
        )
    return d_q, d_k, d_v


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
