"""W8A8 in plain PyTorch, on any device: the definition that kernels follow, and what a CPU runs.

* ``scale = max|x| / top`` over a row or a 128 x 128 tile (top: 127 or 448); ``value = round(x / scale)``, half to even.
  The quantisers of ``ops/attention/lowbit/quantise.py`` say what happens to zeros, tiny numbers, infinities and NaN.
* ``y = sum over blocks of 128 k of (a8 b8^T) * s_a * s_b``, plus a bias, in float32; with a scale a row, all blocks
  have the same and it is taken out of the sum. Sums of products of INT8 are exact: 127 * 127 * 1024 < 2^24.

Shapes: M rows, K summed, N columns, KP = K rounded up to 16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.lowbit.quantise import scale_of, to_e4m3, to_int8
from allears.ops.attention.lowbit.quantise import scaled as over_scale
from allears.ops.gemm.schemes import TILE, Quantised, Scheme, padded_columns, row_count, scheme_of

_EXACT = 1024  # products of INT8 whose sum float32 holds exactly


def quantise_reference(x: Tensor, scheme: str) -> Quantised:
    """x (..., K), floating, to :class:`Quantised`."""
    kind = scheme_of(scheme)
    rows, columns = row_count(x.shape), x.shape[-1]
    flat = x.reshape(rows, columns).float()
    scale = _scales(flat, kind)
    wide = scale[:, None]
    if kind.tiled:
        wide = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    values = to_e4m3(over_scale(flat, wide)) if kind.fp8 else to_int8(flat, wide)
    spare = padded_columns(columns) - columns
    if spare:
        values = F.pad(values.view(torch.int8), (0, spare)).view(kind.dtype)
    return Quantised(values.contiguous(), scale, scheme, tuple(x.shape), x.dtype)


def _scales(flat: Tensor, scheme: Scheme) -> Tensor:
    rows, columns = flat.shape
    size = flat.abs()
    if not scheme.tiled:
        largest = size.amax(1) if columns else size.new_zeros(rows)
    else:
        padded = F.pad(size, (0, -columns % TILE, 0, -rows % TILE))
        high, wide = padded.shape[0] // TILE, padded.shape[1] // TILE
        tiles = padded.view(high, TILE, wide, TILE)
        largest = tiles.amax((1, 3)) if tiles.numel() else size.new_zeros(high, wide)
    return scale_of(largest, scheme.top)


def product_reference(a: Quantised, b: Quantised, bias: Tensor | None = None) -> Tensor:
    """``a b^T + bias``: a (M, K) and b (N, K) of one scheme, bias (N,), to (M, N) in the dtype of a."""
    scheme = scheme_of(a.scheme)
    with torch.autocast(a.values.device.type, enabled=False):
        out = _tile_product(a, b) if scheme.tiled else _row_product(a, b)
    if bias is not None:
        out = out + bias.float()
    return out.to(a.dtype)


def _row_product(a: Quantised, b: Quantised) -> Tensor:
    total = a.scale.new_zeros(a.values.shape[0], b.values.shape[0])
    inner = a.shape[-1]
    step = max(inner, 1) if scheme_of(a.scheme).fp8 else _EXACT
    for start in range(0, inner, step):
        part = slice(start, start + step)
        total += a.values[:, part].float() @ b.values[:, part].float().T
    return total * a.scale[:, None] * b.scale[None, :]


def _tile_product(a: Quantised, b: Quantised) -> Tensor:
    total = a.scale.new_zeros(a.values.shape[0], b.values.shape[0])
    a_scale = a.scale.repeat_interleave(TILE, 0)[: a.values.shape[0]]
    b_scale = b.scale.repeat_interleave(TILE, 0)[: b.values.shape[0]]
    for block in range(a.scale.shape[1]):
        part = slice(block * TILE, (block + 1) * TILE)
        sums = a.values[:, part].float() @ b.values[:, part].float().T
        total += sums * (a_scale[:, block, None] * b_scale[None, :, block])
    return total
