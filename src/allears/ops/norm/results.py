"""What the fused kernels return, not filled yet; also what a compiled graph knows of it.

Shapes: M rows, C channels, KP = C rounded up to 16.
"""

import torch
from torch import Tensor

from allears.ops.gemm.schemes import padded_columns, row_count, scheme_of


def empty_results(x: Tensor, branch: Tensor | None, scheme: str, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (..., C): the output as x, or values (M, KP); scales, or (0,); the residual sum as x, or (0,)."""
    rows, channels = row_count(x.shape), x.shape[-1]
    total = x.new_empty(x.shape if branch is not None else (0,))
    if not scheme:
        return x.new_empty(0 if norm == "sum" else x.shape), x.new_empty(0, dtype=torch.float32), total
    kind = scheme_of(scheme)
    values = x.new_empty((rows, padded_columns(channels)), dtype=kind.dtype)
    return values, x.new_empty(kind.scale_shape(rows, channels), dtype=torch.float32), total
