"""What is measured: a linear layer of M rows, K channels in and N out, or a norm or activation of (M, C)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A layer and its shape.

    Args:
        kind: ``"linear"``; ``"norm"``, a modulated layer norm after a gated residual; or ``"gelu"``. Those of the last
            two end in 8 bits.
        rows: M.
        inner: K, or C.
        columns: N; 0 where there is none.
    """

    kind: str
    rows: int
    inner: int
    columns: int = 0

    @property
    def name(self) -> str:
        sizes = (self.rows, self.inner, self.columns)
        return f"{self.kind} {'x'.join(str(size) for size in sizes if size)}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns


def parse(text: str) -> Case:
    """``"linear MxKxN"``, ``"norm MxC"`` or ``"gelu MxC"`` as a case.

    Raises:
        ValueError: the text is none of them.
    """
    found = re.fullmatch(r"(linear) (\d+)x(\d+)x(\d+)|(norm|gelu) (\d+)x(\d+)", text.strip())
    parts = [part for part in found.groups() if part] if found else []
    sizes = [int(part) for part in parts[1:]]
    if not sizes or 0 in sizes:
        raise ValueError(
            f"cases: {text!r} is neither a group ({', '.join(GROUPS)}) nor 'linear MxKxN', 'norm MxC' or 'gelu MxC', "
            "for instance 'linear 32760x1536x8960'"
        )
    return Case(parts[0], *sizes)


def _linear(rows: int, *shapes: tuple[int, int]) -> tuple[Case, ...]:
    return tuple(Case("linear", rows, inner, columns) for inner, columns in shapes)


GROUPS: dict[str, tuple[Case, ...]] = {
    "1.3B": _linear(32_760, (1536, 1536), (1536, 4608), (1536, 8960), (8960, 1536)),
    "14B": _linear(75_600, (5120, 5120), (5120, 15_360), (5120, 13_824), (13_824, 5120)),
    "rows": (Case("norm", 32_760, 1536), Case("gelu", 32_760, 8960), Case("norm", 75_600, 5120)),
    "quick": (*_linear(70, (48, 33), (256, 64)), Case("norm", 70, 48), Case("gelu", 70, 48)),
}
"""Named sets: Wan 2.1's layers at 480p (1.3B) and 720p (14B), 81 frames, with q, k and v in one (3 K); the norms and
activations before them; and tiny ones that a CPU can run."""
DEFAULT_GROUPS = ("1.3B", "14B", "rows")

BLOCKS: dict[str, tuple[tuple[Case, int], ...]] = {
    name: (
        (Case("linear", rows, inner, 3 * inner), 1),
        (Case("linear", rows, inner, inner), 3),
        (Case("linear", rows, inner, wide), 1),
        (Case("linear", rows, wide, inner), 1),
    )
    for name, rows, inner, wide in (("1.3B", 32_760, 1536, 8960), ("14B", 75_600, 5120, 13_824))
}
"""How often each shape runs in a block: q, k and v in one, three single projections (output, and query and output of
the cross attention), and the two layers of the MLP; keys and values of the text are left out, as it has 512 tokens."""


def select(names: Iterable[str]) -> list[Case]:
    """The cases of groups and of single names, each once, in the order given.

    Raises:
        ValueError: a name is neither.
    """
    found: dict[Case, None] = {}
    for name in names:
        found.update(dict.fromkeys(GROUPS[name] if name in GROUPS else (parse(name),)))
    return list(found)
