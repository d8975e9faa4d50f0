"""Feature maps of linear attention: what stands in the place of the exponential of softmax.

Shapes: ... any leading sizes, H heads, D head size.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

FeatureMap = Literal["softmax", "elu", "relu", "focused"]
FeatureNorm = Literal["channels", "head"]

FLOOR = 1e-6
"""Added behind a ReLU, so that no feature is 0 and a norm always has a gradient."""


def feature_map(
    x: Tensor,
    kind: FeatureMap,
    *,
    power: int = 3,
    norm: FeatureNorm = "channels",
    scale: Tensor | None = None,
) -> Tensor:
    """Positive features of queries or keys. 16-bit input gives float32; float32 and float64 stay.

    ``"softmax"``: softmax over D. ``"elu"``: elu(x) + 1 (Katharopoulos et al., 2020). ``"relu"``: relu(x) + 1e-6.
    ``"focused"`` (Han et al., FLatten Transformer, ICCV 2023, section 4.1): y = (relu(x) + 1e-6) / scale, then
    y^power, brought back to the norm of y. A higher power turns features towards their largest channel.

    The norms are taken of y / ||y||, so the powers of small or large features neither vanish nor overflow, and the
    norm is kept exactly, with no epsilon.

    Args:
        x: (..., H, D), or (..., D) for every kind but ``"focused"`` with norms over all channels.
        kind: which map.
        power: exponent of the focused map, at least 1.
        norm: whether the focused map's norms are taken over all H * D channels of a position (``"channels"``, as the
            released audio models do) or over the D of each head (``"head"``).
        scale: (H, D), positive divisor of the focused map; ``None`` for 1.

    Returns:
        (..., H, D), no less than 0; with gradients for ``x`` and ``scale``.

    Raises:
        ValueError: an unknown kind or norm, a power below 1, or a scale that the map does not have or that does not
            fit.
    """
    if kind not in get_args(FeatureMap):
        raise ValueError(f"kind: {kind!r} given; it must be one of {', '.join(map(repr, get_args(FeatureMap)))}")
    if scale is not None and kind != "focused":
        raise ValueError(f"scale: given with the feature map {kind!r}; only 'focused' has one, leave it out")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if kind == "softmax":
        return x.softmax(dim=-1)
    if kind == "elu":
        return torch.nn.functional.elu(x) + 1
    if kind == "relu":
        return x.relu() + FLOOR
    return _focused(x, power, norm, scale)


def _focused(x: Tensor, power: int, norm: FeatureNorm, scale: Tensor | None) -> Tensor:
    if norm not in get_args(FeatureNorm):
        raise ValueError(f"norm: {norm!r} given; it must be one of {', '.join(map(repr, get_args(FeatureNorm)))}")
    if power < 1:
        raise ValueError(f"power: {power} given; it must be at least 1")
    y = x.relu() + FLOOR
    if scale is not None:
        if scale.shape != x.shape[-2:]:
            raise ValueError(f"scale: shape {tuple(scale.shape)} given; it must be (H, D) = {tuple(x.shape[-2:])}")
        y = y / scale.to(y.dtype)
    over = (-2, -1) if norm == "channels" else (-1,)
    size = y.square().sum(over, keepdim=True).sqrt()
    sharp = (y / size) ** power
    return sharp * (size / sharp.square().sum(over, keepdim=True).sqrt())
