"""A checked call as its kernel gets it: lengths of padded entries become packed sequences, or a mask.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size; packed T_q, T_k rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.call import Facts, Packing, autocast_inputs, check_packing, check_tensors, gather_facts
from allears.ops.attention.lengths import check_padding, mask_of_lengths, packed_in_place
from allears.ops.attention.spec import AttentionSpec

AS_MASK = "lengths as a boolean mask"
AS_SEQUENCES = "lengths as packed sequences, where they lie"


class Prepared(NamedTuple):
    """q (B, L_q, H, D), k and v (B, L_k, G, D), or packed ones with their packing; ``form`` says how lengths of padded
    entries are told to the kernel, and is empty where there are none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    packing: Packing | None
    form: str = ""

    def facts(self, return_lse: bool) -> Facts:
        """What decides the kernel."""
        return gather_facts(self.q, self.k, self.v, self.mask, self.causal, self.packing is not None, return_lse)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mask: Tensor | None,
    packing: tuple[Tensor | None, Tensor | None, int | None, int | None],
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
) -> Prepared:
    """The arguments of :func:`~allears.ops.attention.dispatch.attention`, its offsets and maxima as ``packing``.

    Raises:
        ValueError: they do not fit one another.
    """
    q, k, v = autocast_inputs(q, k, v)
    packed = packing[0] is not None or packing[1] is not None
    check_tensors(q, k, v, mask, packed)
    if key_lengths is None and query_lengths is None:
        return Prepared(q, k, v, mask, spec.causal, check_packing(q, k, *packing))
    if packed or mask is not None or packing[2] is not None or packing[3] is not None:
        name = "mask" if mask is not None else "cu_seqlens or max_seqlen"
        raise ValueError(f"key_lengths, query_lengths: given beside {name}; each says which rows exist, give one")
    check_padding(q, k, key_lengths, query_lengths)
    if spec.numerics == "exact" and spec.sparse is None:
        return Prepared(q, k, v, mask_of_lengths(q, k, spec.causal, key_lengths, query_lengths), False, None, AS_MASK)
    if q.shape[0] == 0:
        return Prepared(q, k, v, None, spec.causal, None)
    q, k, v, sequences = packed_in_place(q, k, v, key_lengths, query_lengths)
    return Prepared(q, k, v, None, spec.causal, sequences, AS_SEQUENCES)


def padded(result: Tensor | tuple[Tensor, Tensor], shape: torch.Size) -> Tensor | tuple[Tensor, Tensor]:
    """Output (B * L_q, H, D) and log-sum-exp (H, B * L_q) as (B, L_q, H, D) and (B, H, L_q)."""
    if isinstance(result, tuple):
        return result[0].unflatten(0, shape), result[1].unflatten(1, shape).transpose(0, 1)
    return result.unflatten(0, shape)
