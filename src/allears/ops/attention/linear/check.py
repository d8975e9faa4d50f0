"""A call of linear attention, checked before any kernel sees it.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size; packed T rows of S sequences.
"""

from itertools import pairwise

import torch
from torch import Tensor

from allears.ops.attention.call import check_tensor, check_tensors
from allears.ops.attention.linear.conv import check_conv
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.state import LinearState, check_state


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions,
    *,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    causal: bool,
    state: LinearState | None,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments of :func:`~allears.ops.attention.linear.call.linear_attention` fit."""
    more = {"scale": scale, "conv_weight": conv_weight, "conv_bias": conv_bias}
    for name, x in (more | {"lengths": lengths, "cu_seqlens": cu_seqlens}).items():
        if x is not None:
            check_tensor(name, x)
    check_tensors(q, k, v, None, packed=cu_seqlens is not None)
    if k.shape[-2] != q.shape[-2]:
        raise ValueError(
            f"k, v: {k.shape[-2]} heads given beside {q.shape[-2]} of q; linear attention takes as many key heads as "
            f"query heads: repeat k and v by repeat_interleave over their heads"
        )
    _check_scale(q, options, scale)
    taps = check_conv(v, conv_weight, conv_bias, causal)
    rows, keys = q.shape[-3], k.shape[-3]
    if rows != keys and (causal or conv_weight is not None or cu_seqlens is not None):
        which = "causal" if causal else "conv_weight" if conv_weight is not None else "cu_seqlens"
        raise ValueError(
            f"{which}: {rows} queries and {keys} keys given; it needs as many queries as keys"
            + ("; the keys of the past go into the state" if causal else ", or leave it out for attention to a context")
        )
    batch = q.shape[0] if cu_seqlens is None else _check_offsets(q, cu_seqlens)
    if lengths is not None:
        check_lengths(k, lengths, packed=cu_seqlens is not None)
    if state is not None:
        if not causal:
            raise ValueError("state: given without causal=True; only causal attention has a past, leave it out")
        check_state(state, v, batch, taps)


def _check_scale(q: Tensor, options: LinearOptions, scale: Tensor | None) -> None:
    if scale is None:
        return
    if options.feature_map != "focused":
        raise ValueError(f"scale: given with the feature map {options.feature_map!r}; only 'focused' has one")
    wanted = tuple(q.shape[-2:])
    if tuple(scale.shape) != wanted or not scale.is_floating_point():
        raise ValueError(f"scale: {scale.dtype} {tuple(scale.shape)} given; it must be floating (H, D) = {wanted}")
    if scale.device != q.device:
        raise ValueError(f"scale: on {scale.device} given, q is on {q.device}; move it there")


def check_lengths(k: Tensor, lengths: Tensor, packed: bool) -> None:
    """Raise ValueError unless lengths (B,) count rows of k (B, L_k, G, D); values on a GPU are not read."""
    if packed:
        raise ValueError("lengths: given with cu_seqlens; packed sequences have no padding, give one of the two")
    if lengths.shape != k.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths: {lengths.dtype} {tuple(lengths.shape)} given; it must be int32 or int64 of shape (B,) = "
            f"({k.shape[0]},)"
        )
    if lengths.device != k.device:
        raise ValueError(f"lengths: on {lengths.device} given, k is on {k.device}; move it there")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        listed = lengths.tolist()
        if any(length < 0 or length > k.shape[1] for length in listed):
            raise ValueError(f"lengths: {listed} given; each must be from 0 to the number of keys, {k.shape[1]}")


def _check_offsets(q: Tensor, cu_seqlens: Tensor) -> int:
    """S of packed sequences."""
    shape, kinds = cu_seqlens.shape, (torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or shape[0] < 2 or cu_seqlens.dtype not in kinds:
        raise ValueError(
            f"cu_seqlens: {cu_seqlens.dtype} {tuple(shape)} given; it must be int32 or int64 of shape (S + 1,), S >= 1"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens: on {cu_seqlens.device} given, q is on {q.device}; move it there")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != q.shape[0] or any(a > b for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens: {ends} given; it must rise from 0 to the number of rows, {q.shape[0]}")
    return shape[0] - 1
