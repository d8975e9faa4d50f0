"""What 8-bit matrices are: a scheme, the values and scales of one, and bytes that a product needs.

Shapes: M rows, N columns of a product, K the axis summed over, KP = K rounded up to 16; tiles of 128 x 128.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.quantise import E4M3_TOP, INT8_TOP

SchemeName = Literal["int8_tile", "int8_row", "fp8_row", "fp8_tile"]
TILE = 128
"""Rows and columns that share a scale in the tile schemes, as in TurboDiffusion's W8A8 layers (arXiv 2512.16093)."""
ALIGN = 16
"""Stored rows begin at multiples of 16 bytes, which tensor maps and 8-bit matrix units ask for; the rest is zeros."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix (M, K) becomes 8-bit values and float32 scales.

    Args:
        name: what callers write.
        dtype: of the values, ``torch.int8`` or ``torch.float8_e4m3fn``.
        top: the largest magnitude of a value; ``scale = max|x| / top``.
        tiled: one scale for each 128 x 128 tile, (ceil(M / 128), ceil(K / 128)); else one for each row, (M,).
    """

    name: SchemeName
    dtype: torch.dtype
    top: float
    tiled: bool

    @property
    def fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of (rows, columns) values."""
        return (-(-rows // TILE), -(-columns // TILE)) if self.tiled else (rows,)


SCHEMES: dict[str, Scheme] = {
    "int8_tile": Scheme("int8_tile", torch.int8, INT8_TOP, True),
    "int8_row": Scheme("int8_row", torch.int8, INT8_TOP, False),
    "fp8_row": Scheme("fp8_row", torch.float8_e4m3fn, E4M3_TOP, False),
    "fp8_tile": Scheme("fp8_tile", torch.float8_e4m3fn, E4M3_TOP, True),
}
"""By name. ``int8_tile`` is the published one; a row's scale lets a kernel scale once, after the whole sum."""


def scheme_of(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SCHEMES:
        raise ValueError(f"scheme: {name!r} given; known are {', '.join(SCHEMES)}")
    return SCHEMES[name]


class Quantised(NamedTuple):
    """A matrix in 8 bits, as a quantiser or a fused norm returns it; several layers may read one.

    Args:
        values: (M, KP) int8 or float8_e4m3fn, contiguous; columns from K on are 0.
        scale: float32, (M,) or (ceil(M / 128), ceil(K / 128)); value times scale is the number. 0 where all is 0, NaN
            where an input was not finite.
        scheme: name in :data:`SCHEMES`.
        shape: of the tensor that was quantised, (..., K); M is the product of the leading sizes.
        dtype: of that tensor, and of products with it.
    """

    values: Tensor
    scale: Tensor
    scheme: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def dequantise(self) -> Tensor:
        """float32, of ``shape``."""
        scale = self.scale
        if scheme_of(self.scheme).tiled:
            rows, columns = self.values.shape[0], self.shape[-1]
            scale = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
        else:
            scale = scale[:, None]
        return (self.values[:, : self.shape[-1]].float() * scale).reshape(self.shape)


def padded_columns(columns: int) -> int:
    """KP of K."""
    return -(-columns // ALIGN) * ALIGN


def row_count(shape: torch.Size | tuple[int, ...]) -> int:
    """M of (..., K)."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows
