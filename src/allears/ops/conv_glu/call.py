"""The door of the feed-forward with a neighbourhood. A caller who names a kernel gets that one or an error.

Shapes: A, B outer sizes, M sequences, L rows, D channels, C hidden channels, K taps, G groups.
"""

import torch
from torch import Tensor

from allears.ops.constant import constant_in_graphs
from allears.ops.conv_glu.reference import conv_swiglu_reference, operand_dtype
from allears.ops.conv_glu.sizes import MOST_CHANNELS, MOST_HIDDEN, MOST_TAPS, group_pads
from allears.ops.triton_here import interpreted, triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

_Weights = tuple[Tensor, Tensor, Tensor, Tensor]
_NARROW = (torch.float16, torch.bfloat16)
_OLDEST = (8, 0)  # compute capability
_MOST_ROWS = 2**31 - 1024  # the last tile is counted in 32 bits too


def conv_swiglu(
    x: Tensor,
    widen_weight: Tensor,
    widen_bias: Tensor,
    narrow_weight: Tensor,
    narrow_bias: Tensor,
    *,
    groups: int,
    eps: float,
    before: int,
    kernel: str = "auto",
) -> Tensor:
    """``x + narrow(SwiGLU(widen(norm(x))))`` along each sequence.

    norm: each of G groups of channels over its root mean square, without a gain (work that into ``widen_weight``).
    widen: ``u[l] = b + sum_k norm(x)[l - before + k] W[k]`` of the rows in [0, L), zeros outside. SwiGLU: the first
    half of u times SiLU of the second. narrow: ``b + sum_k h[l + before - k] W[k]``.

    Args:
        x: (A, B, L, D) or (M, L, D), of any strides; no copy is made where channels adjoin in memory.
        widen_weight, widen_bias: (2 C, D, K) and (2 C,), as ``nn.Conv1d`` holds them.
        narrow_weight, narrow_bias: (C, D, K) and (D,), as ``nn.ConvTranspose1d`` holds them.
        groups: G, which divides D.
        eps: added to the mean square; above 0.
        before: 0 to K - 1.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason. Auto takes
            Triton on a CUDA GPU from compute capability 8.0 on for products in 16 bits:
            those of a 16-bit x, or under autocast.

    Returns:
        As x, in its dtype, by Triton with its strides. Differentiable in x and the four weights; by Triton once, and
        then x alone is kept for the gradient.

    Raises:
        ValueError: shapes do not fit, or the named kernel cannot run the call.
        NotImplementedError: a second derivative is taken of Triton's kernels.
    """
    weights = widen_weight, widen_bias, narrow_weight, narrow_bias
    _check(x, weights, groups, eps, before)
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    refused = "" if kernel == "reference" else _refuses_triton(x, weights, groups, kernel)
    if refused and kernel == "triton":
        raise ValueError(f"kernel: 'triton' cannot run this call: {refused}; or use kernel='auto'")
    if kernel == "reference" or refused:
        return conv_swiglu_reference(x, *weights, groups, eps, before)
    rows = x if x.dim() == 4 else x.unsqueeze(1)
    return _run_triton(rows, weights, groups, eps, before, operand_dtype(x)).view(x.shape)


def runs_kernel(
    x: Tensor, widen_weight: Tensor, widen_bias: Tensor, narrow_weight: Tensor, narrow_bias: Tensor, groups: int
) -> bool:
    """Whether :func:`conv_swiglu` of these, with ``kernel="auto"``, runs its Triton kernels. A compiled graph takes the
    answer as a constant; where a graph is exported it is no."""
    if x.device.type != "cuda" or torch.jit.is_tracing() or torch.compiler.is_exporting():
        return False
    return not _refuses_triton(x, (widen_weight, widen_bias, narrow_weight, narrow_bias), groups, "auto")


def _run_triton(x: Tensor, weights: _Weights, groups: int, eps: float, before: int, dtype: torch.dtype) -> Tensor:
    """By the operator where a graph or a gradient needs one, else straight to the kernels, which costs less time."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    if learns or torch.compiler.is_compiling():
        from allears.ops.conv_glu.ops import conv_swiglu_triton as run
    else:
        from allears.ops.conv_glu.triton_host import conv_swiglu_forward as run
    return run(x, *weights, groups, eps, before, dtype)


def _check(x: Tensor, weights: _Weights, groups: int, eps: float, before: int) -> None:
    widen_weight, _, narrow_weight, _ = weights
    channels = x.shape[-1] if x.dim() else 0
    if x.dim() not in (3, 4) or not x.is_floating_point() or x.shape[-2] < 1:
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)} given; wanted are floats (A, B, L, D) or (M, L, D), L from 1")
    if widen_weight.dim() != 3 or widen_weight.shape[0] % 2 or widen_weight.shape[1] != channels:
        raise ValueError(
            f"widen_weight: {tuple(widen_weight.shape)} given; x has {channels} channels, so give (2 C, {channels}, K)"
        )
    wide, _, taps = widen_weight.shape
    if tuple(narrow_weight.shape) != (wide // 2, channels, taps):
        raise ValueError(
            f"narrow_weight: {tuple(narrow_weight.shape)} given; beside widen_weight {tuple(widen_weight.shape)} it "
            f"must be {(wide // 2, channels, taps)}"
        )
    for name, bias, size in (("widen_bias", weights[1], wide), ("narrow_bias", weights[3], channels)):
        if tuple(bias.shape) != (size,):
            raise ValueError(f"{name}: {tuple(bias.shape)} given; it must be ({size},)")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: {groups} given; it must divide the {channels} channels of x")
    if not eps > 0:
        raise ValueError(f"eps: {eps} given; it must be above 0, or rows of zeros have no root")
    if not 0 <= before < taps:
        raise ValueError(f"before: {before} given; of {taps} taps 0 to {taps - 1} can come before")


def _refuses_triton(x: Tensor, weights: _Weights, groups: int, kernel: str) -> str:
    """Why the Triton kernels do not run a call, or ``""``."""
    if x.device.type != "cuda" and kernel == "auto":
        return "runs on CUDA GPUs"
    missing = _device_refuses(x.device.type, x.device.index)
    if missing:
        return missing
    if any(t.device != x.device for t in weights):
        return f"all tensors must lie on one device; {sorted({str(t.device) for t in (x, *weights)})} given"
    dtype = operand_dtype(x)
    if dtype not in _NARROW and not (dtype == torch.float32 and x.device.type != "cuda"):
        return f"multiplies 16-bit numbers; {dtype} given (use a 16-bit x, or autocast)"
    if x.dtype not in (*_NARROW, torch.float32):
        return f"takes 16 and 32 bits; {x.dtype} given"
    channels, (hidden, _, taps) = x.shape[-1], weights[2].shape
    spread, wide = group_pads(channels, groups)
    if channels % 16 or channels > MOST_CHANNELS or hidden % 16 or hidden > MOST_HIDDEN or taps > MOST_TAPS:
        return (
            f"takes multiples of 16 up to {MOST_CHANNELS} channels and {MOST_HIDDEN} hidden ones, and up to "
            f"{MOST_TAPS} taps; {channels}, {hidden} and {taps} given"
        )
    if spread * wide > MOST_CHANNELS:
        return f"pads groups to powers of two; {groups} of {channels // groups} channels fill more than a tile"
    if x.numel() // channels > _MOST_ROWS:
        return f"takes {_MOST_ROWS} rows at most; {x.numel() // channels} given"
    return ""


@constant_in_graphs
def _device_refuses(kind: str, index: int | None) -> str:
    """Why Triton does not run on a device, or ``""``."""
    missing = triton_missing()
    if missing or (kind != "cuda" and interpreted()):
        return missing
    if kind != "cuda":
        return f"runs on CUDA GPUs; x is on {kind}"
    capability = torch.cuda.get_device_capability(index)
    return "" if capability >= _OLDEST else f"needs compute capability 8.0; this GPU has {capability}"
