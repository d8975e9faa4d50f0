"""Sparse attention: every system at every sparsity, in one run. The harness is ``allears.bench.sparse``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from allears.bench.sparse.settings import Settings

from .attention import AttentionCase
from .registry import case

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


@case("sparse_attention")
@dataclass
class SparseAttentionCase(AttentionCase):
    """Check sparse attention, then time it; write benchmarks/results/NAME.json and NAME.png."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    name: str = "sparse_attention"
    """Name of the result files."""

    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure."""
        from allears.bench.attention.show import run_and_show
        from allears.bench.sparse import figure
        from allears.bench.sparse.run import measure

        return run_and_show(self.settings, figure_path, measure, figure.draw)
