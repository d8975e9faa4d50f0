"""``allears bench sparse-layers``: what became of each layer of a model fitted with sparse-linear attention."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class SparseLayers:
    """Show what the fit of sparse-linear attention found of each layer of a model: attention mass that the picked
    blocks keep, error against dense attention, the sparsity that was chosen, and which layers stay dense, and why.

    Reads what allears.turbo.sparse.sparsify left beside the weights; nothing is measured again. For instance
    "allears bench sparse-layers model-sparse", or "allears bench sparse-layers model-sparse --json".
    """

    fitted: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STEM")]
    """NAME of the NAME.json that sparsify wrote; NAME.json itself is taken too."""

    json: bool = False
    """Print one JSON object instead of a table."""

    def run(self) -> int:
        from allears.turbo.sparse.report import read_reports, summary, table

        reports = read_reports(self.fitted.with_suffix("") if self.fitted.suffix == ".json" else self.fitted)
        if self.json:
            print(json.dumps({"layers": [summary(report) for report in reports]}, indent=1))
        else:
            print(table(reports))
        return 0
