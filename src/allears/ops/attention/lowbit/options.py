"""The choices of low-bit attention, as a frozen value."""

from dataclasses import dataclass
from typing import Literal, get_args

GradScales = Literal["row", "tile"]
Backward = Literal["none", "drop_in", "matched"]


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} given; it must be one of {', '.join(map(repr, known))}")


@dataclass(frozen=True)
class LowBit:
    """How operands are smoothed and quantised, and what the backward does.

    Args:
        smooth_k: subtract the mean over all keys from K before it is quantised (SageAttention, arXiv 2410.02367).
            Exact: every row of the scores moves by a constant. The returned log-sum-exp is that of the given K.
        smooth_q: subtract the mean of each block of 128 queries from Q and add the lost term of the scores back in
            float32 (SageAttention3, arXiv 2505.11594, section 3). ``None``: on for nvfp4, off otherwise. In ``sagebwd``
            (2603.02170) dK then has a second term, in float32, the sum of dS over a block times the mean; its Triton
            kernels take dense batches alone, and Hopper's kernels do not smooth Q.
        grad_scales: granularity of the operands of dQ, dK and dV in the backward of ``sagebwd``. ``"tile"`` is the
            paper's: one scale for each tile. ``"row"``: one scale for each row of the product's output in a tile.
        backward: gradients of ``nvfp4`` and ``int8_fp8``. ``"none"`` refuses them. ``"drop_in"``: 16-bit flash
            attention from the given q, k, v with the low-bit forward's output and log-sum-exp. ``"matched"``: scores
            and probabilities recomputed from the same quantised values, straight through every rounding.
        two_level_p: nvfp4 only: scale the probabilities to [0, 448 * 6] before their groups are quantised, so that
            the scales of the groups use the whole range of E4M3 (SageAttention3, section 3.3).

    Raises:
        ValueError: a field is not one of the values above.
    """

    smooth_k: bool = True
    smooth_q: bool | None = None
    grad_scales: GradScales = "row"
    backward: Backward = "none"
    two_level_p: bool = True

    def __post_init__(self) -> None:
        for name in ("smooth_k", "two_level_p"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: {getattr(self, name)!r} given; it must be True or False")
        if self.smooth_q is not None and not isinstance(self.smooth_q, bool):
            raise ValueError(f"smooth_q: {self.smooth_q!r} given; it must be True, False or None")
        _check_choice("grad_scales", self.grad_scales, get_args(GradScales))
        _check_choice("backward", self.backward, get_args(Backward))
