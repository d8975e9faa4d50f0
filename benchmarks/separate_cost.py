"""Separators: time and peak memory over length, in one run. The harness is ``allears.bench.separate``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from allears.bench.separate.settings import Settings

from .attention import AttentionCase
from .registry import case

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


@case("separate_cost")
@dataclass
class SeparateCostCase(AttentionCase):
    """Check separators, then time them from 5 s to 10 minutes; write benchmarks/results/NAME.json and NAME.png."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    name: str = "separate_cost"
    """Name of the result files."""

    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure."""
        from allears.bench.attention.show import run_and_show
        from allears.bench.separate import figure
        from allears.bench.separate.run import measure

        return run_and_show(self.settings, figure_path, measure, figure.draw)
