"""The choices of linear attention, as a frozen value."""

import math
from dataclasses import dataclass
from typing import get_args

from allears.ops.attention.linear.features import FeatureMap, FeatureNorm

LARGEST_POWER = 8


@dataclass(frozen=True)
class LinearOptions:
    """Which linear attention.

    Args:
        feature_map: ``"focused"``, ``"elu"``, ``"relu"`` or ``"softmax"``; see
            :func:`~allears.ops.attention.linear.features.feature_map`.
        power: exponent of the focused map, 1 to 8; 1 is a plain ReLU with a scale.
        norm: over what the focused map keeps the norm: all channels of a position (``"channels"``, as the released
            audio models of FLASepformer do) or those of each head (``"head"``, which lets heads run by themselves).
        eps: added to a query's product with the mean of the keys' features, by which its output is divided.

    Raises:
        ValueError: a field is not one of the values above, or ``eps`` is negative or not finite.
    """

    feature_map: FeatureMap = "focused"
    power: int = 3
    norm: FeatureNorm = "channels"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, kind in (("feature_map", FeatureMap), ("norm", FeatureNorm)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(map(repr, get_args(kind)))
                raise ValueError(f"{name}: {getattr(self, name)!r} given; it must be one of {known}")
        if isinstance(self.power, bool) or not isinstance(self.power, int) or not 1 <= self.power <= LARGEST_POWER:
            raise ValueError(f"power: {self.power!r} given; it must be an integer from 1 to {LARGEST_POWER}")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: {self.eps!r} given; it must be 0 or a positive finite number")
