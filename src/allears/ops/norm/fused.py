"""Norms of a transformer block with what stands around them: residual and gate before, modulation and 8 bits after.

Wan's block, for one, is ``x, y = residual_norm(x, attention, gate, scale=..., shift=...)`` and so on. Everything is
computed in float32 and rounded once. Where the output feeds 8-bit linear layers, ``scheme`` gives it in 8 bits, so that
16-bit numbers are neither written nor read again.

Shapes: B entries, L rows of an entry, C channels; modulation is (B or 1, L or 1, C), also written (B, C) or (C,).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from allears.ops.constant import constant_in_graphs
from allears.ops.gemm.schemes import SCHEMES, Quantised, scheme_of
from allears.ops.norm.fused_reference import ACTIVATIONS, NORMS, fused_rows_reference
from allears.ops.norm.ops import fused_rows_triton
from allears.ops.triton_here import interpreted, triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST_CHANNELS = 32_768


@dataclass(frozen=True)
class Choice:
    """The kernel that a call runs, and why each other one cannot."""

    kernel: str
    refused: dict[str, str]


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, scheme: str | None = None, kernel: str = "auto"
) -> Tensor | Quantised:
    """Rows of x (..., C) over their root mean square, times ``weight`` (C,); in 8 bits with a ``scheme``."""
    return fused_rows(x, norm="rms", weight=weight, eps=eps, scheme=scheme, kernel=kernel)[0]


def layer_norm_modulated(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    scheme: str | None = None,
    kernel: str = "auto",
) -> Tensor | Quantised:
    """Layer norm of x (B, L, C), then ``* (1 + scale) + shift`` (adaptive layer norm; Peebles and Xie, DiT, 2023)."""
    norm = {"norm": "layer", "weight": weight, "bias": bias, "eps": eps}
    return fused_rows(x, scale=scale, shift=shift, scheme=scheme, kernel=kernel, **norm)[0]  # type: ignore


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """``x + branch * gate``: x and branch (B, L, C), in the dtype of x."""
    return fused_rows(x, branch=branch, gate=gate, norm="none", output=False, kernel=kernel)[1]


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    scheme: str | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor | Quantised]:
    """``total = x + branch * gate`` and the modulated norm of it, which is what the next layers read.

    Returns:
        (total, output), total in the dtype of x.
    """
    what = {"norm": norm, "weight": weight, "bias": bias, "scale": scale, "shift": shift}
    out, total = fused_rows(x, branch=branch, gate=gate, eps=eps, scheme=scheme, kernel=kernel, **what)  # type: ignore
    assert out is not None
    return total, out


def activate_quantised(x: Tensor, activation: str, scheme: str, kernel: str = "auto") -> Quantised:
    """``gelu_tanh``, ``silu`` or ``none`` of x (..., C) in 8 bits: what stands before the second layer of a MLP."""
    out = fused_rows(x, norm="none", activation=activation, scheme=scheme, kernel=kernel)[0]
    assert isinstance(out, Quantised)
    return out


def fused_rows(
    x: Tensor,
    *,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    scheme: str | None = None,
    output: bool = True,
    kernel: str = "auto",
) -> tuple[Tensor | Quantised, Tensor]:
    """The whole chain, of which the functions above are parts, each step only where it is given.

    Args:
        x: (..., C), float16, bfloat16 or float32; (B, L, C) where a gate or a modulation is given.
        branch: as x, added to it after ``gate``.
        gate, scale, shift: broadcastable to (B, L, C).
        norm: ``"none"``, ``"rms"`` or ``"layer"``.
        weight, bias: (C,).
        eps: added to the variance or the mean square.
        activation: ``"none"``, ``"gelu_tanh"`` or ``"silu"``, last of all.
        scheme: of the output's 8 bits (:data:`~allears.ops.gemm.schemes.SCHEMES`); the dtype of x without one.
        output: False where the residual sum alone is wanted.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        The output, and the residual sum (x itself without a branch).

    Raises:
        ValueError: shapes or names do not fit, the named kernel cannot run the call, or gradients are asked for.
    """
    arguments = _checked(x, branch, gate, norm, weight, bias, scale, shift, activation, scheme)
    choice = explain(*[t for t in arguments if t is not None], norm=norm, scheme=scheme, kernel=kernel)
    names = (norm, eps, activation, scheme or "")
    if choice.kernel == "reference":
        return fused_rows_reference(*arguments, *names)  # type: ignore
    if not output:
        total = fused_rows_triton(*arguments, "sum", eps, "none", "")[2]
        return total, total
    out, factors, total = fused_rows_triton(*arguments, *names)
    total = x if branch is None else total
    return (Quantised(out, factors, scheme, tuple(x.shape), x.dtype) if scheme else out), total


def explain(*tensors: Tensor, norm: str = "layer", scheme: str | None = None, kernel: str = "auto") -> Choice:
    """Which kernel :func:`fused_rows` runs for these tensors, x first, and why not each other one.

    Raises:
        ValueError: the named kernel cannot run the call.
    """
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    refused = {} if kernel == "reference" else {"triton": refuses_triton(tensors, scheme, kernel)}
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors) and (scheme or kernel == "triton"):
        raise ValueError(
            "x: gradients are asked for, and 8 bits and the fused kernels have none; call under torch.no_grad(), or "
            "with scheme=None and kernel='reference'"
        )
    reason = refused.get("triton", "")
    if kernel == "triton" and reason:
        raise ValueError(f"kernel: 'triton' cannot run this call: {reason}; or use kernel='auto'")
    if kernel == "reference" or reason:
        return Choice("reference", {name: why for name, why in refused.items() if why})
    return Choice("triton", {})


def refuses_triton(tensors: tuple[Tensor, ...], scheme: str | None, kernel: str) -> str:
    """Why the Triton kernels of this folder do not run a call with these tensors, the main one first; or ``""``."""
    x = tensors[0]
    missing = triton_missing()
    if missing:
        return missing
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "it has no backward and gradients are asked for"
    if any(t.device != x.device for t in tensors):
        return f"all tensors must lie on one device; {sorted({str(t.device) for t in tensors})} given"
    if interpreted():
        if kernel == "auto":
            return "Triton interprets its kernels here, which is slow: only kernel='triton' asks for it"
    elif x.device.type != "cuda":
        return f"runs on CUDA GPUs; x is on {x.device}"
    elif scheme and SCHEMES[scheme].fp8 and not has_fp8(x.device.index):
        return "FP8 needs compute capability 8.9"
    if any(t.dtype not in _DTYPES for t in tensors):
        return f"takes float16, bfloat16 and float32; {sorted({str(t.dtype) for t in tensors})} given"
    if x.shape[-1] > _LARGEST_CHANNELS or x.numel() // max(x.shape[-1], 1) >= 2**31:
        return f"takes {_LARGEST_CHANNELS} channels and 2^31 rows at most; {tuple(x.shape)} given"
    return ""


@constant_in_graphs
def has_fp8(index: int) -> bool:
    """Whether a CUDA device has FP8."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor >= 89


def _checked(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    scheme: str | None,
) -> tuple[Tensor | None, ...]:
    """The seven tensors, modulation as (B or 1, L or 1, C)."""
    if norm not in NORMS or activation not in ACTIVATIONS:
        raise ValueError(
            f"norm, activation: {norm!r} and {activation!r} given; known are {', '.join(NORMS)} and "
            f"{', '.join(ACTIVATIONS)}"
        )
    if scheme is not None:
        scheme_of(scheme)
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)} given; wanted is a floating tensor (..., C)")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch: {tuple(branch.shape)} given for x {tuple(x.shape)}; both must have one shape")
    if gate is not None and branch is None:
        raise ValueError("gate: given without a branch, which it multiplies; give both, or scale for a modulation")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and tuple(vector.shape) != (x.shape[-1],):
            raise ValueError(f"{name}: {tuple(vector.shape)} given; wanted is ({x.shape[-1]},), the channels of x")
    gate, scale, shift = (_modulation(n, t, x) for n, t in (("gate", gate), ("scale", scale), ("shift", shift)))
    contiguous = (t if t is None else t.contiguous() for t in (weight, bias))
    weight, bias = contiguous
    return x, branch, gate, weight, bias, scale, shift


def _modulation(name: str, t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None:
        return None
    if t.dim() == 1:
        t = t[None, None]
    elif t.dim() == 2:
        t = t[:, None]
    fits = x.dim() == 3 and t.dim() == 3 and t.shape[2] == x.shape[2]
    if not fits or t.shape[0] not in (1, x.shape[0]) or t.shape[1] not in (1, x.shape[1]):
        raise ValueError(
            f"{name}: {tuple(t.shape)} given for x {tuple(x.shape)}; wanted is x of (B, L, C) and {name} of (C,), "
            "(B, C), or (B or 1, L or 1, C)"
        )
    return t if t.stride(2) == 1 else t.contiguous()
