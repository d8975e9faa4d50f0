"""Linear attention: time, memory and bandwidth over length, in one run. The harness is ``allears.bench.linear``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from allears.bench.linear.settings import Settings

from .attention import AttentionCase
from .registry import case

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


@case("linear_attention")
@dataclass
class LinearAttentionCase(AttentionCase):
    """Check linear attention, then time it from 1k to 1M tokens; write benchmarks/results/NAME.json and NAME.png."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    name: str = "linear_attention"
    """Name of the result files."""

    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure."""
        from allears.bench.attention.show import run_and_show
        from allears.bench.linear import figure
        from allears.bench.linear.run import measure

        return run_and_show(self.settings, figure_path, measure, figure.draw)
