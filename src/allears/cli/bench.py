"""``allears bench``: measure the library on this machine, beside the other packages found installed."""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import tyro

from allears import __version__
from allears.bench.attention.settings import Settings
from allears.bench.gemm.settings import Settings as GemmSettings
from allears.bench.linear.settings import Settings as LinearSettings
from allears.bench.separate.settings import Settings as SeparateSettings
from allears.bench.sparse.settings import Settings as SparseSettings
from allears.bench.video.settings import Settings as VideoSettings
from allears.cli.sparse_layers import SparseLayers

if TYPE_CHECKING:
    from allears.bench.attention.run import Report


@dataclass
class Bench(ABC):
    """What every benchmark has: a folder, and what it writes there."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")] = Path("out/bench")
    """Folder of the results."""

    name: ClassVar[str]

    def run(self) -> int:
        from allears.bench.results import write_document

        report = self.report(self.out / f"{self.name}.png")
        command = "allears bench " + " ".join(sys.argv[2:])
        path = write_document(
            self.out / f"{self.name}.json", report.rows, report.notes, command.strip(), f"allears {__version__}"
        )
        print(f"written: {path}")
        return 0

    @abstractmethod
    def report(self, figure_path: Path) -> "Report":
        """Measure, show, and draw the figure."""


@dataclass
class Attention(Bench):
    """Time attention and its gradients beside torch's kernels, and flash-attn-4 and SageAttention where installed.

    Each is first compared with float32; one that is wrong gets no speed. Writes attention.json and attention.png.
    For instance "allears bench attention", "allears bench attention --quick", or
    "allears bench attention --cases 'fwd 2x4096x16x128 causal' --systems allears-int8fp8 fa2".
    """

    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    name: ClassVar[str] = "attention"

    def report(self, figure_path: Path) -> "Report":
        from allears.bench.attention.show import run_and_show

        return run_and_show(self.settings, figure_path)


@dataclass
class Sparse(Bench):
    """Time sparse-linear attention, whole modules at several sparsities, beside dense kernels and SLA where installed.

    Each is first compared with its own formula; one that is wrong gets no speed. Writes sparse_attention.json and .png.
    For instance "allears bench sparse", "allears bench sparse --quick", or
    "allears bench sparse --cases 'fwd 1x32760x12x128 s0.97' --systems allears-sla2 fa2".
    """

    settings: tyro.conf.OmitArgPrefixes[SparseSettings] = field(default_factory=SparseSettings)
    name: ClassVar[str] = "sparse_attention"

    def report(self, figure_path: Path) -> "Report":
        from allears.bench.attention.show import run_and_show
        from allears.bench.sparse import figure
        from allears.bench.sparse.run import measure

        return run_and_show(self.settings, figure_path, measure, figure.draw)


@dataclass
class Linear(Bench):
    """Time focused linear attention from 1k to 1M tokens, beside its reference and dense attention.

    It is first compared with the reference. Bandwidth is held against that of a copy in the same run. Writes
    linear_attention.json and .png. For instance "allears bench linear" or "allears bench linear --lengths 65536".
    """

    settings: tyro.conf.OmitArgPrefixes[LinearSettings] = field(default_factory=LinearSettings)
    name: ClassVar[str] = "linear_attention"

    def report(self, figure_path: Path) -> "Report":
        from allears.bench.attention.show import run_and_show
        from allears.bench.linear import figure
        from allears.bench.linear.run import measure

        return run_and_show(cast(Any, self.settings), figure_path, measure, figure.draw)


@dataclass
class Gemm(Bench):
    """Time linear layers in 8 bits, whole, at Wan's shapes, beside bf16, cuBLAS, and torchao where installed.

    Each is first compared with float64; one that is wrong gets no speed. Writes gemm.json and gemm.png. For instance
    "allears bench gemm", "allears bench gemm --quick", "allears bench gemm --cases 'linear 32760x1536x8960'", or
    "allears bench gemm --tune", which times the tile sizes of our kernel instead.
    """

    settings: tyro.conf.OmitArgPrefixes[GemmSettings] = field(default_factory=GemmSettings)
    name: ClassVar[str] = "gemm"

    def report(self, figure_path: Path) -> "Report":
        from allears.bench.attention.show import run_and_show
        from allears.bench.gemm import figure
        from allears.bench.gemm.run import measure

        return run_and_show(cast(Any, self.settings), figure_path, measure, figure.draw)


@dataclass
class Separate(Bench):
    """Time separators and read their memory from 5 s to 10 minutes, in three kinds of attention; needs no weights.

    The optimised baseline is first compared with the published one. Writes separate_cost.json and separate_cost.png.
    For instance "allears bench separate", "allears bench separate --quick", or
    "allears bench separate --sizes T --lengths 30 60 --precision float32 bf16".
    """

    settings: tyro.conf.OmitArgPrefixes[SeparateSettings] = field(default_factory=SeparateSettings)
    name: ClassVar[str] = "separate_cost"

    def report(self, figure_path: Path) -> "Report":
        from allears.bench.attention.show import run_and_show
        from allears.bench.separate import figure
        from allears.bench.separate.run import measure

        return run_and_show(cast(Any, self.settings), figure_path, measure, figure.draw)


@dataclass
class Video(Bench):
    """Time Wan's video diffusion step by step: as diffusers has it, each change alone, and all together; no weights.

    Each change is first compared with the stock network. Writes video.json and video.png. For instance
    "allears bench video", "allears bench video --quick", or
    "allears bench video --cases 1.3B-480p --systems diffusers allears-4step".
    """

    settings: tyro.conf.OmitArgPrefixes[VideoSettings] = field(default_factory=VideoSettings)
    name: ClassVar[str] = "video"

    def report(self, figure_path: Path) -> "Report":
        from allears.bench.attention.show import run_and_show
        from allears.bench.video import figure
        from allears.bench.video.run import measure

        return run_and_show(cast(Any, self.settings), figure_path, measure, figure.draw)


COMMANDS = {
    "attention": Attention,
    "sparse": Sparse,
    "sparse-layers": SparseLayers,
    "linear": Linear,
    "gemm": Gemm,
    "separate": Separate,
    "video": Video,
}
