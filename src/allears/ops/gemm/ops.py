"""The Triton product of 8-bit matrices as a ``torch.library`` operator, so that a compiled graph holds it whole.

Shapes: M rows, N columns, K summed, KP = K rounded up to 16.
"""

import torch
from torch import Tensor


@torch.library.custom_op("allears::w8a8_triton", mutates_args=())
def w8a8_triton(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, scheme: str, dtype: torch.dtype
) -> Tensor:
    """a (M, KP) times b (N, KP), both as :class:`~allears.ops.gemm.schemes.Quantised` holds them, to (M, N) in dtype.

    Args:
        a_scale, b_scale: of the scheme.
        bias: (N,) or None.
    """
    from allears.ops.gemm.triton_host import product

    return product(a, b, a_scale, b_scale, bias, scheme, dtype)


@w8a8_triton.register_fake
def _w8a8_triton_fake(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, scheme: str, dtype: torch.dtype
) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
