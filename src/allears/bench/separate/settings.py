"""What to run, as a value that command lines fill in, and the cases that follow from it. Imports no torch."""

import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from allears.bench.attention.settings import Names

SIZES = {"T": "sepreformer-t", "B": "sepreformer-b", "L": "sepreformer-l", "locoformer-m": "locoformer-m"}
"""Presets of the separators (``models/separate/config.py``), by the name that a case has for them."""
ATTENTIONS = ("published", "optimised", "fla")
PRECISIONS = ("float32", "tf32", "bf16")
FIRST_S = 30
"""The length of the published comparison: its cases run first."""
_NAME = re.compile(r"(\S+) ([\d.]+)s(?: (\S+))?")

Lengths = Annotated[tuple[float, ...], tyro.conf.arg(metavar="S...")]


@dataclass(frozen=True)
class Case:
    """A separator's size, the length of its input, and the precision of its products."""

    size: str
    seconds: float
    precision: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.size} {self.seconds:g}s" + ("" if self.precision == "float32" else f" {self.precision}")

    @property
    def group(self) -> str:
        """The size, and the precision where it is not float32."""
        return self.size if self.precision == "float32" else f"{self.size} {self.precision}"


def parse(name: str) -> Case | None:
    """The case of that name; ``None`` where it is none, as with a check's."""
    found = _NAME.fullmatch(name)
    if not found:
        return None
    seconds = float(found[2])
    return Case(found[1], int(seconds) if seconds.is_integer() else seconds, found[3] or "float32")


@dataclass(frozen=True)
class Settings:
    """Which separators run at which lengths: inference, one input of noise, weights as they are drawn at first."""

    sizes: Names = ("T", "B", "L")
    """T, B, L of SepReformer and locoformer-m, all at 8 kHz."""

    lengths: Lengths = (5, 10, 20, 30, 60, 120, 240)
    """Seconds of the inputs."""

    fla_lengths: Lengths = (600,)
    """More seconds, on a GPU, for linear attention alone."""

    locoformer_up_to: float = 30
    """Longest input of the sizes of TF-Locoformer, in seconds."""

    attention: Names = ATTENTIONS
    """published (as released, with its tensor of relative positions), optimised (the same by fused attention), fla."""

    precision: Names = ("float32",)
    """float32 (TF32 off), tf32, bf16 (autocast)."""

    graphs: bool = True
    """On a GPU, also time each system as a CUDA graph, which leaves out the time of launching kernels."""

    minutes: float = 8.0
    """Stop after about this many minutes; the cases left are named."""

    quick: bool = False
    """One size and tiny lengths that a CPU can run, timed briefly: a check that all works, no measurement."""

    device: str = "auto"
    """cuda, cpu or auto."""

    seed: int = 0
    """Seed of the input and of the weights."""

    def __post_init__(self) -> None:
        for option, given, known in (
            ("sizes", self.sizes, tuple(SIZES)),
            ("attention", self.attention, ATTENTIONS),
            ("precision", self.precision, PRECISIONS),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"{option}: {unknown or 'nothing'} given; known are {', '.join(known)}")
        for option, lengths in (("lengths", self.lengths), ("fla_lengths", self.fla_lengths)):
            if any(not seconds > 0 for seconds in lengths):
                raise ValueError(f"{option}: {lengths} given; positive numbers of seconds are wanted")
        if not self.minutes > 0:
            raise ValueError(f"minutes: {self.minutes} given; it must be positive")

    def cases(self, gpu: bool) -> list[Case]:
        """Those of 30 s first, then those of linear attention alone, then the others, short ones first."""
        if self.quick:
            return [Case(self.sizes[0], seconds) for seconds in (0.1, 0.2, 0.4)]
        lengths = dict.fromkeys((*self.lengths, *(self.fla_lengths if gpu else ())))
        found = [
            Case(size, seconds, precision)
            for precision in self.precision
            for seconds in sorted(lengths)
            for size in self.sizes
            if not SIZES[size].startswith("locoformer") or seconds <= self.locoformer_up_to
        ]
        return sorted(found, key=lambda case: (case.seconds != FIRST_S, case.seconds in self.lengths))

    def attentions(self, case: Case) -> list[str]:
        """Those that run the case."""
        dense = self.quick or case.seconds in self.lengths
        return [name for name in self.attention if dense or name == "fla"]
