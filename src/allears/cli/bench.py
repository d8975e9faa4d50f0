"""``allears bench``: measure the library on this machine, beside the other packages found installed."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from allears import __version__
from allears.bench.attention.settings import Settings


@dataclass
class Attention:
    """Time attention and its gradients beside torch's kernels, and flash-attn-4 and SageAttention where installed.

    Each is first compared with float32; one that is wrong gets no speed. Writes attention.json and attention.png.
    For instance "allears bench attention", "allears bench attention --quick", or
    "allears bench attention --cases 'fwd 2x4096x16x128 causal' --systems allears-int8fp8 fa2".
    """

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = Path("out/bench")
    """Folder of the results."""

    def run(self) -> int:
        from allears.bench.attention.show import run_and_show
        from allears.bench.results import write_document

        report = run_and_show(self.settings, self.out / "attention.png")
        command = "allears bench " + " ".join(sys.argv[2:])
        path = write_document(
            self.out / "attention.json", report.rows, report.notes, command.strip(), f"allears {__version__}"
        )
        print(f"written: {path}")
        return 0


COMMANDS = {"attention": Attention}
