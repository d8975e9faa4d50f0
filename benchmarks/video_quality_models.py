"""The settings of the video model whose quality is compared, and their networks from the weights at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allears.core.weights import weight_paths
from allears.models.video.build import SparseLayers, build_net
from allears.models.video.model import VideoNet
from allears.recipes.video_merge import Weights, load_stem, merged

AGAIN_NOISE = 1_000_003
FEW = (4, 2, 1)
_WITHOUT = {"qat": "no QAT", "router": "router not learned", "dmd": "no DMD", "rcm": "not distilled"}


@dataclass(frozen=True)
class Setting:
    """How videos are made.

    Args:
        steps: of the sampler.
        few: from distilled weights, without guidance; or from the teacher's.
        sparsity: share of the key blocks that are not read exactly; 0 is dense.
        bits: 16, or 8 of attention and linear layers.
        without: what is left out: ``qat``, ``router``, ``dmd``, or ``rcm``: few Euler steps of the teacher.
        other_noise: added to the seeds.
        after: sparse weights tuned from the distilled ones, in place of merged ones.
    """

    steps: int
    few: bool
    sparsity: float = 0.0
    bits: int = 16
    without: str = ""
    other_noise: int = 0
    after: bool = False

    @property
    def name(self) -> str:
        """As the system is called in the result file."""
        dense = "dense" if not self.sparsity else f"{round(100 * self.sparsity)} % sparse"
        missing = f", {_WITHOUT[self.without]}" if self.without else ""
        more = ", other noise" if self.other_noise else ", tuned after" if self.after else ""
        return f"{self.steps} step{'s' if self.steps > 1 else ''}, {dense}, {self.bits} bit{missing}{more}"

    @property
    def tuned(self) -> str:
        """Name of the tuned weights that are wanted; empty for dense ones."""
        if not self.sparsity:
            return ""
        ending = "-pooled" if self.without == "router" else "-qat" if self.bits == 8 and self.without != "qat" else ""
        return f"{'few' if self.after else 'tuned'}-{round(100 * self.sparsity)}{ending}"

    @property
    def distilled(self) -> str:
        """Name of the distilled weights; empty for the teacher's."""
        return "" if not self.few else "distilled-nodmd" if self.without == "dmd" else "distilled"


def ladder(teacher_steps: int, sparsities: tuple[float, ...]) -> list[Setting]:
    """All settings, the most telling first.

    Raises:
        ValueError: the teacher has as few steps as a distilled model.
    """
    if teacher_steps in FEW:
        raise ValueError(
            f"teacher_steps: {teacher_steps} given; that is for distilled weights ({FEW}), give another number"
        )
    most = max(sparsities)
    home = Setting(teacher_steps, False)
    first = [home, replace(home, other_noise=AGAIN_NOISE)]
    first += [Setting(4, True), Setting(4, True, most, 8), Setting(4, True, most), Setting(4, True, 0.0, 8)]
    first += [Setting(4, True, most, 8, without) for without in ("qat", "router")]
    first += [Setting(4, True, most, bits, after=True) for bits in (8, 16)]
    first += [Setting(4, False, without="rcm"), Setting(4, True, without="dmd"), Setting(2, True), Setting(1, True)]
    first += [replace(home, sparsity=most), replace(home, sparsity=most, bits=8), replace(home, bits=8)]
    first += [Setting(teacher_steps, False, most, 8, without) for without in ("qat", "router")]
    first += [Setting(steps, True, without="dmd") for steps in (2, 1)]
    first += [Setting(steps, True, most, 8, after=True) for steps in (2, 1)]
    grid = [
        Setting(steps, steps in FEW, sparsity, bits)
        for sparsity in (*sorted(sparsities, reverse=True), 0.0)
        for steps in (*FEW, teacher_steps)
        for bits in (8, 16)
    ]
    return list(dict.fromkeys([*first, *grid]))


MAIN = (
    "50 steps, dense, 16 bit",
    "4 steps, dense, 16 bit",
    "4 steps, 97 % sparse, 16 bit",
    "4 steps, 97 % sparse, 8 bit",
    "4 steps, 97 % sparse, 8 bit, tuned after",
    "2 steps, dense, 16 bit",
    "1 step, dense, 16 bit",
)
"""Settings in the picture."""


class Family:
    """The weights in a folder, read when asked for.

    Args:
        folder: of NAME.safetensors and NAME.json.
        linear: scheme of 8-bit linear layers.

    Raises:
        WeightsError: there is no teacher.
    """

    def __init__(self, folder: Path, linear: Any = "fp8_row") -> None:
        self.folder, self.linear = folder, linear
        self._read: dict[str, Weights] = {}
        self.teacher = self.get("teacher")

    def has(self, name: str) -> bool:
        """Whether there are weights of that name."""
        return all(path.is_file() for path in weight_paths(self.folder / name))

    def get(self, name: str) -> Weights:
        """The weights of that name."""
        if name not in self._read:
            self._read[name] = load_stem(self.folder / name)
        return self._read[name]

    def lacks(self, setting: Setting) -> str:
        """Names of missing weights; empty if all are there. QAT's own weights stand in for plain ones, and these for
        QAT's, but in the ablation of it."""
        wanted = [setting.distilled, self._tuned(setting)]
        return ", ".join(name for name in wanted if name and not self.has(name))

    def build(self, setting: Setting) -> VideoNet:
        """The network in evaluation mode, on the CPU."""
        tuned = self._tuned(setting)
        sparse = SparseLayers.of_record(self.get(tuned).record) if tuned else None
        found = self.get(tuned) if tuned else self.teacher
        if setting.few:
            few = self.get(setting.distilled)
            state = found.tensors if setting.after else merged(self.teacher, found, few) if tuned else few.tensors
        else:
            state = found.tensors
        eight = setting.bits == 8
        return build_net(
            self.teacher.config, state, sparse, "int8_fp8" if eight else "exact", self.linear if eight else None
        )

    def notes(self, sparsities: tuple[float, ...]) -> list[str]:
        """How each set of weights was trained, and what stands in for what."""
        said = []
        names = ["teacher", "distilled", "distilled-nodmd"]
        names += [
            f"{kind}-{round(100 * s)}{ending}"
            for kind in ("tuned", "few")
            for s in sparsities
            for ending in ("", "-qat", "-pooled")
        ]
        for name in filter(self.has, names):
            training = self.get(name).record.get("training", {})
            wanted = ("steps", "seconds_of_training", "batch", "lr", "precision")
            facts = [f"{key} {training[key]}" for key in wanted if key in training]
            layers = SparseLayers.of_record(self.get(name).record)
            facts += [] if layers is None else [f"keeps {min(layers.keeps.values()):g} of the key blocks"]
            said.append(f"{name}: {', '.join(facts) or 'nothing is known of its training'}")
        for sparsity in sparsities:
            for bits in (8, 16):
                setting = Setting(4, True, sparsity, bits)
                if (name := self._tuned(setting)) != setting.tuned and self.has(name):
                    said.append(f"{round(100 * sparsity)} % sparse, {bits} bit: {name} in place of {setting.tuned}")
        return said

    def _tuned(self, setting: Setting) -> str:
        name = setting.tuned
        if name and not setting.without and not self.has(name):
            other = name.removesuffix("-qat") if name.endswith("-qat") else f"{name}-qat"
            return other if self.has(other) else name
        return name
