"""The door of audio that is read between its samples. A caller who names a kernel gets that one or an error.

Shapes: S stretches, R rows, T samples of a row, N samples read of each stretch.
"""

import torch
from torch import Tensor

from allears.ops.resample.reference import lay_reference, read_reference
from allears.ops.resample.stretches import Stretches
from allears.ops.triton_here import triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

_DTYPES = (torch.int16, torch.float32)
_LARGEST_GRID = 65_535  # of a CUDA grid's second side


def read_at(
    flat: Tensor, first: Tensor, last: Tensor, position: Tensor, speed: Tensor, *, kernel: str = "auto"
) -> Tensor:
    """``flat`` between its samples, at ``position`` (S, N), each row within flat[first:last], zero outside: a sinc of
    16 taps in a Hann window.

    Args:
        flat: any number of samples, int16 or float32.
        first, last: (S,), int64; less than 2^31 apart.
        position: (S, N), float64, in samples of ``flat``.
        speed: (S,), float32; above 1 the row is low-passed, so that it can be read so much faster.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        (S, N), float32, on the scale of ``flat``.

    Raises:
        ValueError: shapes do not fit, or the named kernel cannot run the call.
    """
    count = position.shape[:1]
    if flat.dim() != 1 or position.dim() != 2 or any(x.shape != count for x in (first, last, speed)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (flat, first, last, position, speed))
        raise ValueError(
            f"flat, first, last, position, speed: shapes {shapes} given; wanted one dimension, (S,), (S,), (S, N), (S,)"
        )
    if _uses_triton(flat, position.shape[0], kernel):
        from allears.ops.resample.triton_resample import read_forward

        return read_forward(flat, first, last, position, speed)
    return read_reference(flat, first, last, position, speed)


def lay(
    flat: Tensor, stretches: Stretches, rows: int, frames: int, even_level: bool = False, *, kernel: str = "auto"
) -> Tensor:
    """All stretches in their places, faded in and out over 80 samples, and summed where they overlap.

    Args:
        flat: any number of samples, int16 (or float32 on the scale of int16).
        stretches: what is laid where.
        rows, frames: R and T.
        even_level: each stretch is brought to RMS 1, fades included, before its gain.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        (R, T), float32; full scale is 1. By the kernel the same numbers in every run.

    Raises:
        ValueError: a stretch reaches beyond its row, or the named kernel cannot run the call.
    """
    if flat.dim() != 1:
        raise ValueError(f"flat: shape {tuple(flat.shape)} given; wanted one dimension")
    stretches.check(rows, frames)
    if _uses_triton(flat, max(rows, len(stretches.table)), kernel):
        from allears.ops.resample.triton_resample import lay_forward

        return lay_forward(flat, stretches, rows, frames, even_level)
    return lay_reference(flat, stretches, rows, frames, even_level)


def _uses_triton(flat: Tensor, grid: int, kernel: str) -> bool:
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    refused = "" if kernel == "reference" else _refuses_triton(flat, grid, kernel)
    if refused and kernel == "triton":
        raise ValueError(f"kernel: 'triton' cannot run this call: {refused}; or use kernel='auto'")
    return kernel != "reference" and not refused


def _refuses_triton(flat: Tensor, grid: int, kernel: str) -> str:
    if flat.device.type != "cuda" and kernel == "auto":
        return "runs on CUDA GPUs"
    missing = triton_missing()
    if missing:
        return missing
    if flat.device.type != "cuda" and torch.cuda.is_available():
        return f"runs on CUDA GPUs; flat is on {flat.device}"
    if torch.is_grad_enabled() and flat.requires_grad:
        return "it has no backward and a gradient of flat is asked for"
    if flat.dtype not in _DTYPES or grid > _LARGEST_GRID or not flat.is_contiguous():
        return (
            f"takes contiguous int16 and float32, and {_LARGEST_GRID} rows or stretches at most; {flat.dtype} and "
            f"{grid} given"
        )
    return ""
