"""How the Hopper kernels are launched, by numerics and head size: the one table that chooses.

Every field is a macro of ``forward.cu`` or ``backward.cu``, where it is explained. A field changes speed; two of them
change rounding too: ``lazy_max`` (E4M3 P relative to a maximum that may lag by two bits) and ``p_unsigned`` (INT8 P in
0 to 255, half the step, with row sums of the rounded P).
"""

from dataclasses import asdict, dataclass
from typing import Literal

Values = Literal["fp8", "int8"]
_SHARED_LIMIT = 227 * 1024
_BARRIERS = 80  # bytes of shared memory before the buffers; they end where a kilobyte begins


@dataclass(frozen=True)
class ForwardLaunch:
    """Macros of ``forward.cu``.

    Args:
        split_s: issue the next tile's scores beside this tile's P V; head size 64.
        skip: a warpgroup passes over tiles that are hidden from all of its rows.
        q_ahead: idle warps quantise the next item's Q.
        lazy_max: FP8: move a row's maximum only when it is outgrown by two bits.
        p_unsigned: INT8: P in 0 to 255.
    """

    split_s: bool = False
    skip: bool = False
    q_ahead: bool = False
    lazy_max: bool = False
    p_unsigned: bool = False

    @property
    def defines(self) -> dict[str, int]:
        """Macro -> 0 or 1."""
        return _macros(self)


@dataclass(frozen=True)
class BackwardLaunch:
    """Macros of ``backward.cu``.

    Args:
        groups: warpgroups of a block, 64 keys each: 2 or 3.
        late: dQ of a tile is made after the next tile's dS.
        turns: by one warpgroup in turn; with ``late`` at head size 64, needed for 3 groups.
        stages: tiles of queries that are held or on their way.
        p_unsigned: P in 0 to 255.
    """

    groups: int = 2
    late: bool = False
    turns: bool = False
    stages: int = 2
    p_unsigned: bool = False

    @property
    def defines(self) -> dict[str, int]:
        """Macro -> number."""
        return _macros(self)

    @property
    def keys(self) -> int:
        """Keys of a block."""
        return 64 * self.groups

    def shared_bytes(self, size: int) -> int:
        """Shared memory of a block at head size ``size``: the buffers, and what aligns them to 1024."""
        queries = 64
        k_and_v = 5 * self.keys * size
        ds = (1 + self.late) * self.keys * queries * 2
        dq = 4 * queries * size * (self.groups if self.turns else 1)
        buffers = k_and_v + ds + dq + self.stages * (5 * queries * size + 16 * queries)
        return min(buffers + 1024, _SHARED_LIMIT - _BARRIERS)


def _macros(launch: ForwardLaunch | BackwardLaunch) -> dict[str, int]:
    return {name.upper(): int(value) for name, value in asdict(launch).items()}


FORWARD: dict[tuple[Values, int], ForwardLaunch] = {
    ("fp8", 64): ForwardLaunch(skip=True),
    ("fp8", 128): ForwardLaunch(),
    ("int8", 64): ForwardLaunch(p_unsigned=True),
    ("int8", 128): ForwardLaunch(p_unsigned=True),
}
"""By the dtype of P and V, and the head size."""

BACKWARD: dict[int, BackwardLaunch] = {
    64: BackwardLaunch(groups=3, late=True, turns=True, p_unsigned=True),
    128: BackwardLaunch(p_unsigned=True),
}
"""By the head size."""
