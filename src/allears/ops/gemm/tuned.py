"""Tile sizes of the Triton product: what is worth trying on each chip, and what measurements chose.

``python -m benchmarks gemm --tune`` times the candidates at the shapes at hand and names the fastest of each;
what it found on a chip stands in :data:`MEASURED`. Shapes: M rows, N columns, K summed.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """How the kernel in ``triton_gemm.py`` is compiled and launched.

    Args:
        bm, bn, bk: rows, columns and steps of K of a tile.
        warps, stages: ``num_warps``, and how many steps of K are on their way at once.
        per_sm: programs for each multiprocessor.
        specialise: one warp group loads and the others multiply (Hopper; ``warps`` is then that of one group).
        map_out: the output goes through a tensor map.
        group: tiles of rows that are worked on together, for the second-level cache.
    """

    bm: int
    bn: int
    bk: int = 128
    warps: int = 8
    stages: int = 3
    per_sm: int = 1
    specialise: bool = False
    map_out: bool = False
    group: int = 8

    @property
    def name(self) -> str:
        """For notes: ``128x256x128 w8 s3``."""
        marks = "ws" * self.specialise, "out" * self.map_out, f"p{self.per_sm}" if self.per_sm > 1 else ""
        group = f"g{self.group}" if self.group != 8 else ""
        parts = (f"{self.bm}x{self.bn}x{self.bk}", f"w{self.warps}", f"s{self.stages}", *marks, group)
        return "_".join(part for part in parts if part)

    def constants(self) -> dict[str, Any]:
        """Arguments of the kernel that this config fixes."""
        sizes = {"BM": self.bm, "BN": self.bn, "BK": self.bk, "GROUP": self.group}
        return {**sizes, "SPECIALISE": self.specialise, "MAP_OUT": self.map_out}


_HOPPER_ROW = (
    Config(128, 256, stages=3),
    Config(128, 256, stages=3, map_out=True),
    Config(128, 256, warps=4, stages=3, specialise=True),
    Config(128, 256, warps=4, stages=3, specialise=True, group=16),
    Config(128, 256, stages=3, group=16),
    Config(128, 128, warps=4, stages=3, per_sm=2),
    Config(128, 128, warps=4, stages=4, specialise=True),
)
_HOPPER_TILE = (
    Config(128, 128, stages=4),
    Config(128, 64, warps=4, stages=3, per_sm=3),
    Config(64, 128, warps=4, stages=3, per_sm=3),
    Config(128, 128, warps=4, stages=4, specialise=True),
    Config(128, 128, warps=4, stages=4, specialise=True, group=16),
    Config(128, 128, stages=3, map_out=True),
)
_AMPERE = (Config(128, 128, stages=3), Config(128, 64, bk=64, warps=4, stages=4, per_sm=2))
_DATA_CENTRE = (Config(128, 128, stages=4), Config(128, 64, warps=4, stages=4))
_DESK = (Config(128, 128, bk=64, stages=3), Config(128, 64, bk=64, warps=4, stages=3, per_sm=2))

CANDIDATES: dict[tuple[int, str], tuple[Config, ...]] = {
    (80, "int8_row"): _AMPERE,
    (80, "int8_tile"): _AMPERE,
    (90, "int8_row"): _HOPPER_ROW,
    (90, "fp8_row"): _HOPPER_ROW,
    (90, "int8_tile"): _HOPPER_TILE,
    (90, "fp8_tile"): _HOPPER_TILE,
    (100, "fp8_row"): _DATA_CENTRE,
    (100, "fp8_tile"): _DATA_CENTRE,
    (100, "int8_row"): _DATA_CENTRE,
    (100, "int8_tile"): _DATA_CENTRE,
    (120, "fp8_row"): _DESK,
    (120, "fp8_tile"): _DESK,
    (120, "int8_row"): _DESK,
    (120, "int8_tile"): _DESK,
}
"""By (capability, scheme); the first runs where nothing was measured."""

FEW_ROWS = 64
_FEW = Config(64, 64, warps=4, stages=3, per_sm=2)

MEASURED: dict[tuple[int, str, int, int], Config] = {}
"""By (capability, scheme, N, K)."""

CUBLAS_FIRST: tuple[int, ...] = (90, 100)
"""Chips on which ``auto`` takes cuBLAS before Triton for ``fp8_row``, where both can run. A guess until measured."""


def chip_of(capability: int) -> int:
    """The chip of :data:`CANDIDATES` whose kernels a GPU runs; ``capability`` is ten times its compute capability."""
    if capability >= 120:
        return 120
    if capability >= 100:
        return 100
    return 90 if capability >= 90 else 80


def candidates_for(chip: int, scheme: str) -> tuple[Config, ...]:
    """What is worth trying; FP8 on compute capability 8.9 takes the tiles of INT8."""
    return CANDIDATES.get((chip, scheme)) or CANDIDATES[chip, scheme.replace("fp8", "int8")]


def config_for(chip: int, scheme: str, rows: int, columns: int, inner: int, specialise: bool = False) -> Config:
    """The config for M, N, K: the measured one, or the first candidate; small tiles for few rows.

    Args:
        specialise: whether Triton compiles configs with ``specialise`` here.
    """
    if rows <= FEW_ROWS:
        return _FEW
    found = MEASURED.get((chip, scheme, columns, inner))
    if found is None or (found.specialise and not specialise):
        return candidates_for(chip, scheme)[0]
    return found
