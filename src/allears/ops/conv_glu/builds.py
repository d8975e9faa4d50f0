"""What the kernels are compiled for: at a launch, and ahead of time for the networks that use them.

Shapes: D channels, C hidden channels, K taps, G groups.
"""

from typing import Any

from allears.ops.aot import AotCase
from allears.ops.conv_glu.sizes import Tile, group_pads

MODELS = {"talkers": (64, 128, 4, 4), "small": (96, 128, 8, 4), "medium": (128, 384, 4, 4)}
"""D, C, K and G of the networks that use it."""

BUILDS = (
    *(("talkers", chip, "bf16") for chip in (80, 90, 100, 120)),
    *(("medium", chip, "bf16") for chip in (90, 120)),
    ("small", 90, "bf16"),
    ("talkers", 90, "fp32"),
)
"""Network, chip and kind of x of what is compiled ahead of time; the others differ little."""

COUNTS = {"rows": "i32", "L": "i32", "B": "i32"}
STRIDES = {"stride_a": "i32", "stride_b": "i32", "stride_l": "i32"}


def constants(channels: int, hidden: int, taps: int, groups: int, before: int) -> dict[str, int]:
    """What all kernels with the norm are compiled for."""
    spread, wide = group_pads(channels, groups)
    sizes = {"D": channels, "C": hidden, "GROUPS": groups, "SPREAD": spread, "WIDE": wide}
    return {"K": taps, "BEFORE": before, **sizes}


_MATRIX_INSTRUCTION = {
    80: r"mma\.sync",
    90: r"wgmma\.mma_async",
    100: r"tcgen05\.mma",
    120: r"mma\.sync",
}


def aot_case(
    name: str, chip: int, kind: str, kernel: Any, signature: dict[str, str], fixed: dict[str, int], tile: Tile
) -> AotCase:
    """A kernel with ``tile``, as it is launched; its products must become matrix instructions of the chip."""
    return AotCase(
        f"{kernel.fn.__name__}_{name}_{kind}_{chip}",
        kernel,
        signature,
        {**fixed, "ROWS": tile.rows, "COLUMNS": tile.columns},
        {chip: (_MATRIX_INSTRUCTION[chip],)},
        num_warps=tile.warps,
        num_stages=tile.stages,
        aligned=tuple(key for key in signature if key not in (*COUNTS, "eps", "span")),
    )
