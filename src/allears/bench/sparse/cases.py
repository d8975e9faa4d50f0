"""What is measured: a direction, a shape and a sparsity. B batch, L length, H query heads, G key heads, D head size."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from allears.bench.attention.cases import Case
from allears.bench.attention.cases import parse as parse_dense


@dataclass(frozen=True)
class SparseCase(Case):
    """Attention in one direction, of which ``sparsity`` of the key blocks are not read exactly."""

    sparsity: float

    @property
    def name(self) -> str:
        return f"{self.dense_name} s{self.sparsity:.2f}"

    @property
    def dense_name(self) -> str:
        """Direction and shape alone."""
        return f"{self.mode} {self.shape.name}"

    @property
    def keep(self) -> float:
        """Share of the key blocks that are read exactly."""
        return round(1 - self.sparsity, 6)


def parse(text: str) -> SparseCase:
    """``"MODE BxLxHxD[ causal] s0.97"`` (``BxLxH/GxD`` with G key heads) as a case.

    Raises:
        ValueError: the text is no such name, or its sparsity is not in [0, 1).
    """
    dense, _, sparsity = text.strip().rpartition(" s")
    try:
        share = float(sparsity)
    except ValueError:
        share = -1.0
    if not dense or not 0 <= share < 1:
        raise ValueError(
            f"cases: {text!r} is neither a group ({', '.join(GROUPS)}) nor 'MODE BxLxHxD[ causal] sX' with a sparsity "
            "X from 0 to below 1, for instance 'fwd 1x32760x12x128 s0.97'"
        )
    case = parse_dense(dense)
    return SparseCase(case.mode, case.shape, share)


def _each(modes: Iterable[str], shape: str, sparsities: Iterable[float]) -> tuple[SparseCase, ...]:
    return tuple(parse(f"{mode} {shape} s{sparsity}") for mode, sparsity in product(modes, sparsities))


SPARSITIES = (0.90, 0.95, 0.97)
GROUPS: dict[str, tuple[SparseCase, ...]] = {
    "video": _each(["fwd", "bwd"], "1x32760x12x128", SPARSITIES),
    "long": _each(["fwd"], "1x75600x40x128", SPARSITIES),
    "shapes": (
        *_each(["fwd", "bwd"], "1x32760x12x64", [0.97]),
        *_each(["fwd", "bwd"], "1x32760x12x128 causal", [0.97]),
        *_each(["fwd", "bwd"], "1x32760x12/4x128", [0.97]),
    ),
    "quick": (*_each(["fwd", "bwd"], "1x600x2x64", [0.7]), *_each(["fwd", "bwd"], "1x513x4/2x32 causal", [0.5])),
}
"""Named sets of cases: two shapes of video models (81 frames at 480p and at 720p), the first also
with a head size of 64, causal, and with shared key heads, and tiny ones that a CPU can run."""
DEFAULT_GROUPS = ("video", "long", "shapes")


def select(names: Iterable[str]) -> list[SparseCase]:
    """The cases of groups and of single names, each once, in the order given.

    Raises:
        ValueError: a name is neither.
    """
    found: dict[SparseCase, None] = {}
    for name in names:
        found.update(dict.fromkeys(GROUPS[name] if name in GROUPS else (parse(name),)))
    return list(found)
