"""What a numerics does to the four operands of attention, as functions from values to rounded values, and its forward.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, R = H / G, D head size, N keys of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from allears.ops.attention.lowbit.inputs import check_inputs, softmax_scale
from allears.ops.attention.lowbit.online_softmax import LOG2_E, merge_heads, online_softmax, split_heads
from allears.ops.attention.lowbit.quantise import (
    E4M3_TOP,
    dequantise_blocks,
    dequantise_rows,
    quantise_e4m3_blocks,
    quantise_int8_blocks,
    quantise_int8_rows,
    to_e4m3,
)
from allears.ops.attention.lowbit.smooth import (
    corrected,
    key_mean_logits,
    query_correction,
    smooth_keys,
    smooth_queries,
)

Round = Callable[[Tensor], Tensor]


class Rounding(NamedTuple):
    """Each takes values and gives float32 values of the same shape.

    queries, keys and values take (B, L, heads, D); weights takes probabilities relative to the running maximum, in
    [0, 1],
    of a tile of keys: (..., N).
    """

    queries: Round
    keys: Round
    values: Round
    weights: Round


def _wide(x: Tensor) -> Tensor:
    return x.float()


UNROUNDED = Rounding(_wide, _wide, _wide, _wide)  # attention as it is without quantisation
INT8_FP8 = Rounding(
    lambda q: dequantise_rows(*quantise_int8_rows(q)),
    lambda k: dequantise_blocks(*quantise_int8_blocks(k)),
    lambda v: dequantise_blocks(*quantise_e4m3_blocks(v)),
    lambda p: to_e4m3(p * E4M3_TOP).float() / E4M3_TOP,
)


class Operands(NamedTuple):
    """q, k, v after smoothing and rounding, float32.

    queries (B, L_q, H, D); q_mean (B, M, H, D) or None; keys (B, L_k, G, D) rounded; smooth_keys (B, L_k, G, D) not
    rounded; k_mean (B, G, D) or None; values (B, L_k, G, D) rounded.
    """

    queries: Tensor
    q_mean: Tensor | None
    keys: Tensor
    smooth_keys: Tensor
    k_mean: Tensor | None
    values: Tensor


def rounded_operands(
    q: Tensor, k: Tensor, v: Tensor, rounding: Rounding, *, smooth_q: bool, smooth_k: bool
) -> Operands:
    """Smooth and round q (B, L_q, H, D), k and v (B, L_k, G, D)."""
    keys, k_mean = smooth_keys(k) if smooth_k else (k.float(), None)
    queries, q_mean = smooth_queries(q) if smooth_q else (q.float(), None)
    return Operands(rounding.queries(queries), q_mean, rounding.keys(keys), keys, k_mean, rounding.values(v))


def rounded_scores(operands: Operands, factor: float) -> Callable[[slice], Tensor]:
    """Scores in base 2 of a tile of keys, with the correction of smoothed queries: tile -> (B, G, R, L_q, N)."""
    groups, length = operands.keys.shape[2], operands.queries.shape[1]
    rows = split_heads(operands.queries, groups)
    columns = operands.keys.transpose(1, 2)

    def scores(tile: slice) -> Tensor:
        return (rows @ columns[:, :, None, tile].transpose(-1, -2)) * (factor * LOG2_E)

    if operands.q_mean is None:
        return scores
    return corrected(scores, query_correction(operands.q_mean, operands.smooth_keys), factor, length, groups)


def rounded_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rounding: Rounding,
    *,
    smooth_q: bool,
    smooth_k: bool,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose operands are rounded; everything else is in float32.

    Args:
        q: (B, L_q, H, D).
        k, v: (B, L_k, G, D).

    Returns:
        Output (B, L_q, H, D) in q's dtype and the natural log-sum-exp of the logits of the given k, float32 (B, H,
        L_q).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``scale`` is not positive.
    """
    check_inputs(q, k, v)
    factor = softmax_scale(scale, q.shape[-1])
    operands = rounded_operands(q, k, v, rounding, smooth_q=smooth_q, smooth_k=smooth_k)
    values = operands.values.transpose(1, 2)

    def product(weights: Tensor, tile: slice) -> Tensor:
        return rounding.weights(weights) @ values[:, :, None, tile]

    shape = (q.shape[0], k.shape[2], q.shape[2] // k.shape[2], q.shape[1], q.shape[3])
    out, lse = online_softmax(rounded_scores(operands, factor), product, shape, k.shape[1], causal, q.device)
    lse = lse.flatten(1, 2)
    if operands.k_mean is not None:
        lse = lse + factor * key_mean_logits(q, operands.k_mean)
    return merge_heads(out).to(q.dtype), lse
