"""Attention: every system on every shape and direction, in one run. The harness is ``allears.bench.attention``."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from allears.bench.attention.settings import Settings

from . import results
from .registry import case


@case("attention")
@dataclass
class AttentionCase:
    """Check attention, then time it; write benchmarks/results/NAME.json and NAME.png."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    name: str = "attention"
    """Name of the result files."""

    results_folder: Path = results.RESULTS
    """Folder of the result files."""

    commit: str | None = None
    """The commit that is measured, for a copy of the files without their repository."""

    def run(self) -> int:
        from allears.bench.attention.show import run_and_show

        report = run_and_show(self.settings, self.results_folder / f"{self.name}.png")
        path = results.write(self.name, report.rows, report.notes, self.results_folder, self.commit)
        print(f"written: {path}")
        return 0
