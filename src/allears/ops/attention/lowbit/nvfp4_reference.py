"""SageAttention3's forward (arXiv 2505.11594, section 3): both products in NVFP4. What numerics nvfp4 means.

1. K loses its mean over all keys; Q the mean of each block of 128 queries, whose product with the smoothed K is added
   to the scores in float32 ("delta S").
2. Q and K in NVFP4 along D, V along its keys. S = Q4 K4^T + delta S.
3. Two-level P. The paper scales each row of P by its maximum / (448 * 6). In an online softmax the maximum, relative
   to the running one, is 1, so the factor is the constant 1/2688: P4 = NVFP4(2688 * 2^(S - m)) in groups of 16 keys,
   and the product is divided by 2688. Direct P (``two_level_p=False``): P4 = NVFP4(2^(S - m)).
4. The row sum is that of the P that is not rounded, in float32. The last keys, fewer than 16, make a group with zeros.

The products of E2M1 times E4M3 are formed in float32 from the exact values, so that only sums are rounded.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, R = H / G, D head size, N keys of a tile.
"""

from torch import Tensor

from allears.ops.attention.lowbit.nvfp4 import E2M1_TOP, round_to_nvfp4
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import E4M3_TOP
from allears.ops.attention.lowbit.rounding import Round, Rounding, rounded_forward

P_TOP = E4M3_TOP * E2M1_TOP  # 2688: what the largest weight becomes on two levels


def nvfp4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    rounding: Round = round_to_nvfp4,
) -> tuple[Tensor, Tensor]:
    """Attention in NVFP4.

    Args:
        q: (B, L_q, H, D), float16, bfloat16 or float32, D at most 256.
        k, v: (B, L_k, G, D).
        causal: query ``i`` sees keys up to ``i + L_k - L_q``.
        scale: factor on the logits; ``None``: ``1 / sqrt(D)``.
        options: ``smooth_k``, ``smooth_q`` (``None``: on) and ``two_level_p`` count here.
        rounding: (..., N) -> the values that it has in the 4-bit format, grouped along N; ``round_to_mxfp4`` to
        compare.

    Returns:
        Output (B, L_q, H, D) in q's dtype, and the natural log-sum-exp of the logits of the given k, float32 (B, H,
        L_q). A query without keys gives 0 and -inf. An infinity or a NaN makes NaN of every output that shares its
        group.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or ``scale`` is not positive.
    """
    options = options or LowBit()
    return rounded_forward(
        q,
        k,
        v,
        four_bit_rounding(options.two_level_p, rounding),
        smooth_q=options.smooth_q is not False,
        smooth_k=options.smooth_k,
        causal=causal,
        scale=scale,
    )


def four_bit_rounding(two_level_p: bool = True, rounding: Round = round_to_nvfp4) -> Rounding:
    """Q and K grouped along D, V along its keys, P along its keys on one level or two."""

    def values(v: Tensor) -> Tensor:
        return rounding(v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def weights(p: Tensor) -> Tensor:
        return rounding(p * P_TOP) / P_TOP if two_level_p else rounding(p)

    return Rounding(rounding, rounding, values, weights)
