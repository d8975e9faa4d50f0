"""What attention is asked for, as a frozen value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Choice of attention.

    Args:
        kernel: ``"auto"`` takes the first kernel that can run the call; a name (see ``backends()``) takes that one
            or fails with its reason.
        causal: query ``i`` of ``L_q`` sees keys up to ``i + L_k - L_q`` (aligned at the bottom right, as KV-cache
            decoding needs).
        scale: factor on the logits; ``None`` means ``1 / sqrt(D)``.
    """

    kernel: str = "auto"
    causal: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale: {self.scale} given; it must be positive, or None for 1 / sqrt(D)")
