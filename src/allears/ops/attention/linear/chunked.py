"""Causal linear attention in chunks: matrix products within a chunk, and a running sum from chunk to chunk.

Time O(L (C + D) D) and memory O(L (C + D)) a head, whatever L is. The steps of a stream run here too: a part shorter
than a chunk is one chunk.

Shapes: B batch, L rows, H heads, D head size, N chunks of C rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST_CHUNK = 32


def causal_chunked(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, kv: Tensor, k_sum: Tensor, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the keys up to each query, and over those before (kv, k_sum).

    NaN and infinity in a row reach that row and later ones, never an earlier one.

    Args:
        phi_q, phi_k: (B, L, H, D), features.
        v: (B, L, H, D).
        kv: (B, H, D, D), sum of phi(k)^T v before the first row.
        k_sum: (B, H, D), sum of phi(k) before it.
        chunk: C; ``None`` for D, at least 32, which balances the scores within chunks and the sums between them.

    Returns:
        phi(q) sum phi(k)^T v (B, L, H, D), phi(q) . sum phi(k) (B, L, H), and both sums after the last row.
    """
    rows = v.shape[1]
    if not rows:
        return phi_q * phi_k * v, (phi_q * phi_k).sum(-1), kv, k_sum  # all three stay in the graph
    chunk = chunk or max(v.shape[-1], SHORTEST_CHUNK)
    size = chunk if rows > chunk else rows  # not min, which is a symbol to torch.compile wherever the length is one
    phi_q, phi_k, v = (_cut(x, size) for x in (phi_q, phi_k, v))
    kv_sums = _running(kv, torch.einsum("bnchd,bnche->bnhde", phi_k, v))
    k_sums = _running(k_sum, phi_k.sum(2))
    before = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
    scores = torch.einsum("bnchd,bnmhd->bnhcm", phi_q, phi_k).masked_fill(~before, 0.0)
    # A weight of 0 times NaN is NaN: values that are not finite go round the product.
    finite = v.isfinite()
    spread = torch.where(finite, 0.0, torch.nan).to(v.dtype).cumsum(2)
    near = torch.einsum("bnhcm,bnmhe->bnche", scores, v.masked_fill(~finite, 0.0)) + spread
    values = near + torch.einsum("bnchd,bnhde->bnche", phi_q, kv_sums[:, :-1])
    weights = scores.sum(-1).transpose(2, 3) + torch.einsum("bnchd,bnhd->bnch", phi_q, k_sums[:, :-1])
    return values.flatten(1, 2)[:, :rows], weights.flatten(1, 2)[:, :rows], kv_sums[:, -1], k_sums[:, -1]


def _cut(x: Tensor, size: int) -> Tensor:
    """(B, L, H, D) to (B, N, C, H, D), with zeros behind the last row."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))


def _running(first: Tensor, parts: Tensor) -> Tensor:
    """first (B, ...), parts (B, N, ...) to (B, N + 1, ...): the sum before each chunk, and after the last."""
    return torch.cat([first[:, None], parts], dim=1).cumsum(1)
