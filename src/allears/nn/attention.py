"""Attention as modules: query-key norm, rotary positions, grouped heads, and any kernel of the engine through its spec.

Shapes: B batch, L positions, M positions of a context, C channels, H query heads, G key/value heads, D head size.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allears.nn.rope import apply_rope, rope_table
from allears.ops.attention import AttentionSpec, attention


class KeyValues(NamedTuple):
    """What :meth:`SelfAttention.step` carries from call to call. A value: a step returns a new one.

    Args:
        k, v: (B, L, G, D), keys (rotated, normalised) and values of the last L positions.
        position: number of positions seen so far, and so the position of the next one.
    """

    k: Tensor
    v: Tensor
    position: int


class SelfAttention(nn.Module):
    """x (B, L, C) to (B, L, C).

    Args:
        channels: C, a multiple of ``heads``.
        heads: H, number of query heads.
        rope: rotate queries and keys by position; without it the order of x has no meaning.
        qk_norm: RMS-normalise queries and keys per head (steadier training at large sizes).
        spec: which attention; see :class:`AttentionSpec`.
        kv_heads: G, which divides H; H // G query heads share a key/value head (grouped-query attention, Ainslie et
            al., 2023). ``None``: G = H.
        causal: a position sees itself and what came before; the same as ``AttentionSpec(causal=True)``.
        core: attends in place of ``spec``: a module that takes q (B, L, H, D), k and v (B, L, G, D) and a mask or
            ``None`` to (B, L, H, D), as :class:`SparseLinearAttention` does. It may be set and taken away later.

    Raises:
        ValueError: the heads do not divide the channels, or the key/value heads the heads.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        rope: bool = True,
        qk_norm: bool = False,
        spec: AttentionSpec | None = None,
        kv_heads: int | None = None,
        causal: bool = False,
        core: nn.Module | None = None,
    ) -> None:
        super().__init__()
        spec = spec or AttentionSpec()
        self.spec = replace(spec, causal=True) if causal else spec
        self.heads, self.kv_heads, self.head_dim = _head_sizes(channels, heads, kv_heads)
        self.rope = rope
        self.qkv = nn.Linear(channels, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.out = nn.Linear(channels, channels, bias=False)
        self.core = core

    def forward(self, x: Tensor, mask: Tensor | None = None, offset: int = 0, lengths: Tensor | None = None) -> Tensor:
        """x (B, L, C), mask broadcastable to (B, H, L, L), ``offset`` the position of x's first row.

        ``lengths`` (B,) int: how many rows of each entry exist. Any kernel takes them; what stands behind must be
        finite, changes nothing, and comes back as 0.
        """
        q, k, v = self._project(x, offset)
        return self.out(_attend(self.core, q, k, v, self.spec, mask, lengths, lengths).flatten(2))

    def step(self, x: Tensor, state: KeyValues | None = None, keep: int | None = None) -> tuple[Tensor, KeyValues]:
        """The next rows of a stream: x (B, L, C) and what came before to (B, L, C) and the new state.

        Steps of any lengths give what ``forward`` gives on the whole stream, if the attention is causal.

        Args:
            x: (B, L, C), L at least 1.
            state: from the step before; ``None`` at the beginning.
            keep: only the last ``keep`` positions stay in the state (a stream without end in bounded memory); later
                steps do not see the others.

        Raises:
            ValueError: the module is not causal, so that the past would depend on the future; or it has a core, which
                takes whole sequences.
        """
        if self.core is not None:
            raise ValueError(f"step: {type(self.core).__name__} attends here, which has no steps; set core to None")
        if not self.spec.causal:
            raise ValueError(
                "step: this module is not causal, so a stream has no exact steps; build it with causal=True"
            )
        if keep is not None and keep < 1:
            raise ValueError(f"keep: {keep} given; at least 1 position must stay, or None for all")
        position = state.position if state is not None else 0
        q, k, v = self._project(x, position)
        if state is not None:
            k, v = torch.cat([state.k, k], dim=1), torch.cat([state.v, v], dim=1)
        y = self.out(attention(q, k, v, self.spec).flatten(2))
        if keep is not None:
            k, v = k[:, -keep:], v[:, -keep:]
        return y, KeyValues(k, v, position + x.shape[1])

    def _project(self, x: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, L, H, D), k and v (B, L, G, D); queries and keys are rotated together, as one tensor."""
        both = self.heads + self.kv_heads
        qk, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split((both, self.kv_heads), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((self.heads, self.kv_heads), dim=2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=2).to(v.dtype)
        if self.rope:
            qk = apply_rope(qk, rope_table(x.shape[1], self.head_dim, x.device, start=offset))
        q, k = qk.split((self.heads, self.kv_heads), dim=2)
        return q, k, v


class CrossAttention(nn.Module):
    """x (B, L, C) looks at a context (B, M, C') and becomes (B, L, C). Positions play no part.

    Args:
        channels: C, a multiple of ``heads``.
        heads: H, number of query heads.
        context_channels: C'; ``None`` means C.
        qk_norm: RMS-normalise queries and keys per head.
        spec: which attention; not causal.
        kv_heads: G, as in :class:`SelfAttention`.
        core: as in :class:`SelfAttention`.

    Raises:
        ValueError: the heads do not divide the channels, the key/value heads not the heads, or the spec is causal.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        context_channels: int | None = None,
        qk_norm: bool = False,
        spec: AttentionSpec | None = None,
        kv_heads: int | None = None,
        core: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec or AttentionSpec()
        if self.spec.causal:
            raise ValueError("spec: causal=True given; a context has no order relative to x, so use causal=False")
        self.heads, self.kv_heads, self.head_dim = _head_sizes(channels, heads, kv_heads)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_channels or channels, 2 * self.kv_heads * self.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-5) if qk_norm else None
        self.out = nn.Linear(channels, channels, bias=False)
        self.core = core

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, context_lengths: Tensor | None = None
    ) -> Tensor:
        """x (B, L, C), context (B, M, C'), mask broadcastable to (B, H, L, M).

        ``context_lengths`` (B,) int: how many rows of the context exist in each entry, as ``key_lengths_from_mask``
        makes of a padding mask. Any kernel takes them; a module as core does not.
        """
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv(context).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.out(_attend(self.core, q, k, v, self.spec, mask, context_lengths).flatten(2))


def _attend(
    core: nn.Module | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None = None,
) -> Tensor:
    if core is None and key_lengths is None:
        return attention(q, k, v, spec, mask)
    if core is None:
        return attention(q, k, v, spec, mask, key_lengths=key_lengths, query_lengths=query_lengths)
    if getattr(core, "causal", spec.causal) != spec.causal:
        raise ValueError(f"core: {type(core).__name__} has causal={core.causal}, this layer causal={spec.causal}")
    if key_lengths is None:
        return core(q, k, v, mask)
    if query_lengths is None:
        raise ValueError(f"context_lengths: given, but {type(core).__name__} takes none; set core to None")
    return core(q, k, v, mask, lengths=key_lengths)


def _head_sizes(channels: int, heads: int, kv_heads: int | None) -> tuple[int, int, int]:
    """H, G and D."""
    if channels % heads:
        raise ValueError(f"heads: {heads} does not divide channels {channels}")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads: {kv_heads} does not divide heads {heads}")
    return heads, kv_heads, channels // heads


class GatedConv(nn.Module):
    """Feed-forward with a neighbourhood: a 3x3 convolution to a gated width, then back (after the Conv-SwiGLU of
    TF-Locoformer, in 2-D).

    x (B, T, F, C) to (B, T, F, C).
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.widen = ChannelsLastConv(channels, 2 * hidden, kernel_size=3, padding=1)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.glu(self.widen(x)))


class ChannelsLastConv(nn.Conv2d):
    """A 2-D convolution on (B, T, F, C): the layout in which linear layers and norms need no copies."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
