"""The fused rows of a transformer block in plain PyTorch, in float32: what the kernels compute, and what a CPU runs.

Shapes: B entries, L rows of an entry, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.gemm.reference import quantise_reference
from allears.ops.gemm.schemes import Quantised

NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("none", "gelu_tanh", "silu")


def fused_rows_reference(
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
) -> tuple[Tensor | Quantised, Tensor]:
    """See :func:`~allears.ops.norm.fused.fused_rows`, whose arguments these are; ``scheme`` "" leaves 16 or 32 bits.

    Returns:
        The output, and the residual sum, which is x itself without a branch.
    """
    total = x
    if branch is not None:
        added = branch.float() if gate is None else branch.float() * gate.float()
        total = (x.float() + added).to(x.dtype)
    y = total.float()
    if norm == "layer":
        y = F.layer_norm(y, (y.shape[-1],), eps=eps)
    elif norm == "rms":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.float()
    y = y if bias is None else y + bias.float()
    y = y if scale is None else y * (1 + scale.float())
    y = y if shift is None else y + shift.float()
    if activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation == "silu":
        y = F.silu(y)
    if not scheme:
        return y.to(x.dtype), total
    found = quantise_reference(y, scheme)
    return Quantised(found.values, found.scale, scheme, found.shape, x.dtype), total


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, L, H, D) turned by the angles whose cosines and sines are (L, D / 2); see
    :func:`~allears.ops.norm.rope.rotate`."""
    wide = x.float()
    cos, sin = cos.float()[:, None, :], sin.float()[:, None, :]
    if interleaved:
        real, imaginary = wide[..., 0::2], wide[..., 1::2]
        turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
    real, imaginary = wide.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1).to(x.dtype)
