"""What attention is asked for, as a frozen value."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.sparsity import Sparsity

Numerics = Literal["exact", "int8_fp8", "int8_fp16", "sagebwd", "nvfp4"]
"""Which numbers the products are computed in: ``exact`` is the dtype of the inputs; the others are low-bit families."""

_LOWBIT = LowBit()


def _plain() -> LowBit:
    """The default, from a global: torch.compile traces this where it would not trace a constructor."""
    return _LOWBIT


@dataclass(frozen=True)
class AttentionSpec:
    """Choice of attention.

    Args:
        kernel: ``"auto"`` takes the first kernel that can run the call; a name (see ``backends()``) takes that one
            or fails with its reason.
        causal: query ``i`` of ``L_q`` sees keys up to ``i + L_k - L_q`` (aligned at the bottom right, as KV-cache
            decoding needs).
        scale: factor on the logits; ``None`` means ``1 / sqrt(D)``.
        numerics: the family of kernels: ``"exact"``, ``"int8_fp8"``, ``"int8_fp16"``, ``"sagebwd"`` or ``"nvfp4"``.
        lowbit: smoothing, granularity and backward of the low-bit families; not read by ``"exact"``.
        sparse: read only the key blocks that a training-free rule picks, by the kernels of ``sparse_linear``, with the
            numerics ``"exact"`` (which then trains; the choice has no gradient) or ``"int8_fp8"`` (which does not, and
            does not read ``lowbit``); None reads all keys.

    Raises:
        ValueError: the scale is not positive, the numerics are unknown, or have no sparse kernels.
    """

    kernel: str = "auto"
    causal: bool = False
    scale: float | None = None
    numerics: Numerics = "exact"
    lowbit: LowBit = field(default_factory=_plain)
    sparse: Sparsity | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale: {self.scale} given; it must be positive, or None for 1 / sqrt(D)")
        if self.numerics not in get_args(Numerics):
            known = ", ".join(map(repr, get_args(Numerics)))
            raise ValueError(f"numerics: {self.numerics!r} given; it must be one of {known}")
        if self.sparse is not None and self.numerics not in ("exact", "int8_fp8"):
            raise ValueError(
                f"numerics: {self.numerics!r} given with sparse; sparse kernels have 'exact' and 'int8_fp8', or set "
                "sparse=None"
            )
