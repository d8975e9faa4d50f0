"""The loop that all low-bit references share: an online softmax over tiles of 128 keys, in float32 and base 2.

How the scores of a tile are made, and how its probabilities meet V, is the caller's. Tiles go from the first key to the
last, and a low-bit product sees the probabilities relative to the maximum that is known at its tile; kernels do the
same.

Shapes: B batch, L_q queries, L_k keys, G key heads, R query heads that share a key head, D head size, N keys of a tile.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from allears.ops.attention.lowbit.quantise import KEY_BLOCK

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def split_heads(x: Tensor, groups: int) -> Tensor:
    """(B, L, H, D) -> (B, G, R, L, D): query head h reads key head h // R."""
    return x.transpose(1, 2).unflatten(1, (groups, x.shape[2] // groups))


def merge_heads(x: Tensor) -> Tensor:
    """(B, G, R, L, D) -> (B, L, H, D)."""
    return x.flatten(1, 2).transpose(1, 2)


def key_tiles(keys: int, tile: int = KEY_BLOCK) -> Iterator[slice]:
    """The keys of each tile, in order; the last tile may be shorter."""
    for start in range(0, keys, tile):
        yield slice(start, min(start + tile, keys))


def hidden_keys(queries: int, keys: int, tile: slice, device: torch.device) -> Tensor:
    """(L_q, N), True where causal attention (aligned at the bottom right) hides a key of the tile from a query."""
    last = torch.arange(queries, device=device).unsqueeze(1) + keys - queries
    return torch.arange(tile.start, tile.stop, device=device) > last


def exp2_below(scores: Tensor, maximum: Tensor) -> Tensor:
    """``2 ** (scores - maximum)``, and 0 where both are -inf."""
    return torch.exp2(scores - torch.where(maximum == -math.inf, torch.zeros_like(maximum), maximum))


def of_seen(d_lse: Tensor, lse: Tensor) -> Tensor:
    """The gradient of the log-sum-exp in float32, 0 for a query without keys, whose -inf is a constant."""
    return torch.where(lse == -math.inf, torch.zeros_like(lse), d_lse.float())


def online_softmax(
    scores: Callable[[slice], Tensor],
    product: Callable[[Tensor, slice], Tensor],
    shape: tuple[int, int, int, int, int],
    keys: int,
    causal: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over ``keys`` keys.

    Args:
        scores: tile -> logits times log2(e), float32 (B, G, R, L_q, N), not masked.
        product: probabilities relative to the running maximum (B, G, R, L_q, N) and tile -> (B, G, R, L_q, D) float32.
        shape: (B, G, R, L_q, D).
        causal: hide keys after ``i + L_k - L_q`` from query ``i``.

    Returns:
        Output (B, G, R, L_q, D) and log-sum-exp (natural, of the scores as made) (B, G, R, L_q), both float32. A query
        without keys has the output 0 and -inf.
    """
    out = torch.zeros(shape, device=device)
    total = torch.zeros(shape[:-1], device=device)
    maximum = torch.full(shape[:-1], -math.inf, device=device)
    for tile in key_tiles(keys):
        logits = scores(tile)
        if causal:
            logits = logits.masked_fill(hidden_keys(shape[3], keys, tile, device), -math.inf)
        known = maximum
        maximum = torch.maximum(known, logits.amax(-1))
        weights = exp2_below(logits, maximum.unsqueeze(-1))
        decay = exp2_below(known, maximum)
        total = total * decay + weights.sum(-1)
        out = out * decay.unsqueeze(-1) + product(weights, tile)
    seen = total.unsqueeze(-1) != 0
    out = torch.where(seen, out / torch.where(seen, total.unsqueeze(-1), torch.ones_like(out)), out)
    return out, (maximum + total.log2()) * LN_2
