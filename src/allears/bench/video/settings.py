"""What to run, as a value that command lines fill in. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from allears.bench.attention.settings import Names

CASES = ("1.3B-480p", "14B-720p")
QUICK = "tiny"
SYSTEMS = (
    "diffusers",
    "allears-4step",
    "allears-3step",
    "allears-50step",
    "w8a8-norms",
    "sla2",
    "norms",
    "w8a8",
    "steps",
    "diffusers-compile",
    "sage",
)
"""In the order in which they run. ``diffusers``: as that library has it, 50 steps with guidance, so 100 calls of the
network; the others are that with one change or several (see ``rungs.py``)."""


@dataclass(frozen=True)
class Settings:
    """Which rungs of the ladder run at which size: random weights in bfloat16, one video, the diffusion alone."""

    cases: Names = CASES
    """1.3B-480p and 14B-720p: Wan 2.1's networks at 81 frames."""

    systems: Names = SYSTEMS
    """Which systems; all by default. Those that cannot run here are named with the reason."""

    keep: float = 0.03
    """Share of the key blocks that sparse attention reads exactly."""

    linear: Literal["fp8_row", "fp8_tile", "int8_row", "int8_tile"] = "fp8_row"
    """Numbers of the 8-bit layers."""

    graphs: bool = True
    """Systems with all changes run as CUDA graphs."""

    whole: bool = False
    """Time the text encoder and the decoder, too, as diffusers and transformers have them, with random weights."""

    minutes: float = 8.0
    """Stop after about this many minutes; what is left is named."""

    seconds: float = 2.0
    """Time each system for about this long a case, at least one call."""

    quick: bool = False
    """A tiny network that a CPU can run: a check that all works, no measurement."""

    device: str = "auto"
    """cuda, cpu or auto."""

    seed: int = 0
    """Seed of the inputs and of the weights."""

    def __post_init__(self) -> None:
        for option, given, known in (("cases", self.cases, CASES), ("systems", self.systems, SYSTEMS)):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"{option}: {unknown or 'nothing'} given; known are {', '.join(known)}")
        for option in ("minutes", "seconds"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option}: {getattr(self, option)} given; it must be positive")

    @property
    def case_names(self) -> tuple[str, ...]:
        """Names of the cases that are to run."""
        return (QUICK,) if self.quick else self.cases
