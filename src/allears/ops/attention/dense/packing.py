"""Packed sequences for kernels that take none: each sequence padded to the longest, run under a mask, packed again.

Exact, differentiable and free of loops over sequences, so torch.compile traces it; it costs the padded size.

Shapes: T_q and T_k all queries and keys, S sequences, L_q and L_k the longest of them, H and G heads, D head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.call import Packing


class Rows(NamedTuple):
    """Where the rows of a padded batch are in the packed one, and back.

    Args:
        source: (S, L) row of the packed tensor; any row where there is only padding.
        filled: (S, L) boolean, False where there is only padding.
        lengths: (S,) rows of each sequence.
        home: (T,) row of the flattened (S * L) batch that each packed row went to.
    """

    source: Tensor
    filled: Tensor
    lengths: Tensor
    home: Tensor


def locate(offsets: Tensor, longest: int, total: int) -> Rows:
    """Rows of a batch of which sequence s owns ``offsets[s]`` to ``offsets[s + 1]`` of ``total``."""
    place = torch.arange(longest, device=offsets.device)
    starts, lengths = offsets[:-1].long(), offsets.diff().long()
    filled = place < lengths[:, None]
    source = (starts[:, None] + place).clamp(max=max(total - 1, 0))
    row = torch.arange(total, device=offsets.device)
    owner = torch.searchsorted(offsets[1:].long(), row, right=True)
    return Rows(source, filled, lengths, owner * longest + row - starts[owner])


def run_padded(
    kernel: Callable[..., Tensor | tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    causal: bool,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """``kernel(q, k, v, mask=, causal=, scale=, return_lse=)`` on packed q (T_q, H, D), k and v (T_k, G, D).

    Returns (T_q, H, D), and with ``return_lse`` the log-sum-exp (H, T_q).
    """
    queries = locate(packing.cu_seqlens_q, packing.max_seqlen_q, q.shape[0])
    keys = locate(packing.cu_seqlens_k, packing.max_seqlen_k, k.shape[0])
    look = keys.filled[:, None, :] & queries.filled[:, :, None]
    if causal:
        i = torch.arange(packing.max_seqlen_q, device=q.device)[None, :, None]
        j = torch.arange(packing.max_seqlen_k, device=q.device)[None, None, :]
        look = look & (j <= i + (keys.lengths - queries.lengths)[:, None, None])
    q, k, v = _pad(q, queries), _pad(k, keys), _pad(v, keys)
    result = kernel(q, k, v, mask=look[:, None], causal=False, scale=scale, return_lse=return_lse)
    if not isinstance(result, tuple):
        return result.flatten(0, 1)[queries.home]
    out, lse = result
    return out.flatten(0, 1)[queries.home], lse.transpose(0, 1).flatten(1, 2)[:, queries.home]


def _pad(x: Tensor, rows: Rows) -> Tensor:
    """(T, H, D) to (S, L, H, D), zeros in the padding: what stands there would meet weight 0, and 0 * NaN is NaN."""
    return x[rows.source].masked_fill(~rows.filled[..., None, None], 0.0)
