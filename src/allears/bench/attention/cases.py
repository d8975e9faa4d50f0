"""What is measured: a direction, a shape, causal or not. B batch, L length, H query heads, G key heads, D head size."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

Mode = Literal["fwd", "bwd", "fwd+bwd"]
MODES: tuple[Mode, ...] = get_args(Mode)
_WORK: dict[Mode, float] = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}  # matrix products: 2, 5, 7
_NAME = re.compile(r"(fwd\+bwd|fwd|bwd) (\d+)x(\d+)x(\d+)(?:/(\d+))?x(\d+)( causal)?")


@dataclass(frozen=True)
class Shape:
    """Self-attention of (B, L, H, D) queries on (B, L, G, D) keys and values."""

    batch: int
    length: int
    heads: int
    head_dim: int
    kv_heads: int
    causal: bool = False

    @property
    def name(self) -> str:
        """``BxLxHxD``, or ``BxLxH/GxD`` where key heads are shared; `` causal`` behind it where it is."""
        heads = f"{self.heads}" if self.kv_heads == self.heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.batch}x{self.length}x{heads}x{self.head_dim}{' causal' if self.causal else ''}"


@dataclass(frozen=True)
class Case:
    """A shape in one direction: forward, backward alone, or both."""

    mode: Mode
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.mode} {self.shape.name}"

    @property
    def flops(self) -> float:
        """Dense count: 4 B H L^2 D forward, 2.5 times that backward, 3.5 times both; half of it where causal."""
        s = self.shape
        forward = 4.0 * s.batch * s.heads * s.length**2 * s.head_dim * (0.5 if s.causal else 1.0)
        return forward * _WORK[self.mode]


def parse(text: str) -> Case:
    """``"MODE BxLxHxD[ causal]"`` or ``"MODE BxLxH/GxD[ causal]"`` as a case.

    Raises:
        ValueError: the text is no such name, or H is no multiple of G.
    """
    found = _NAME.fullmatch(text.strip())
    if not found:
        raise ValueError(
            f"cases: {text!r} is neither a group ({', '.join(GROUPS)}) nor 'MODE BxLxHxD[ causal]' with MODE in "
            f"{', '.join(MODES)}, for instance 'fwd+bwd 4x8192x16x128 causal' or 'fwd 4x8192x16/4x128'"
        )
    batch, length, heads, kv_heads, head_dim, causal = found.groups()[1:]
    mode = next(mode for mode in MODES if mode == found[1])
    sizes = [int(size) for size in (batch, length, heads, head_dim, kv_heads or heads)]
    if min(sizes) < 1 or sizes[2] % sizes[4]:
        raise ValueError(f"cases: {text!r}: sizes must be positive, and H a multiple of G")
    return Case(mode, Shape(*sizes, causal=bool(causal)))


def _each(modes: Iterable[str], shapes: Iterable[str]) -> tuple[Case, ...]:
    return tuple(parse(f"{mode} {shape}") for shape, mode in product(shapes, modes))


SWEEP_TOKENS = 32_768
SWEEP_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
GROUPS: dict[str, tuple[Case, ...]] = {
    "video": (*_each(MODES, ["1x32760x12x128"]), *_each(["fwd"], ["1x75600x40x128"])),
    "language": _each(MODES, ["4x8192x16x128", "4x8192x16x128 causal", "4x8192x16x64", "4x8192x16x64 causal"]),
    "gqa": _each(["fwd", "fwd+bwd"], ["4x8192x16/4x128 causal"]),
    "sweep": _each(["fwd", "fwd+bwd"], [f"{SWEEP_TOKENS // n}x{n}x16x128" for n in SWEEP_LENGTHS]),
    "quick": _each(MODES, ["1x256x2x64", "1x200x4/2x64 causal"]),
}
"""Named sets of cases: the shapes of a video model, of a language model, shared key heads, length at a fixed number of
tokens (the figure), and tiny ones that a CPU can run."""
DEFAULT_GROUPS = ("video", "language", "gqa", "sweep")


def select(names: Iterable[str]) -> list[Case]:
    """The cases of groups and of single names, each once, in the order given.

    Raises:
        ValueError: a name is neither.
    """
    found: dict[Case, None] = {}
    for name in names:
        found.update(dict.fromkeys(GROUPS[name] if name in GROUPS else (parse(name),)))
    return list(found)
