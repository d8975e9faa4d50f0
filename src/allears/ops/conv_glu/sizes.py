"""Sizes of the kernels' tiles, at one place: chosen so that no kernel spills registers and all fit the shared memory
of their chip. They were not yet tuned on a GPU.

Shapes: D channels, C hidden channels, G groups of channels.
"""

from dataclasses import dataclass

MOST_CHANNELS, MOST_HIDDEN, MOST_TAPS = 128, 384, 8
"""The largest D, C and K of the kernels."""

PROGRAMS = 264
"""About how many programs sum the gradients of the weights: two for each multiprocessor of an H100. Each holds sums of
its own, which cost memory."""


@dataclass(frozen=True)
class Tile:
    """What a program takes at once.

    Args:
        rows: of the product; for the weights' gradients, of a step of the sum.
        columns: of the hidden channels, a block of the result or a step of the sum; a power of two from 16 up.
        warps, stages: of the launch.
        left: for the weights' gradients, rows of the result (taps times channels); a power of two.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    left: int = 0


@dataclass(frozen=True)
class Tiles:
    """Of each kernel: u and h; y; du; dx; dW."""

    widen: Tile
    narrow: Tile
    hidden_backward: Tile
    input_backward: Tile
    weights: Tile


def group_pads(channels: int, groups: int) -> tuple[int, int]:
    """Powers of two that the groups, and the channels of one, are padded to."""
    return _power(groups), _power(channels // groups)


def tiles(chip: int, channels: int, narrow: bool) -> Tiles:
    """For compute capability ``chip`` times ten and D channels; ``narrow`` if x has 16 bits."""
    wide = channels > 64
    if chip not in (90, 100):  # 163 or 99 KiB of shared memory, and matrix instructions of one warp
        return Tiles(
            widen=Tile(64 if wide else 128, 64, 8, 2),
            narrow=Tile(128, 64, 8 if wide else 4, 2),
            hidden_backward=Tile(64, 32 if wide else 64, 8, 2),
            input_backward=Tile(128, 64, 8, 2),
            weights=Tile(64, 128, 8, 2, left=128),
        )
    return Tiles(
        widen=Tile(128 if narrow or not wide else 64, 64, 8, 3),
        narrow=Tile(128, 64, 8 if wide else 4, 4),
        hidden_backward=Tile(64, 64, 8, 2) if wide else Tile(128, 64, 8, 3),
        input_backward=Tile(128, 64, 8, 4),
        weights=Tile(64, 128, 8, 3, left=256),
    )


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
