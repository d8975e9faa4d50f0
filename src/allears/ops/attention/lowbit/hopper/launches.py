"""How the Hopper kernels are launched, by numerics and head size: the one table that chooses.

Every field is a macro of ``forward.cu`` or ``backward.cu``, where it is explained, and changes speed alone.
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
        skip: a warpgroup passes over tiles that are hidden from all of its rows.
    """

    skip: bool = False

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
    """

    groups: int = 2
    late: bool = False
    turns: bool = False
    stages: int = 2

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
    ("int8", 64): ForwardLaunch(),
    ("int8", 128): ForwardLaunch(),
}
"""By the dtype of P and V, and the head size."""

BACKWARD: dict[int, BackwardLaunch] = {
    64: BackwardLaunch(groups=3, late=True, turns=True),
    128: BackwardLaunch(),
}
"""By the head size."""
