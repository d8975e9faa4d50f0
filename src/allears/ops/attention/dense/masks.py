"""Masks as the fused kernels can take them: alignment at the bottom right, and queries that may look at nothing.

Shapes: B batch, L_q queries, L_k keys, H query heads.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sight(NamedTuple):
    """What a kernel is given instead of (mask, causal).

    Args:
        mask: broadcastable to (B, H, L_q, L_k), boolean or added, with at least one key for each query; or None.
        flag: the kernel's own causal flag, top-left aligned.
        blind: (..., L_q, 1) boolean, the queries that may look at nothing; or None where there can be none. Their keys
            are opened to them in ``mask``, so that no NaN arises forward or backward; the caller zeroes their output.
    """

    mask: Tensor | None
    flag: bool
    blind: Tensor | None


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(L_q, L_k) boolean, True where a query may look; aligned at the bottom right."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def sight(
    mask: Tensor | None, causal: bool, queries: int, keys: int, dtype: torch.dtype, device: torch.device
) -> Sight:
    """``mask`` (broadcastable to (B, H, L_q, L_k)) and ``causal`` as one :class:`Sight`; added masks come in ``dtype``.

    A finite bias stays finite in a narrower dtype.
    """
    if mask is None and not (causal and queries > 1):
        return Sight(None, False, None)
    if mask is None and queries == keys:
        return Sight(None, True, None)
    look = causal_mask(queries, keys, device) if causal and queries > 1 else None
    if mask is None:
        mask = look
        if queries <= keys:
            return Sight(mask, False, None)
    elif mask.dtype == torch.bool:
        mask = mask if look is None else mask & look
    else:
        if torch.finfo(dtype).max < torch.finfo(mask.dtype).max:
            limit = torch.finfo(dtype).max / 2  # half, so that logit + bias stays finite too
            mask = mask.clamp(-limit, limit).masked_fill(mask == -math.inf, -math.inf)
        mask = mask.to(dtype)
        mask = mask if look is None else mask.masked_fill(~look, -math.inf)
    assert mask is not None
    if mask.dtype == torch.bool:
        blind = ~mask.any(-1, keepdim=True)
        return Sight(mask | blind, False, blind)
    blind = (mask == -math.inf).all(-1, keepdim=True)
    return Sight(mask.masked_fill(blind, 0.0), False, blind)


def zero_blind(out: Tensor, blind: Tensor | None) -> Tensor:
    """Output (B, H, L_q, D) with zeros for the blind queries."""
    return out if blind is None else out.masked_fill(blind, 0.0)
