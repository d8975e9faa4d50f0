"""Symmetric 8-bit quantisers to ``(values, scales)``: INT8 for each row or block of rows, E4M3 for each block of rows.

One rule for all of them, in float32 with correctly rounded operations:

* ``scale = max|x| / top`` over the elements that share it (top: 127 or 448); a scale below 2^-126 is 0.
* ``value = round(x * (1 / scale))``, half to even, clamped to +-top; 0 where the scale is 0.
* A group that holds an infinity or a NaN has the scale NaN and values 0, so that every result which uses the group is
  NaN: bad input is never hidden, and no integer stands for it.

The last block of a length that the block does not divide is shorter; nothing is padded.

Shapes: B batch, L tokens, H heads, D head size, M = ceil(L / block) blocks.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_TOP = 127.0
UINT8_TOP = 255.0
E4M3_TOP = 448.0
SMALLEST_SCALE = 2.0**-126
KEY_BLOCK = 128  # keys that share a scale of K and of an 8-bit V, and the step of the online softmax
QUERY_TILE = 64  # queries of a tile of sagebwd's backward


def scale_of(largest: Tensor, top: float) -> Tensor:
    """The scale of groups whose largest magnitude is given: ``largest / top``; NaN if not finite, 0 if below 2^-126."""
    # By a tensor: on CUDA, PyTorch divides by a number as a product with its inverse, which is not correctly rounded.
    scale = largest.float() / largest.new_full((), top, dtype=torch.float32)
    scale = torch.where(scale < SMALLEST_SCALE, torch.zeros_like(scale), scale)
    return torch.where(torch.isfinite(scale), scale, torch.full_like(scale, math.nan))


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 / scale)`` in float32, and 0 where the scale is 0 or NaN."""
    usable = scale > 0
    inverse = torch.where(usable, 1.0 / torch.where(usable, scale, torch.ones_like(scale)), torch.zeros_like(scale))
    return torch.where(usable, x.float() * inverse, torch.zeros((), device=x.device))


def to_int8(x: Tensor, scale: Tensor) -> Tensor:
    """Nearest integer of ``x / scale``, half to even, within +-127; ``scale`` broadcasts to ``x``."""
    return scaled(x, scale).round().clamp(-INT8_TOP, INT8_TOP).to(torch.int8)


def quantise_int8(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """INT8 with one scale for all elements along ``dim``: values as ``x``, scales with ``dim`` kept as 1 (float32)."""
    scale = scale_of(x.float().abs().amax(dim=dim, keepdim=True), INT8_TOP)
    return to_int8(x, scale), scale


def quantise_weights(weights: Tensor, dim: int | tuple[int, ...], top: float = INT8_TOP) -> tuple[Tensor, Tensor]:
    """Integers from 0 to ``top`` with one scale for all elements along ``dim``.

    Args:
        weights: none negative, as probabilities are.
        top: 127, or 255 for all levels that 8 bits have.

    Returns:
        The integers in float32 (those up to 255 do not fit INT8), and the scales with ``dim`` kept as 1.
    """
    scale = scale_of(weights.float().amax(dim=dim, keepdim=True), top)
    return scaled(weights, scale).round().clamp(0.0, top), scale


def quantise_int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 with one scale for each token and head.

    Args:
        x: (B, L, H, D), floating.

    Returns:
        int8 (B, L, H, D), and float32 scales (B, H, L).
    """
    values, scale = quantise_int8(x, -1)
    return values, scale.squeeze(-1).transpose(1, 2).contiguous()


def quantise_int8_blocks(x: Tensor, block: int = KEY_BLOCK) -> tuple[Tensor, Tensor]:
    """INT8 with one scale for each block of ``block`` tokens of a head (SageAttention, arXiv 2410.02367).

    Args:
        x: (B, L, H, D), floating.

    Returns:
        int8 (B, L, H, D), and float32 scales (B, H, M).
    """
    scale = scale_of(_block_amax(x.float().abs().amax(-1).transpose(1, 2), block), INT8_TOP)
    rows = rows_of_blocks(scale, x.shape[1], block).transpose(1, 2).unsqueeze(-1)
    return to_int8(x, rows), scale


def quantise_e4m3_blocks(x: Tensor, block: int = KEY_BLOCK) -> tuple[Tensor, Tensor]:
    """FP8 E4M3 with one scale for each block of ``block`` tokens of a head, over all its channels.

    V of SageAttention 2 (arXiv 2411.10958) has one scale a channel instead; with one a block, kernels need no pass over
    all of V before they quantise it.

    Args:
        x: (B, L, H, D), floating.

    Returns:
        float8_e4m3fn (B, L, H, D), and float32 scales (B, H, M).
    """
    scale = scale_of(_block_amax(x.float().abs().amax(-1).transpose(1, 2), block), E4M3_TOP)
    rows = rows_of_blocks(scale, x.shape[1], block).transpose(1, 2).unsqueeze(-1)
    return to_e4m3(scaled(x, rows)), scale


def to_e4m3(x: Tensor) -> Tensor:
    """Nearest E4M3 value, half to even, saturating at +-448; a NaN stays a NaN."""
    return x.float().clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn)


def rows_of_blocks(scale: Tensor, length: int, block: int) -> Tensor:
    """The scale of each token, (B, H, L), from the scales of blocks, (B, H, M)."""
    return scale.repeat_interleave(block, dim=-1)[..., :length]


def dequantise_rows(values: Tensor, scale: Tensor) -> Tensor:
    """float32 (B, L, H, D) of values (B, L, H, D) and scales (B, H, L)."""
    return values.float() * scale.transpose(1, 2).unsqueeze(-1)


def dequantise_blocks(values: Tensor, scale: Tensor, block: int = KEY_BLOCK) -> Tensor:
    """float32 (B, L, H, D) of values (B, L, H, D) and scales (B, H, M)."""
    return dequantise_rows(values, rows_of_blocks(scale, values.shape[1], block))


def _block_amax(x: Tensor, block: int) -> Tensor:
    """(..., L) of magnitudes -> (..., M); a NaN in a block is its result."""
    return F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-(-x.shape[-1] // block), block)).amax(-1)
