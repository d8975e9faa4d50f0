"""Launches of the product in ``triton_gemm.py``.

Shapes: M rows, N columns, K summed, KP = K rounded up to 16.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from allears.ops.attention.lowbit.triton_quant import on_hardware
from allears.ops.gemm.schemes import SCHEMES, TILE
from allears.ops.gemm.triton_gemm import gemm_kernel
from allears.ops.gemm.tuned import Config, chip_of, config_for


def product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    scheme: str,
    dtype: torch.dtype,
    config: Config | None = None,
    maps: bool | None = None,
) -> Tensor:
    """a (M, KP) times b (N, KP) to (M, N) in ``dtype``; see ``ops.py``.

    Args:
        config: instead of the tuned one.
        maps: whether tiles come through tensor maps; by default where the chip has them.
    """
    rows, inner = a.shape
    columns = b.shape[0]
    out = a.new_empty((rows, columns), dtype=dtype)
    if not out.numel():
        return out
    major, minor = torch.cuda.get_device_capability(a.device) if a.is_cuda else (9, 0)
    chip = chip_of(10 * major + minor)
    if config is None:
        config = config_for(chip, scheme, rows, columns, inner, can_specialise())
    maps = chip >= 90 if maps is None else maps
    map_out = maps and config.map_out and columns * out.element_size() % 16 == 0
    constants = {**config.constants(), "MAP_OUT": map_out}
    tiles = triton.cdiv(rows, config.bm) * triton.cdiv(columns, config.bn)
    programs = min(tiles, config.per_sm * _multiprocessors(a.device))
    left, right, target = a, b, out
    if maps:
        from triton.tools.tensor_descriptor import TensorDescriptor

        left = TensorDescriptor(a, [rows, inner], [inner, 1], [config.bm, config.bk])
        right = TensorDescriptor(b, [columns, inner], [inner, 1], [config.bn, config.bk])
        if map_out:
            target = TensorDescriptor(out, [rows, columns], [columns, 1], [config.bm, config.bn])
    with torch.cuda.device_of(a):
        gemm_kernel[(programs,)](
            left,
            right,
            a_scale,
            b_scale,
            bias,
            target,
            rows,
            columns,
            inner,
            columns,
            TILED=SCHEMES[scheme].tiled,
            INT8=not SCHEMES[scheme].fp8,
            TMA=maps,
            TILE=TILE,
            num_warps=config.warps,
            num_stages=config.stages,
            **constants,
        )
    return out


def can_specialise() -> bool:
    """Whether this Triton compiles ``Config.specialise``: 3.6 does, 3.9 refuses; others were not tried."""
    return triton.__version__.startswith("3.6.")


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if on_hardware() else 3
