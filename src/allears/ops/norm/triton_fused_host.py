"""Launches of the kernels in ``triton_fused.py``.

Shapes: B entries of L rows, M = B * L rows, C channels, KP = C rounded up to 16.
"""

import torch
import triton
from torch import Tensor

from allears.ops.attention.lowbit.triton_quant import on_hardware
from allears.ops.gemm.schemes import TILE, padded_columns, row_count, scheme_of
from allears.ops.norm.results import empty_results
from allears.ops.norm.triton_fused import FP8, INT8, row_sizes, rows_kernel, tiles_kernel


def fused_forward(
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
    """See ``ops.py``: out or values, scales (or empty), residual sum (or empty); norm "sum" makes the last alone."""
    rows, channels = row_count(x.shape), x.shape[-1]
    flat = _rows(x, rows)
    out, factors, total = empty_results(x, branch, scheme, norm)
    alone = norm == "sum"
    if not rows or not channels:
        return out, factors.zero_(), total
    branch = None if branch is None else _rows(branch, rows)
    length = x.shape[-2] if x.dim() > 2 else rows
    gate_strides, mod_strides = _strides(gate), _strides(scale if scale is not None else shift)
    if scale is not None and shift is not None and _strides(shift) != mod_strides:
        scale, shift = (t.contiguous() for t in torch.broadcast_tensors(scale, shift))
        mod_strides = _strides(scale)
    kind = scheme_of(scheme) if scheme else None
    to = 0 if kind is None else FP8 if kind.fp8 else INT8
    tiled = kind is not None and kind.tiled
    consts = {
        "C": channels,
        "KP": padded_columns(channels),
        "NORM": "none" if alone else norm,
        "HARDWARE": on_hardware(),
    }
    target = out if to == 0 else out.view(torch.uint8)
    # A code is the nearest integer of x * (1 / scale) as rounded: fused with what rounds, a tie would go the other way.
    moments = None
    with torch.cuda.device_of(x):
        if not tiled or norm != "none" or branch is not None:
            moments = flat.new_empty(2, rows, dtype=torch.float32) if tiled else None
            high, width, warps = row_sizes(channels)
            rows_kernel[(triton.cdiv(rows, high),)](
                flat,
                branch,
                gate,
                total if branch is not None else None,
                weight,
                bias,
                scale,
                shift,
                None if tiled or alone else target,
                None if tiled or not to else factors,
                moments,
                rows,
                length,
                eps,
                flat.stride(0),
                0 if branch is None else branch.stride(0),
                *gate_strides,
                *mod_strides,
                ACT=activation,
                TO=0 if tiled else to,
                ROWS=high,
                WIDTH=width,
                num_warps=warps,
                enable_fp_fusion=not to,
                **consts,
            )
        if tiled:
            source = flat if branch is None else total.view(rows, channels)
            tiles_kernel[factors.shape](
                source,
                weight,
                bias,
                scale,
                shift,
                target,
                factors,
                moments if norm != "none" else None,
                rows,
                length,
                source.stride(0),
                *mod_strides,
                ACT=activation,
                TO=to,
                TILE=TILE,
                num_warps=8,
                enable_fp_fusion=not to,
                **consts,
            )
    return out, factors, total


def _rows(x: Tensor, rows: int) -> Tensor:
    """x as (M, C) with a last stride of 1."""
    flat = x.reshape(rows, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of (B or 1, L or 1, C): steps from entry to entry and from row to row, 0 where one serves all."""
    if x is None:
        return 0, 0
    return (x.stride(0) if x.shape[0] > 1 else 0), (x.stride(1) if x.shape[1] > 1 else 0)
