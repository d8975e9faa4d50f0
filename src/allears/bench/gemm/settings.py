"""What to run, as a value that command lines fill in. Imports no torch."""

from dataclasses import dataclass
from typing import Annotated

import tyro

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")]


@dataclass(frozen=True)
class Settings:
    """Which layers run on which shapes, and for how long."""

    cases: Names = ()
    """Groups (1.3B, 14B, rows, quick) or single cases: "linear MxKxN", "norm MxC", "gelu MxC"; all groups but quick by
    default."""

    systems: Names = ()
    """Which systems; all by default. Those that cannot run here are named with the reason."""

    minutes: float = 4.0
    """Stop after about this many minutes; the cases left are named."""

    tune: bool = False
    """Time every candidate of tile sizes of the Triton product instead of the systems, and name the fastest."""

    quick: bool = False
    """Tiny cases that a CPU can run, timed briefly: a check that all works, no measurement."""

    device: str = "auto"
    """cuda, cpu or auto."""

    seed: int = 0
    """Seed of the random inputs."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes: {self.minutes} given; it must be positive")

    @property
    def case_names(self) -> tuple[str, ...]:
        """Names of cases or groups that are to run."""
        from allears.bench.gemm.cases import DEFAULT_GROUPS

        return self.cases or (("quick",) if self.quick else DEFAULT_GROUPS)
