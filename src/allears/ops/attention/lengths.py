"""Padded batches whose entries have lengths of their own: as packed sequences where they lie, or as a boolean mask.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

import torch
from torch import Tensor

from allears.ops.attention.call import Packing, check_tensor

CUT = -9e3
"""An added mask of this or less hides a key: e^-9000 is 0 in every dtype. Models add -10000 (-9984 in bfloat16)."""

_OF_QUERIES = "queries look at different keys (as under a causal mask; attention itself takes causal=True)"
_OF_HEADS = "heads look at different keys"
_OF_KEYS = "a key is hidden before one that is seen (padding at the left, or a hole)"
_OF_VALUES = f"an added value is neither 0 nor {CUT:g} or less"
_PROBLEMS = (_OF_VALUES, _OF_HEADS, _OF_QUERIES, _OF_KEYS)


def key_lengths_from_mask(mask: Tensor) -> Tensor:
    """How many keys each entry of a padded batch has, (B,) int32, for ``attention(..., key_lengths=...)``.

    The mask's values are read to find out whether it is of this form, which waits for a GPU once: call it once for all
    layers, not in each.

    Args:
        mask: (B, L_k), (B, 1, L_k), or (B, 1 or H, 1 or L_q, L_k) with equal rows. Boolean, True = look; or added to
            the logits, 0, or -9000 and less. An entry of a boolean mask that looks at nothing has length 0. One of
            which an added mask hides every key by the same finite number has all its keys, as softmax sees it.

    Raises:
        ValueError: the mask does not cut off the ends of the keys alone: what it does instead is named.
    """
    check_tensor("mask", mask)
    if mask.dim() not in (2, 3, 4) or (mask.dim() == 3 and mask.shape[1] != 1):
        raise ValueError(
            f"mask: shape {tuple(mask.shape)} given; it must be (B, L_k), (B, 1, L_k), or (B, 1 or H, 1 or L_q, L_k)"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask: dtype {mask.dtype} given; use bool (True = look) or a float added to the logits")
    if mask.dim() != 4:
        mask = mask.reshape(mask.shape[0], 1, 1, mask.shape[-1])
    if mask.numel() == 0:
        return mask.new_zeros(mask.shape[0], dtype=torch.int32)
    keys = mask.shape[3]
    strange = torch.zeros((), dtype=torch.bool, device=mask.device)
    if mask.dtype != torch.bool:
        added = mask
        mask = added == 0
        strange = (~mask & ~(added <= CUT)).any()
        level = added[:, 0, 0, :1]
        mask = mask | ((added == level[:, None, None]).all(-1, keepdim=True) & (level > -torch.inf)[:, None, None])
    of_heads = (mask[:, :1] != mask).any()
    of_queries = (mask[:, :, :1] != mask).any()
    row = mask[:, 0, 0]
    lengths = row.sum(-1)
    of_keys = (row != (torch.arange(keys, device=mask.device) < lengths[:, None])).any()
    found = torch.stack([strange, of_heads, of_queries, of_keys]).tolist()
    if any(found):
        raise ValueError(
            f"mask: {_PROBLEMS[found.index(True)]}, so it is not the lengths of padded keys; use numerics='exact' "
            f"(and sparse=None), which takes any mask"
        )
    return lengths.to(torch.int32)


def check_padding(q: Tensor, k: Tensor, key_lengths: Tensor | None, query_lengths: Tensor | None) -> None:
    """Raise ValueError unless the lengths (B,) count rows of q (B, L_q, H, D) and k; values on a GPU are not read."""
    for name, lengths, x in (("key_lengths", key_lengths, k), ("query_lengths", query_lengths, q)):
        if lengths is None:
            continue
        check_tensor(name, lengths)
        if tuple(lengths.shape) != (x.shape[0],) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name}: {lengths.dtype} of shape {tuple(lengths.shape)} given; it must be int32 or int64 of shape "
                f"(B,) = ({x.shape[0]},): for a mask, key_lengths_from_mask(mask)"
            )
        if lengths.device != x.device:
            raise ValueError(f"{name}: on {lengths.device} given, q is on {x.device}; move it there")
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
            listed = lengths.tolist()
            if any(not 0 <= length <= x.shape[1] for length in listed):
                raise ValueError(f"{name}: {listed} given; each must be from 0 to {x.shape[1]}")


def mask_of_lengths(
    q: Tensor, k: Tensor, causal: bool, key_lengths: Tensor | None, query_lengths: Tensor | None
) -> Tensor:
    """The same as a boolean mask, (B, 1, 1, L_k) or (B, 1, L_q, L_k); causal alignment, at the end of what exists, is
    in it.
    """
    keys = torch.full((q.shape[0],), k.shape[1], device=q.device) if key_lengths is None else key_lengths
    j = torch.arange(k.shape[1], device=q.device)
    look = (j < keys[:, None])[:, None, None]
    if query_lengths is not None:
        look = look & (torch.arange(q.shape[1], device=q.device) < query_lengths[:, None])[:, None, :, None]
    if causal:
        last = keys - (q.shape[1] if query_lengths is None else query_lengths)
        look = look & (j <= torch.arange(q.shape[1], device=q.device)[:, None] + last[:, None, None, None])
    return look


def packed_in_place(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, query_lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Packing]:
    """q (B * L_q, H, D), k and v (B * L_k, G, D), and offsets by which each entry runs alone: nothing is moved, and
    nobody waits for the lengths.

    An entry is three sequences: the rows that exist; the queries behind them, which have no keys; and the keys behind
    them, at which nothing looks. Without ``query_lengths`` the second is left out.
    """
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    one = torch.ones(batch, dtype=torch.int32, device=q.device)
    in_k = keys * one if key_lengths is None else key_lengths.to(torch.int32).clamp(0, keys)
    if query_lengths is None:
        ends_q, ends_k = [queries * one] * 2, [in_k, keys * one]
    else:
        in_q = query_lengths.to(torch.int32).clamp(0, queries)
        ends_q, ends_k = [in_q, queries * one, queries * one], [in_k, in_k, keys * one]
    packing = Packing(_offsets(ends_q, queries), _offsets(ends_k, keys), queries, keys)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), packing


def _offsets(ends: list[Tensor], rows: int) -> Tensor:
    """Offsets from where the sequences of each entry end in it, (B,) each, one entry after the other."""
    first = rows * torch.arange(ends[0].shape[0], dtype=torch.int32, device=ends[0].device)
    return torch.cat([first.new_zeros(1), (torch.stack(ends, 1) + first[:, None]).flatten()])
