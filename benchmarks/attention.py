"""Attention: every system on every shape and direction, in one run. The harness is ``allears.bench.attention``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from allears.bench.attention.settings import Settings

from . import results
from .registry import case

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


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
        report = self.report(self.results_folder / f"{self.name}.png")
        path = results.write(self.name, report.rows, report.notes, self.results_folder, self.commit)
        print(f"written: {path}")
        return 0

    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure."""
        from allears.bench.attention.show import run_and_show

        return run_and_show(self.settings, figure_path)
