"""Attention with INT8 scores and FP8 or 16-bit values: what int8_fp8 and int8_fp16 mean; their kernels follow.

SageAttention 2 and 2++ (arXiv 2411.10958, 2505.21136) with one scale a token for Q, and for V in E4M3 one for each
block of 128 keys over all channels. Integers are multiplied exactly: a sum of 256 products of INT8 stays below 2^24, so
float32 holds it.

A kernel may keep O in units of the last block's scale of V: O <- O * decay * scale_before / scale_now + tile. The row
sum here is that of the probabilities before they are rounded; in int8_fp8 the Hopper kernel takes that of the rounded
ones, which its matrix unit makes with a column of ones in V, and it goes from the last tile of keys to the first.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size, N keys of a tile;
in packed sequences T_q, T_k tokens in all and S sequences.
"""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from allears.ops.attention.lowbit.inputs import check_inputs, softmax_scale
from allears.ops.attention.lowbit.online_softmax import LOG2_E, merge_heads, online_softmax, split_heads
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import (
    E4M3_TOP,
    INT8_TOP,
    KEY_BLOCK,
    quantise_e4m3_blocks,
    quantise_int8_blocks,
    quantise_int8_rows,
    quantise_weights,
    to_e4m3,
)
from allears.ops.attention.lowbit.smooth import (
    corrected,
    key_mean_logits,
    query_correction,
    smooth_keys,
    smooth_queries,
)

Values = Literal["fp8", "fp16"]
Product = Callable[[Tensor, slice], Tensor]


def int8_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pv: Values,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with INT8 Q and K.

    Args:
        q: (B, L_q, H, D), float16, bfloat16 or float32, D at most 256.
        k, v: (B, L_k, G, D).
        pv: ``"fp8"`` (numerics int8_fp8): probabilities and V in E4M3. ``"fp16"`` (int8_fp16): both in V's own dtype.
        causal: query ``i`` sees keys up to ``i + L_k - L_q``.
        scale: factor on the logits; ``None``: ``1 / sqrt(D)``.
        options: ``smooth_k`` and ``smooth_q`` count here.

    Returns:
        Output (B, L_q, H, D) in q's dtype, and the natural log-sum-exp of the logits of the given k, float32 (B, H,
        L_q). A query without keys gives 0 and -inf. An infinity or a NaN makes NaN of every output that shares its
        scale.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``pv`` or ``scale`` is none of the values above.
    """
    check_inputs(q, k, v)
    if pv not in get_args(Values):
        raise ValueError(f"pv: {pv!r} given; it must be 'fp8' or 'fp16'")
    options = options or LowBit()
    factor = softmax_scale(scale, q.shape[-1])
    groups = k.shape[2]
    product = _fp8_product(v) if pv == "fp8" else _plain_product(v)
    keys, k_mean = smooth_keys(k) if options.smooth_k else (k.float(), None)
    queries, q_mean = smooth_queries(q) if options.smooth_q else (q.float(), None)
    scores = int8_scores(*quantise_int8_rows(queries), *quantise_int8_blocks(keys), factor)
    if q_mean is not None:
        scores = corrected(scores, query_correction(q_mean, keys), factor, q.shape[1], groups)
    shape = (q.shape[0], groups, q.shape[2] // groups, q.shape[1], q.shape[3])
    out, lse = online_softmax(scores, product, shape, k.shape[1], causal, q.device)
    lse = lse.flatten(1, 2)
    if k_mean is not None:
        lse = lse + factor * key_mean_logits(q, k_mean)
    return merge_heads(out).to(q.dtype), lse


def int8_scores(q8: Tensor, q_scale: Tensor, k8: Tensor, k_scale: Tensor, factor: float) -> Callable[[slice], Tensor]:
    """Scores in base 2 of a tile of keys: ``(q8 k8^T) * ((q_scale * factor * log2 e) * k_scale)``.

    Args:
        q8: int8 (B, L_q, H, D); q_scale (B, H, L_q).
        k8: int8 (B, L_k, G, D); k_scale (B, G, M), one for each block of 128 keys.

    Returns:
        tile -> (B, G, R, L_q, N).
    """
    groups = k8.shape[2]
    queries = split_heads(q8, groups).float()
    keys = k8.transpose(1, 2).float()
    rows = (q_scale * (factor * LOG2_E)).unflatten(1, (groups, -1)).unsqueeze(-1)

    def scores(tile: slice) -> Tensor:
        integers = queries @ keys[:, :, None, tile].transpose(-1, -2)
        return integers * (rows * k_scale[:, :, None, None, tile.start // KEY_BLOCK, None])

    return scores


def int8_product(v8: Tensor, v_scale: Tensor, p_top: float = INT8_TOP) -> Product:
    """P V of a tile in INT8 (SageBwd, arXiv 2505.11594): P with one scale for each row, V with one for the block.

    Args:
        v8: int8 (B, L_k, G, D); v_scale (B, G, M).
        p_top: the integer of the largest P: 127, or 255 in unsigned bytes.
    """
    values = v8.transpose(1, 2).float()

    def product(weights: Tensor, tile: slice) -> Tensor:
        p8, p_scale = quantise_weights(weights, -1, p_top)
        return (p8 @ values[:, :, None, tile]) * (p_scale * v_scale[:, :, None, None, tile.start // KEY_BLOCK, None])

    return product


def _fp8_product(v: Tensor) -> Product:
    v8, v_scale = quantise_e4m3_blocks(v)
    values = v8.float().transpose(1, 2)
    blocks = (v_scale / E4M3_TOP).unsqueeze(2)

    def product(weights: Tensor, tile: slice) -> Tensor:
        units = to_e4m3(weights * E4M3_TOP).float() @ values[:, :, None, tile]
        return units * blocks[..., tile.start // KEY_BLOCK, None, None]

    return product


def _plain_product(v: Tensor) -> Product:
    values = v.float().transpose(1, 2)

    def product(weights: Tensor, tile: slice) -> Tensor:
        return weights.to(v.dtype).float() @ values[:, :, None, tile]

    return product
