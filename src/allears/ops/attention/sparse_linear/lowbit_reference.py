"""The softmax branch with INT8 Q K^T and FP8 P V, and both of its gradients; the README has the equations.

Shapes: B batch, H query heads, L_q queries, L_k keys, D head size, N keys of a block.
"""

import math
from typing import Any

import torch
from torch import Tensor

from allears.ops.attention.lowbit.inputs import DTYPES
from allears.ops.attention.lowbit.online_softmax import LN_2, LOG2_E, exp2_below, key_tiles, of_seen
from allears.ops.attention.lowbit.quantise import (
    E4M3_TOP,
    dequantise_blocks,
    dequantise_rows,
    quantise_e4m3_blocks,
    quantise_int8_blocks,
    quantise_int8_rows,
    to_e4m3,
)
from allears.ops.attention.sparse_linear.options import SparseLinear


def lowbit_softmax_branch(
    q: Tensor, k: Tensor, v: Tensor, picked: Tensor, factor: float, options: SparseLinear, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax over the picked keys, with rounded operands; differentiable as ``options.backward`` says.

    Args:
        q: (B, H, L_q, D) float32.
        k, v: (B, H, L_k, D) float32, keys smoothed; zeros in padding.
        picked: (B, H, L_q, L_k) bool.
        factor: on the logits.
        dtype: to which the backward rounds P and dS before they are multiplied; that of the caller's q.

    Returns:
        Output (B, H, L_q, D) and log-sum-exp of the smoothed logits (B, H, L_q), float32; 0 and -inf without keys.

    Raises:
        ValueError: ``dtype`` is float64.
    """
    if dtype not in DTYPES:
        raise ValueError(f"q: {dtype} given; precision='int8_fp8' takes float16, bfloat16 and float32, or use 'exact'")
    out, lse = _Branch.apply(q, k, v, picked, factor, options.block_k, options.backward == "matched", dtype)
    return out, lse


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        picked: Tensor,
        factor: float,
        block: int,
        matched: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        out, lse = rounded_forward(*rounded(q, k, v, block), picked, factor, block)
        ctx.save_for_backward(q, k, v, picked, out, lse)
        ctx.rest = (factor, block, matched, dtype)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        q, k, v, picked, out, lse = ctx.saved_tensors
        factor, block, matched, dtype = ctx.rest
        d_out = torch.zeros_like(out) if d_out is None else d_out
        if matched:
            q, k, v = rounded(q, k, v, block)
        logits = (q @ k.transpose(-1, -2) * (factor * LOG2_E)).masked_fill(~picked, -math.inf)
        weights = exp2_below(logits, lse[..., None] * LOG2_E)
        d_weights = d_out @ v.transpose(-1, -2)
        shift = (weights * d_weights).sum(-1) if matched else (d_out * out).sum(-1)
        shift = shift if d_lse is None else shift - of_seen(d_lse, lse)
        d_logits = _narrow(weights * (d_weights - shift[..., None]), dtype)
        d_q, d_k = d_logits @ k * factor, d_logits.transpose(-1, -2) @ q * factor
        return d_q, d_k, _narrow(weights, dtype).transpose(-1, -2) @ d_out, None, None, None, None, None


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()


def rounded(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D) as the products see them, float32: INT8 with a scale a query, INT8 with a scale for each
    block of keys, E4M3 with a scale for each block of values.
    """
    queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    q_hat = dequantise_rows(*quantise_int8_rows(queries))
    k_hat = dequantise_blocks(*quantise_int8_blocks(keys, block), block)
    v_hat = dequantise_blocks(*quantise_e4m3_blocks(values, block), block)
    return q_hat.transpose(1, 2), k_hat.transpose(1, 2), v_hat.transpose(1, 2)


def rounded_forward(
    q: Tensor, k: Tensor, v: Tensor, picked: Tensor, factor: float, block: int
) -> tuple[Tensor, Tensor]:
    """Online softmax over blocks of keys in rising order, in base 2, of operands that are rounded already.

    The probabilities of a block, relative to the maximum known at it, are rounded to E4M3 at 448 times their size; the
    sum of a row is of the unrounded ones. Shapes and results as in :func:`lowbit_softmax_branch`.
    """
    out = torch.zeros_like(q)
    total = q.new_zeros(q.shape[:-1])
    maximum = torch.full_like(total, -math.inf)
    for tile in key_tiles(k.shape[2], block):
        logits = q @ k[:, :, tile].transpose(-1, -2) * (factor * LOG2_E)
        logits = logits.masked_fill(~picked[..., tile], -math.inf)
        known = maximum
        maximum = torch.maximum(known, logits.amax(-1))
        weights = exp2_below(logits, maximum[..., None])
        decay = exp2_below(known, maximum)
        total = total * decay + weights.sum(-1)
        out = out * decay[..., None] + to_e4m3(weights * E4M3_TOP).float() / E4M3_TOP @ v[:, :, tile]
    return out / torch.where(total == 0, 1.0, total)[..., None], (maximum + total.log2()) * LN_2
