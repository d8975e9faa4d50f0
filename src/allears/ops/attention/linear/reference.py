"""Linear attention in PyTorch, in float32 (float64 for float64): the definition, and what runs on the CPU.

Time and memory grow with L; :func:`explicit_attention` alone makes the L_q x L_k matrix, for tests.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, K taps of the convolution of V; packed T rows of S
sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor

from allears.ops.attention.linear.chunked import causal_chunked
from allears.ops.attention.linear.conv import convolve_values, next_rows
from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.state import LinearState, new_state


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions,
    *,
    scale: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    causal: bool = False,
    state: LinearState | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearState | None]:
    """out_i = phi(q_i) . mean_j(phi(k_j)^T v_j) / (phi(q_i) . mean_j phi(k_j) + eps) + (convolution of v)_i.

    The means are over all keys, or if causal over those up to i and those in the state. Without keys the first part
    is 0. Arguments as :func:`~allears.ops.attention.linear.call.linear_attention`, which checks them.

    Returns:
        The output, shaped and typed as q, and if causal the state after the last row, else None.
    """
    if cu_seqlens is not None:
        return _over_sequences(q, k, v, options, scale, conv_weight, conv_bias, causal, state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):
        return _attend(q, k, v, options, scale, conv_weight, conv_bias, causal, state, lengths)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    causal: bool,
    state: LinearState | None,
    lengths: Tensor | None,
) -> tuple[Tensor, LinearState | None]:
    padding = None
    if lengths is not None:
        # Zeros before the feature map too: its gradient at NaN would be NaN, and that of the scale is a sum of rows.
        padding = (torch.arange(k.shape[1], device=k.device) >= lengths[:, None])[..., None, None]
        k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
    phi_q, phi_k = map_features(q, options, scale), map_features(k, options, scale)
    if padding is not None:
        phi_k = phi_k.masked_fill(padding, 0.0)
    wide = v.to(phi_k.dtype)
    ends = lengths.long() if lengths is not None else torch.full(k.shape[:1], k.shape[1], device=k.device)
    before, new = None, None
    if causal:
        taps = conv_weight.shape[-1] if conv_weight is not None else 1
        past = state if state is not None else new_state(v, v.shape[0], taps)
        values, weights, kv, k_sum = causal_chunked(phi_q, phi_k, wide, past.kv, past.k_sum)
        before, new = past.v_rows, LinearState(kv, k_sum, past.count + ends, next_rows(v, past.v_rows, lengths))
        place = torch.arange(1, k.shape[1] + 1, device=k.device)
        count = past.count[:, None] + place.minimum(ends[:, None])
    else:
        kv, k_sum = torch.einsum("blhd,blhe->bhde", phi_k, wide), phi_k.sum(1)
        values = torch.einsum("blhd,bhde->blhe", phi_q, kv)
        weights, count = torch.einsum("blhd,bhd->blh", phi_q, k_sum), ends[:, None]
    out = normalise(values, weights, count, options.eps)
    if conv_weight is not None:
        out = out + convolve_values(wide, conv_weight, conv_bias, causal=causal, before=before)
    return out.to(q.dtype), new


def map_features(x: Tensor, options: LinearOptions, scale: Tensor | None) -> Tensor:
    """Features of queries or keys (B, L, H, D) in float32 or float64; scale (H, D) or None."""
    return feature_map(x, options.feature_map, power=options.power, norm=options.norm, scale=scale)


def normalise(values: Tensor, weights: Tensor, count: Tensor, eps: float) -> Tensor:
    """values / (weights + eps * count), the ratio of the means; 0 where there are no keys.

    Args:
        values: (B, L_q, H, D), phi(q) sum phi(k)^T v.
        weights: (B, L_q, H), phi(q) . sum phi(k).
        count: (B, L_q) or (B, 1), number of keys in the sums.
        eps: see :class:`LinearOptions`.
    """
    count = count[..., None]
    below = (weights + eps * count.to(weights.dtype)).masked_fill(count == 0, 1.0)
    return values / below[..., None]


def explicit_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, eps: float, causal: bool = False) -> Tensor:
    """The first part with its matrix written out: phi(Q) phi(K)^T, masked, each row normalised, times V.

    Args:
        phi_q: (B, L_q, H, D), features.
        phi_k, v: (B, L_k, H, D).
        eps: see :class:`LinearOptions`.
        causal: query i sees keys up to i; L_q = L_k.

    Returns:
        (B, L_q, H, D).
    """
    matrix = torch.einsum("bihd,bjhd->bhij", phi_q, phi_k)
    look = torch.ones(matrix.shape[-2:], dtype=torch.bool, device=v.device)
    look = look.tril() if causal else look
    matrix = matrix.masked_fill(~look, 0.0)
    below = matrix.sum(-1, keepdim=True) + eps * look.sum(-1, keepdim=True).to(matrix.dtype)
    return torch.einsum("bhij,bjhd->bihd", matrix / below, v)


def _over_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    causal: bool,
    state: LinearState | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, LinearState | None]:
    """Packed sequences, each by itself: as long as they are in all, and not as long as the longest times S."""
    outs, states = [q[:0]], []
    for s, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        past = None if state is None else LinearState(*(part[s : s + 1] for part in state))
        out, new = linear_attention_reference(
            q[None, a:b],
            k[None, a:b],
            v[None, a:b],
            options,
            scale=scale,
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            causal=causal,
            state=past,
        )
        outs.append(out[0])
        states.append(new)
    out = torch.cat(outs)
    return out, LinearState(*map(torch.cat, zip(*states, strict=True))) if causal else None
