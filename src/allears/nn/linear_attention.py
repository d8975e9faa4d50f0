"""Focused linear attention as modules (FLASepformer; FLatten Transformer, Han et al., ICCV 2023): time and memory grow
with the length, and if causal a stream of any length runs in bounded memory.

Shapes: B batch, L positions, C channels, H heads, D = C / H, K taps of the convolution of V; packed T positions of S
sequences.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from allears.nn.linear import Linear
from allears.nn.rope import apply_rope, rope_table
from allears.ops.attention.linear.call import linear_attention
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.state import LinearState


class StreamState(NamedTuple):
    """What :meth:`FocusedLinearAttention.step` carries from call to call. A value: a step returns a new one.

    Args:
        attention: sums over the past, of a size that does not grow.
        position: number of positions seen so far, and so the position of the next one.
    """

    attention: LinearState
    position: int


class FocusedLinearAttention(nn.Module):
    """x (B, L, C) to (B, L, C): projections with biases, focused linear attention of H heads with a learned scale, a
    depthwise convolution of the values added to it, and an output projection.

    Args:
        channels: C, a multiple of ``heads``.
        heads: H.
        causal: a position sees itself and what came before, also in the convolution; :meth:`step` needs it.
        rope: rotate queries and keys by position before the feature map (off in the released separation model).
        options: feature map, its power, norm and epsilon. The learned scale, softplus of a parameter that begins at 0,
            belongs to the focused map alone.
        conv_taps: K of the convolution, one of D channels that all heads share; odd unless causal, 0 for none.
        kernel: which kernel, see :func:`~allears.ops.attention.linear.call.linear_attention`.

    Raises:
        ValueError: the heads do not divide the channels, rotary positions meet an odd D, or ``conv_taps`` is negative,
            or even and not causal.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        causal: bool = False,
        rope: bool = False,
        options: LinearOptions | None = None,
        conv_taps: int = 5,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads: {heads} does not divide channels {channels}")
        if conv_taps < 0 or (conv_taps and not causal and conv_taps % 2 == 0):
            raise ValueError(f"conv_taps: {conv_taps} given; it must be odd, or any positive number if causal, or 0")
        self.heads, self.head_dim = heads, channels // heads
        if rope and self.head_dim % 2:
            raise ValueError(f"rope: True given with {self.head_dim} channels a head; it needs an even number")
        self.causal, self.rope, self.kernel = causal, rope, kernel
        self.options = options or LinearOptions()
        self.qkv = Linear(channels, 3 * channels)
        focused = self.options.feature_map == "focused"
        self.raw_scale = nn.Parameter(self.qkv.weight.new_zeros(heads, self.head_dim)) if focused else None
        size = self.head_dim
        self.conv = nn.Conv1d(size, size, conv_taps, groups=size) if conv_taps else None
        self.out = Linear(channels, channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, L, C) to (B, L, C), or packed (T, C) to (T, C).

        Args:
            x: the sequences.
            lengths: (B,) int, how many positions of each exist; those behind them change nothing.
            cu_seqlens: (S + 1,) int offsets of packed sequences; not with rotary positions.
        """
        if cu_seqlens is not None and self.rope:
            raise ValueError("cu_seqlens: given to a module with rope=True; pad the sequences and give lengths")
        q, k, v = self._project(x, 0)
        y = linear_attention(q, k, v, self.options, lengths=lengths, cu_seqlens=cu_seqlens, **self._choices())
        return self.out(y.flatten(-2))

    def step(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """The next rows of a stream: x (B, L, C) and what came before to (B, L, C) and the new state.

        Steps of any lengths give what ``forward`` gives on the whole stream.

        Args:
            x: (B, L, C).
            state: from the step before; ``None`` at the beginning.

        Raises:
            ValueError: the module is not causal, so that the past would depend on the future.
        """
        if not self.causal:
            raise ValueError(
                "step: this module is not causal, so a stream has no exact steps; build it with causal=True"
            )
        past, position = state if state is not None else (None, 0)
        q, k, v = self._project(x, position)
        y, new = linear_attention(q, k, v, self.options, state=past, return_state=True, **self._choices())
        return self.out(y.flatten(-2)), StreamState(new, position + x.shape[1])

    def _project(self, x: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (B, L, H, D), or of packed x (T, H, D); rotated from position ``offset`` on."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        if self.rope:
            table = rope_table(x.shape[1], self.head_dim, x.device, start=offset)
            q, k = apply_rope(q, table), apply_rope(k, table)
        return q, k, v

    def _choices(self) -> dict[str, Any]:
        """What every call of :func:`linear_attention` gets."""
        return {
            "scale": F.softplus(self.raw_scale) if self.raw_scale is not None else None,
            "conv_weight": self.conv.weight[:, 0] if self.conv is not None else None,
            "conv_bias": self.conv.bias if self.conv is not None else None,
            "causal": self.causal,
            "kernel": self.kernel,
        }


class GatedLinearAttention(nn.Module):
    """y = x + sigmoid(Linear(Norm(x))) * FocusedLinearAttention(Norm'(x)), (B, L, C) to (B, L, C): a residual whose
    weight every channel of every position chooses.

    Args:
        attention: the inner module, of C channels.
        norm: makes a norm over the last axis from C; called twice, for the gate and for the attention.
    """

    def __init__(self, attention: FocusedLinearAttention, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        channels = attention.out.out_features
        self.attention = attention
        self.norm, self.gate_norm = norm(channels), norm(channels)
        self.gate = Linear(channels, channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Arguments as :meth:`FocusedLinearAttention.forward`."""
        return self._add(x, self.attention(self.norm(x), lengths, cu_seqlens))

    def step(self, x: Tensor, state: StreamState | None = None) -> tuple[Tensor, StreamState]:
        """The next rows of a stream, as :meth:`FocusedLinearAttention.step`."""
        y, new = self.attention.step(self.norm(x), state)
        return self._add(x, y), new

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.gate(self.gate_norm(x)).sigmoid() * y
