"""The depthwise convolution of V that gives linear attention its rank back (FLatten Transformer, section 4.2).

phi(Q) phi(K)^T has rank at most D, so that many positions would get much the same output; each position's own
neighbours, added to it, tell them apart.

Shapes: B batch, L rows, H heads, D head size, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def check_conv(v: Tensor, weight: Tensor | None, bias: Tensor | None, causal: bool) -> int:
    """K of a convolution that fits v (..., H, D), or 1 without one.

    Raises:
        ValueError: the weights or the bias do not fit, or K is even where both sides are looked at.
    """
    if weight is None:
        if bias is not None:
            raise ValueError("conv_bias: given without conv_weight; give both or none")
        return 1
    of_heads, size = tuple(v.shape[-2:]), v.shape[-1]
    if weight.shape[:-1] not in ((size,), of_heads) or weight.shape[-1] < 1:
        raise ValueError(
            f"conv_weight: shape {tuple(weight.shape)} given; it must be (D, K), shared by the heads, or (H, D, K), "
            f"with H, D = {of_heads} and K at least 1"
        )
    if bias is not None and bias.shape not in ((size,), of_heads):
        raise ValueError(f"conv_bias: shape {tuple(bias.shape)} given; it must be (D,) or (H, D), H, D = {of_heads}")
    for name, given in (("conv_weight", weight), ("conv_bias", bias)):
        if given is not None and (given.device != v.device or not given.is_floating_point()):
            raise ValueError(f"{name}: {given.dtype} on {given.device} given; it must be floating, on {v.device} as v")
    if not causal and weight.shape[-1] % 2 == 0:
        raise ValueError(
            f"conv_weight: {weight.shape[-1]} taps given; without causal their number must be odd, so that one of them "
            f"is the position itself"
        )
    return weight.shape[-1]


def convolve_values(
    v: Tensor, weight: Tensor, bias: Tensor | None = None, *, causal: bool = False, before: Tensor | None = None
) -> Tensor:
    """out[i] = sum_t weight[t] v[i + t - left] + bias, left = (K - 1) / 2, or K - 1 if causal; zeros beyond the ends.

    Every row is the same sum whatever rows come with it, so parts of a stream give exactly what the whole gives.

    Args:
        v: (B, L, H, D).
        weight: (D, K) or (H, D, K).
        bias: (D,) or (H, D).
        causal: row i sees rows i - K + 1 to i.
        before: (B, K - 1, H, D), the rows before v's first of a causal stream; ``None`` for zeros.

    Returns:
        (B, L, H, D), computed in the dtype of v.
    """
    taps, rows = weight.shape[-1], v.shape[1]
    weight = weight.to(v.dtype)
    if before is None:
        left = taps - 1 if causal else (taps - 1) // 2
        v = F.pad(v, (0, 0, 0, 0, left, taps - 1 - left))
    else:
        v = torch.cat([before.to(v.dtype), v], dim=1)
    out = v[:, :rows] * weight[..., 0]
    for t in range(1, taps):
        out = out + v[:, t : t + rows] * weight[..., t]
    return out if bias is None else out + bias.to(v.dtype)


def next_rows(v: Tensor, before: Tensor, lengths: Tensor | None = None) -> Tensor:
    """The last K - 1 rows of (before, v), which the next part of a stream sees: (B, K - 1, H, D).

    Args:
        v: (B, L, H, D).
        before: (B, K - 1, H, D), the rows before v's first.
        lengths: (B,), how many rows of v exist; ``None`` for all.
    """
    kept = before.shape[1]
    both = torch.cat([before, v], dim=1)
    if lengths is None:
        return both[:, both.shape[1] - kept :]
    row = lengths.long()[:, None] + torch.arange(kept, device=v.device)
    return torch.take_along_dim(both, row[..., None, None], dim=1)
