"""The fused kernels of this folder as ``torch.library`` operators, so that a compiled graph holds them whole.

None has a gradient, changes its inputs, or waits for the GPU. Shapes: B entries, L rows of an entry, C channels,
H heads, D head size; M = B * L, KP = C rounded up to 16.
"""

import torch
from torch import Tensor


@torch.library.custom_op("allears::fused_rows_triton", mutates_args=())
def fused_rows_triton(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as :func:`~allears.ops.norm.fused.fused_rows`, ``scheme`` "" for none; norm "sum" asks
    for the residual sum alone, and the output is then (0,).

    Returns:
        The output (..., C) or with a scheme its values (M, KP); their scales, or (0,); the residual sum (..., C), or
        (0,) without a branch.
    """
    from allears.ops.norm.triton_fused_host import fused_forward

    return fused_forward(x, branch, gate, weight, bias, scale, shift, norm, eps, activation, scheme)


@fused_rows_triton.register_fake
def _fused_rows_fake(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    scheme: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from allears.ops.norm.results import empty_results

    return empty_results(x, branch, scheme, norm)


@torch.library.custom_op("allears::rotate_triton", mutates_args=())
def rotate_triton(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, norm: bool, interleaved: bool
) -> Tensor:
    """RoPE of x (B, L, H, D) by cos and sin (L, D / 2), after an RMS norm over H * D if ``norm``; contiguous."""
    from allears.ops.norm.triton_rope import rotate_forward

    return rotate_forward(x, cos, sin, weight, eps, norm, interleaved)


@rotate_triton.register_fake
def _rotate_fake(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float, norm: bool, interleaved: bool
) -> Tensor:
    return x.new_empty(x.shape)
