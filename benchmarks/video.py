"""Video diffusion: the ladder from a stock Wan to all changes together. The harness is ``allears.bench.video``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import tyro

from allears.bench.video.settings import Settings

from .attention import AttentionCase
from .registry import case

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


@case("video")
@dataclass
class VideoCase(AttentionCase):
    """Check each rung of the ladder, then time it; write benchmarks/results/NAME.json and NAME.png."""

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    name: str = "video"
    """Name of the result files."""

    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure."""
        from allears.bench.attention.show import run_and_show
        from allears.bench.video import figure
        from allears.bench.video.run import measure

        return run_and_show(cast(Any, self.settings), figure_path, measure, figure.draw)
