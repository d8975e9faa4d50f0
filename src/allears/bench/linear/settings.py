"""What to run, as a value that command lines fill in. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

SYSTEMS = ("allears", "allears-graph", "allears-reference", "softmax")
SHAPES = ((8, 64), (8, 16))
"""Heads and head size: that of the dense kernels' benchmarks, and that of FLASepformer's layers."""

Numbers = Annotated[tuple[int, ...], tyro.conf.arg(metavar="N...")]


@dataclass(frozen=True)
class Settings:
    """Which systems run at which lengths."""

    lengths: Numbers = tuple(2**power for power in range(10, 21))
    """Numbers of tokens."""

    systems: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")] = SYSTEMS
    """allears (the kernel), allears-graph (its forward as a CUDA graph), allears-reference (PyTorch in float32),
    softmax (torch's dense attention)."""

    dense_up_to: int = 2**17
    """The longest length for softmax attention, whose time grows with the square."""

    backward: bool = True
    """Also time forward and backward together."""

    quick: bool = False
    """Timed briefly, at two tiny lengths: a check that all works, no measurement."""

    device: str = "auto"
    """cuda, cpu or auto."""

    seed: int = 0
    """Seed of the random inputs."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown:
            raise ValueError(f"systems: {unknown} given; known are {', '.join(SYSTEMS)}")
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths: {self.lengths} given; give positive numbers of tokens")

    @property
    def tokens(self) -> tuple[int, ...]:
        """The lengths that are to run, ascending."""
        return (64, 128) if self.quick else tuple(sorted(self.lengths))
