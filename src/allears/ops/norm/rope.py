"""Rotary position embedding (Su et al., RoFormer, 2021) of queries and keys, with the RMS norm before it if asked.

Shapes: B entries, L rows of an entry, H heads, D head size.
"""

from torch import Tensor

from allears.ops.norm.fused import explain
from allears.ops.norm.fused_reference import rope_reference
from allears.ops.norm.ops import rotate_triton


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    weight: Tensor | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    interleaved: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """Turn each pair of channels by the angle of its row.

    Args:
        x: (B, L, H, D), D even, any strides.
        cos, sin: (L, D / 2), of the angle of each row and pair.
        weight: (H * D,), gain of the norm.
        norm: first divide a row by its root mean square over all heads, as Wan's norms of queries and keys do.
        eps: added to the mean square.
        interleaved: pairs lie side by side (0, 1), (2, 3), ..., as in Wan; else (0, D / 2), (1, D / 2 + 1), ...
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        (B, L, H, D) in the dtype of x, contiguous; computed in float32.

    Raises:
        ValueError: shapes do not fit, or the named kernel cannot run the call.
    """
    if x.dim() != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {tuple(x.shape)} given; wanted is a floating (B, L, H, D) with an even D")
    wanted = (x.shape[1], x.shape[3] // 2)
    if tuple(cos.shape) != wanted or tuple(sin.shape) != wanted:
        raise ValueError(f"cos, sin: {tuple(cos.shape)} and {tuple(sin.shape)} given; wanted is (L, D / 2) = {wanted}")
    channels = x.shape[2] * x.shape[3]
    if weight is not None and (not norm or tuple(weight.shape) != (channels,)):
        raise ValueError(
            f"weight: {tuple(weight.shape)} given with norm={norm}; it is ({channels},), and for norm=True"
        )
    tensors = [x, cos, sin] + ([] if weight is None else [weight])
    if explain(*tensors, kernel=kernel).kernel == "triton":
        return rotate_triton(x, cos, sin, weight, eps, norm, interleaved)
    if norm:
        from allears.ops.norm.fused_reference import fused_rows_reference

        rows = x.reshape(*x.shape[:2], channels).float()
        none = (None, None, None, None)
        rows, _ = fused_rows_reference(rows, None, None, weight, *none[:3], "rms", eps, "none", "")  # type: ignore
        return rope_reference(rows.reshape(x.shape), cos, sin, interleaved).to(x.dtype)  # type: ignore
    return rope_reference(x, cos, sin, interleaved)
