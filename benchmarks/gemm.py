"""8-bit linear layers at the shapes of video models, in one run. The harness is ``allears.bench.gemm``."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from allears.bench.gemm.settings import Settings

from . import results
from .attention import AttentionCase
from .registry import case

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


@case("gemm")
@dataclass
class GemmCase(AttentionCase):
    """Check linear layers in 8 bits, then time them beside bf16 and peers; write benchmarks/results/NAME.json, .png."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    name: str = "gemm"
    """Name of the result files."""

    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure; the rows so far are written after each case."""
        from allears.bench.attention.show import run_and_show
        from allears.bench.gemm import figure
        from allears.bench.gemm.run import measure

        def keep(report: "Report") -> None:
            results.write(self.name, report.rows, report.notes, self.results_folder, self.commit)

        return run_and_show(self.settings, figure_path, partial(measure, keep=keep), figure.draw)
