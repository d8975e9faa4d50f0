"""What to run, as a value that command lines fill in. Imports no torch."""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

Names = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...")]


@dataclass(frozen=True)
class Settings:
    """Which attention systems run which cases, and for how long."""

    cases: Names = ()
    """Groups (video, language, gqa, sweep, quick) or single cases like "fwd+bwd 4x8192x16x128 causal"; all groups but
    quick by default."""

    systems: Names = ()
    """Which systems; all by default. Those that cannot run here are named with the reason."""

    minutes: float = 4.0
    """Stop after about this many minutes; the cases left are named."""

    quick: bool = False
    """Tiny cases that a CPU can run, timed briefly: a check that all works, no measurement."""

    device: str = "auto"
    """cuda, cpu or auto."""

    peer_folders: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER...")] = ()
    """Folders made with "pip install --target", searched for peers besides the environment: so two versions of one
    package can be measured in one run."""

    error_seeds: int = 3
    """How many inputs the error of a forward pass is the mean of; its interval is from the lowest to the highest."""

    seed: int | None = None
    """Seed of the random inputs; a fresh one by default, which the notes name."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ValueError(f"minutes: {self.minutes} given; it must be positive")
        if self.error_seeds < 1:
            raise ValueError(f"error_seeds: {self.error_seeds} given; it must be at least 1")

    @property
    def case_names(self) -> tuple[str, ...]:
        """Names of cases or groups that are to run."""
        from allears.bench.attention.cases import DEFAULT_GROUPS

        return self.cases or (("quick",) if self.quick else DEFAULT_GROUPS)

    def seed_to_use(self) -> int:
        """``seed``, or a fresh one."""
        return secrets.randbelow(2**31) if self.seed is None else self.seed
