"""Launches of the product in ``triton_gemm.py``.

Shapes: M rows, N columns, K summed, KP = K rounded up to 16.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from allears.ops.attention.lowbit.triton_quant import on_hardware
from allears.ops.gemm.schemes import SCHEMES, TILE
from allears.ops.gemm.triton_gemm import gemm_kernel
from allears.ops.gemm.tuned import Config, chip_of, config_for

_THREADS = 16  # that compile at once


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
    out = a.new_empty((rows, b.shape[0]), dtype=dtype)
    if not out.numel():
        return out
    chip = _chip(a)
    if config is None:
        config = config_for(chip, scheme, rows, b.shape[0], inner, can_specialise())
    with torch.cuda.device_of(a):
        programs, given, consts = _launch(a, b, a_scale, b_scale, bias, scheme, out, config, maps)
        gemm_kernel[(programs,)](*given, **consts)
    return out


def compile_ahead(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    scheme: str,
    dtype: torch.dtype,
    configs: Sequence[Config],
) -> None:
    """Compile :func:`product` of these operands for several configs at once, in threads, without running it.

    It saves time and does no more: what does not compile raises when it is launched, and with a Triton that has no
    ``AsyncCompileMode`` each config is compiled at its first launch.
    """
    mode = getattr(triton, "AsyncCompileMode", None)
    if mode is None or not on_hardware() or not a.is_cuda:
        return
    out = a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
    with ThreadPoolExecutor(_THREADS) as threads, torch.cuda.device_of(a), mode(threads, ignore_errors=True):
        for config in configs:
            if config.specialise and not can_specialise():
                continue
            programs, given, consts = _launch(a, b, a_scale, b_scale, bias, scheme, out, config, None)
            with suppress(Exception):  # its launch says it again
                gemm_kernel.warmup(*given, grid=(programs,), **consts)


def _launch(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    scheme: str,
    out: Tensor,
    config: Config,
    maps: bool | None,
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """How many programs, and the arguments of the kernel by place and by name."""
    (rows, inner), columns = a.shape, b.shape[0]
    maps = _chip(a) >= 90 if maps is None else maps
    map_out = maps and config.map_out and columns * out.element_size() % 16 == 0
    tiles = triton.cdiv(rows, config.bm) * triton.cdiv(columns, config.bn)
    programs = min(tiles, config.per_sm * _multiprocessors(a.device))
    left, right, target = a, b, out
    if maps:
        from triton.tools.tensor_descriptor import TensorDescriptor

        left = TensorDescriptor(a, [rows, inner], [inner, 1], [config.bm, config.bk])
        right = TensorDescriptor(b, [columns, inner], [inner, 1], [config.bn, config.bk])
        if map_out:
            target = TensorDescriptor(out, [rows, columns], [columns, 1], [config.bm, config.bn])
    consts = {
        "TILED": SCHEMES[scheme].tiled,
        "INT8": not SCHEMES[scheme].fp8,
        "TMA": maps,
        "TILE": TILE,
        "num_warps": config.warps,
        "num_stages": config.stages,
        **config.constants(),
        "MAP_OUT": map_out,
    }
    return programs, (left, right, a_scale, b_scale, bias, target, rows, columns, inner, columns), consts


def _chip(a: Tensor) -> int:
    major, minor = torch.cuda.get_device_capability(a.device) if a.is_cuda else (9, 0)
    return chip_of(10 * major + minor)


def can_specialise() -> bool:
    """Whether this Triton compiles ``Config.specialise``: 3.6 does, 3.9 refuses; others were not tried."""
    return triton.__version__.startswith("3.6.")


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if on_hardware() else 3
