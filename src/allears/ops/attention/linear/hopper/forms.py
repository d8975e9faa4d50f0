"""What the kernels of this folder are compiled for, and the shared memory that follows from it.

Shapes: C = H * D channels in G groups of 64, K taps of the convolution of V.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64
ROWS = 32
_WARPS = 8  # that compute
_MOST_STAGES = 4
_SHARED_BYTES = 227 * 1024
_FLOAT = 4


class Form(NamedTuple):
    """A kernel for G groups of channels in heads of D, features of a power, float16 (``half``) or bfloat16, and K taps
    (``None``: the pass over the keys)."""

    groups: int
    size: int
    power: int
    half: bool
    taps: int | None = None

    @property
    def parts(self) -> int:
        """Times that the warps of a block go into its groups: 32 rows each."""
        return max(1, _WARPS // self.groups)

    @property
    def tile_rows(self) -> int:
        """Rows that a block takes at once."""
        return ROWS * self.parts

    @property
    def v_rows(self) -> int:
        """Rows of v beside 32 rows of q or k: with those that the convolution reaches, in fours."""
        if self.taps is None:
            return ROWS
        return ROWS + (self.taps + 2) // 4 * 4 if self.taps else 0

    @property
    def stage_bytes(self) -> int:
        """A buffer of one tile; parts begin at multiples of 1,024 bytes."""
        v_bytes = self.v_rows * 2 * GROUP * self.groups
        return self.parts * (ROWS * 2 * GROUP * self.groups + -(-v_bytes // 1024) * 1024)

    @property
    def other_bytes(self) -> int:
        """1 / scale, and of the queries the bias and the taps, of each channel; a number of each warp's channels;
        norms of rows in two turns; barriers; and what aligns the buffers."""
        warps = self.parts * self.groups
        channels = 1 if self.taps is None else 2 + self.taps
        numbers = channels * GROUP * self.groups + warps * (GROUP + 2 * 2 * ROWS)
        return numbers * _FLOAT + 8 * (2 * _MOST_STAGES + self.parts) + 1024

    @property
    def stages(self) -> int:
        """Buffers."""
        return min(_MOST_STAGES, (_SHARED_BYTES - self.other_bytes) // self.stage_bytes)

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + self.other_bytes

    def defines(self) -> dict[str, int]:
        """Macros of the kernel."""
        made = {
            "GROUPS": self.groups,
            "HEAD_DIM": self.size,
            "POWER": self.power,
            "IN_FP16": int(self.half),
            "PARTS": self.parts,
            "STAGES": self.stages,
        }
        return made if self.taps is None else made | {"TAPS": self.taps}


def form_of(x: Tensor, power: int, taps: int | None = None) -> Form:
    """The form for x (B, L, H, D)."""
    heads, size = x.shape[2:]
    return Form(heads * size // GROUP, size, power, x.dtype == torch.float16, taps)
