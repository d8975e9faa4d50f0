"""Padding masks of other libraries for attention that takes no mask: their lengths, found once for all layers.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

import weakref

import torch
from torch import Tensor

from allears.ops.attention import AttentionSpec, attention, key_lengths_from_mask


class PaddingMasks:
    """Attention with a mask by any spec. Low-bit and sparse specs, whose kernels take none, get the key lengths that
    the mask says, or raise if it says something else.

    The mask is read for that, which waits for a GPU: once as long as calls come with the same mask, as the layers of a
    model in one forward do. Under torch.compile and of masks made in inference mode each call reads it.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], tuple[int, ...], Tensor | None] | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, mask: Tensor | None, given: Tensor | None = None
    ) -> Tensor:
        """q (B, L_q, H, D), k and v (B, L_k, G, D), mask broadcastable to (B, H, L_q, L_k), to (B, L_q, H, D).

        Args:
            given: the tensor that ``mask`` was made of for this layer, if it is another one.

        Raises:
            ValueError: the spec takes no mask, and this one is no padding behind the keys.
        """
        if mask is None or (spec.numerics == "exact" and spec.sparse is None):
            return attention(q, k, v, spec, mask)
        given = mask if given is None else given
        mask = mask[(None,) * (4 - mask.dim())]
        lengths = self._lengths_of(mask.expand(q.shape[0], *mask.shape[1:]), given)
        return attention(q, k, v, spec) if lengths is None else attention(q, k, v, spec, key_lengths=lengths)

    def _lengths_of(self, mask: Tensor, given: Tensor) -> Tensor | None:
        """``None`` where no key is hidden: then kernels that take one length only can run."""
        if torch.compiler.is_compiling():
            return key_lengths_from_mask(mask)
        if given.is_inference():  # of these torch does not say whether they have changed
            return _lengths_unless_full(mask)
        state, last = (given._version, *mask.shape), self._last
        if last is not None and last[0]() is given and last[1] == state:
            return last[2]
        lengths = _lengths_unless_full(mask)
        self._last = (weakref.ref(given), state, lengths)
        return lengths


def _lengths_unless_full(mask: Tensor) -> Tensor | None:
    lengths = key_lengths_from_mask(mask)
    return None if lengths.tolist() == [mask.shape[3]] * mask.shape[0] else lengths
