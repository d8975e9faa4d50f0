"""The door to 8-bit linear layers: quantise, multiply, and which kernel does it. A named kernel runs or raises.

Shapes: ... leading sizes, M their product, K channels in, N channels out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from allears.ops.constant import constant_in_graphs
from allears.ops.gemm.ops import w8a8_triton
from allears.ops.gemm.reference import product_reference
from allears.ops.gemm.schemes import Quantised, scheme_of
from allears.ops.gemm.tuned import CUBLAS_FIRST, chip_of
from allears.ops.norm.fused import activate_quantised
from allears.ops.triton_here import interpreted, triton_missing

KERNELS = ("cublas", "triton", "reference")
"""Of the product; ``tuned.py`` says which of the first two comes first on a chip."""

_OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """The kernel that a product runs.

    Args:
        kernel: its name.
        refused: why each kernel that cannot run the call cannot.
        able: the other kernels that could, in the order of ``auto``.
    """

    kernel: str
    refused: dict[str, str]
    able: tuple[str, ...] = ()


def quantise(x: Tensor, scheme: str, kernel: str = "auto") -> Quantised:
    """x (..., K) in 8 bits.

    Args:
        x: float16, bfloat16 or float32, any strides; not changed.
        scheme: a name in :data:`~allears.ops.gemm.schemes.SCHEMES`.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; both give the same bits.

    Raises:
        ValueError: x is not floating, has a gradient, or the scheme or kernel is unknown or cannot run.
    """
    return activate_quantised(x, "none", scheme, kernel)


def w8a8_linear(x: Tensor | Quantised, weight: Quantised, bias: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """``x weight^T + bias`` with both operands in 8 bits.

    Args:
        x: (..., K), which is quantised by the scheme of ``weight``, or what a fused norm or :func:`quantise` gave.
        weight: (N, K) as :func:`quantise` made it.
        bias: (N,), floating.
        kernel: of the product; ``"auto"``, ``"cublas"``, ``"triton"`` or ``"reference"``.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ValueError: shapes, schemes or devices do not fit, gradients are asked for, or the named kernel cannot run.
    """
    _check(x, weight, bias)
    scheme = scheme_of(weight.scheme)
    if isinstance(x, Tensor):
        x = quantise(x, scheme.name, "reference" if kernel == "reference" else "auto")
    chosen = _choose(x, weight, kernel).kernel
    if chosen == "triton":
        values = (x.values, weight.values, x.scale, weight.scale)
        out = w8a8_triton(*values, bias, scheme.name, x.dtype)
    elif chosen == "cublas":
        out = torch._scaled_mm(
            x.values,
            weight.values.t(),
            scale_a=x.scale[:, None],
            scale_b=weight.scale[None, :],
            bias=None if bias is None else bias.to(x.dtype),
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
    else:
        out = product_reference(x, weight, bias)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def explain(x: Tensor | Quantised, weight: Quantised, bias: Tensor | None = None, kernel: str = "auto") -> Choice:
    """Which kernel :func:`w8a8_linear` would run for the same arguments, and why not each other one."""
    _check(x, weight, bias)
    return _choose(x, weight, kernel)


def _choose(x: Tensor | Quantised, weight: Quantised, kernel: str) -> Choice:
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    reasons = {
        "cublas": _refuses_cublas(x, weight),
        "triton": _refuses_triton(x, weight, kernel),
        "reference": "",
    }
    if kernel != "auto":
        if reasons[kernel]:
            raise ValueError(f"kernel: {kernel!r} cannot run this call: {reasons[kernel]}; or use kernel='auto'")
        order = [kernel, *(name for name in KERNELS if name != kernel)]
    else:
        order = list(KERNELS)
        if weight.values.is_cuda and _chip(weight) not in CUBLAS_FIRST:
            order = ["triton", "cublas", "reference"]
    able = [name for name in order if not reasons[name]]
    return Choice(able[0], {name: why for name, why in reasons.items() if why}, tuple(able[1:]))


def _refuses_cublas(x: Tensor | Quantised, weight: Quantised) -> str:
    if weight.scheme != "fp8_row":
        return f"has FP8 with a scale a row; {weight.scheme} given"
    if not weight.values.is_cuda:
        return f"runs on CUDA GPUs; the weight is on {weight.values.device}"
    if _chip(weight) not in (90, 100, 120):
        return "scales by row need compute capability 9.0"
    if x.dtype != torch.bfloat16:
        return f"gives bfloat16; {x.dtype} is wanted"
    columns, inner = weight.shape
    if columns % 16 or inner % 16 or not inner:
        return f"takes multiples of 16 channels; {weight.shape} given"
    return "there are no rows" if not _numel(x) else ""


def _refuses_triton(x: Tensor | Quantised, weight: Quantised, kernel: str) -> str:
    missing = triton_missing()
    if missing:
        return missing
    if interpreted():
        if kernel == "auto":
            return "Triton interprets its kernels here, which is slow: only kernel='triton' asks for it"
    elif not weight.values.is_cuda:
        return f"runs on CUDA GPUs; the weight is on {weight.values.device}"
    else:
        capability = _capability(weight.values.device.index)
        needed = 89 if scheme_of(weight.scheme).fp8 else 80
        if capability < needed:
            return f"{weight.scheme} needs compute capability {needed / 10}; this GPU has {capability / 10}"
    if x.dtype not in _OUTPUTS:
        return f"gives float16, bfloat16 and float32; {x.dtype} is wanted"
    if not weight.shape[1] or not _numel(x):
        return "there is nothing to sum"
    return ""


@constant_in_graphs
def _capability(index: int) -> int:
    """Ten times the compute capability of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _chip(weight: Quantised) -> int:
    return chip_of(_capability(weight.values.device.index))


def _numel(x: Tensor | Quantised) -> int:
    return x.numel() if isinstance(x, Tensor) else x.values.numel()


def _check(x: Tensor | Quantised, weight: Quantised, bias: Tensor | None) -> None:
    if not isinstance(weight, Quantised) or len(weight.shape) != 2:
        raise ValueError(f"weight: {type(weight).__name__} given; wanted is what quantise() makes of (N, K)")
    if not x.shape or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: {tuple(x.shape)} given; the weight is {tuple(weight.shape)}, so wanted is (..., {weight.shape[1]})"
        )
    if isinstance(x, Quantised) and x.scheme != weight.scheme:
        raise ValueError(f"x: in {x.scheme}, and the weight in {weight.scheme}; quantise both by one scheme")
    device = x.device if isinstance(x, Tensor) else x.values.device
    if device != weight.values.device:
        raise ValueError(f"x: on {device}, and the weight on {weight.values.device}; move one of them")
    if bias is None:
        return
    if tuple(bias.shape) != (weight.shape[0],) or not bias.is_floating_point() or bias.device != device:
        raise ValueError(
            f"bias: {bias.dtype} {tuple(bias.shape)} on {bias.device} given; wanted is floating "
            f"({weight.shape[0]},) on {device}"
        )
    if torch.is_grad_enabled() and bias.requires_grad:
        raise ValueError("bias: it asks for a gradient, and 8-bit products have none; call under torch.no_grad()")
