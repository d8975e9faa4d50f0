"""What to run, as a value that command lines fill in. Imports no torch."""

from dataclasses import dataclass

import tyro

from allears.bench.attention.settings import Names
from allears.bench.attention.settings import Settings as AttentionSettings


@dataclass(frozen=True)
class Settings(AttentionSettings):
    """Which systems of sparse attention run which cases, and for how long."""

    cases: Names = ()
    """Groups (video, long, shapes, quick) or single cases like "fwd 1x32760x12x128 s0.97"; all but quick by default."""

    error_seeds: tyro.conf.Suppress[int] = 1  # each system has its own formula, on one input

    minutes: float = 6.0
    """Stop after about this many minutes; the cases left are named."""

    @property
    def case_names(self) -> tuple[str, ...]:
        """Names of cases or groups that are to run."""
        from allears.bench.sparse.cases import DEFAULT_GROUPS

        return self.cases or (("quick",) if self.quick else DEFAULT_GROUPS)
