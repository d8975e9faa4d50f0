"""All weights of the small video model in one run that can be cut anywhere: the judge, the teacher, the distilled
model, and what is tuned with sparse attention; with the ablations that `python -m benchmarks video_quality` compares.

Each part is trained in a folder of its own and its weights are copied to ``out/models`` when it is complete; a part
that is there takes no time, so that parts may run in calls, and on machines, of their own.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allears.core.weights import weight_paths
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.recipes.video import train_video
from allears.recipes.video_distil import distil_video
from allears.recipes.video_judge import train_judge
from allears.recipes.video_merge import merge_video, pack_video
from allears.recipes.video_tune import sparsify_video, tune_video
from allears.train import TrainResult
from allears.turbo.sparse import SparseSettings

log = logging.getLogger(__name__)

STAGES = ((2, 0.27, 256), (8, 0.28, 128), (32, 0.45, 64))
"""Of the teacher; see :func:`allears.recipes.video.train_video`."""


@dataclass(frozen=True)
class Family:
    """Where the run is, and what its parts are told.

    Args:
        out: folder of the run.
        device, preset, seed: of every part.
        settings: by part, arguments of its own recipe in place of those here.
    """

    out: Path
    device: str = "auto"
    preset: str = "base"
    seed: int = 0
    settings: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def models(self) -> Path:
        return self.out / "models"

    def model(self, name: str) -> str:
        """Path stem of finished weights.

        Raises:
            ValueError: that part has not run yet.
        """
        if not self.has(name):
            raise ValueError(f"parts: {name!r} is needed first, and {self.models} has no such weights; train it too")
        return str(self.models / name)

    def has(self, name: str) -> bool:
        return all(path.is_file() for path in weight_paths(self.models / name))

    def told(self, name: str, **given: Any) -> dict[str, Any]:
        """Arguments for the recipe of a part."""
        base: dict[str, Any] = {"out": str(self.out / name), "device": self.device, "seed": self.seed}
        return {**base, **given, **(self.settings or {}).get(name, {})}

    def sparse(self, teacher: str, percent: int, learned: bool) -> str:
        """Routers fitted to finished weights, or, not learned, blocks picked by pooled q and k with a fitted ratio."""
        stem = self.out / f"sparse-{percent}-{teacher}{'' if learned else '-pooled'}"
        if not all(path.is_file() for path in weight_paths(stem)):
            fit = SparseSettings(keeps=(1 - percent / 100,), max_error=10.0, options=SparseLinear())
            fit = fit if learned else replace(fit, steps=1, lr=1e-30)
            sparsify_video(self.model(teacher), str(stem), fit, self.device)
        return str(stem)


Budget = Mapping[str, Any]
"""``minutes`` and ``steps`` of a part."""


def _judge(family: Family, budget: Budget) -> TrainResult:
    return train_judge(**family.told("judge", **budget))


def _teacher(family: Family, budget: Budget) -> TrainResult:
    cuda: dict[str, Any] = {"compile": True, "attention": {"kernel": "sdpa-cudnn"}, "processes": 6}
    given = {"preset": family.preset, "stages": STAGES, **(cuda if family.device != "cpu" else {}), **budget}
    return train_video([], **family.told("teacher", **given))


def _distilled(name: str, **more: Any) -> Callable[[Family, Budget], TrainResult]:
    def run(family: Family, budget: Budget) -> TrainResult:
        return distil_video([], **family.told(name, teacher=family.model("teacher"), **more, **budget))

    return run


def _tuned(name: str) -> Callable[[Family, Budget], TrainResult]:
    kind, percent, *more = name.split("-")
    teacher = "distilled" if kind == "few" else "teacher"

    def run(family: Family, budget: Budget) -> TrainResult:
        sparse = family.sparse(teacher, int(percent), "pooled" not in more)
        # Against a router that is not learned QAT stays on: one thing is left out at a time.
        eight = bool({"qat", "pooled"} & set(more))
        given = {"teacher": family.model(teacher), "sparse": sparse, "precision": "int8_fp8" if eight else "exact"}
        return tune_video(**family.told(name, **given, **budget))

    return run


PARTS: dict[str, tuple[float, Callable[[Family, Budget], TrainResult]]] = {
    "judge": (0.02, _judge),
    "teacher": (0.44, _teacher),
    "distilled": (0.14, _distilled("distilled")),
    "few-97-qat": (0.05, _tuned("few-97-qat")),
    "tuned-97-qat": (0.05, _tuned("tuned-97-qat")),
    "tuned-97": (0.05, _tuned("tuned-97")),
    "tuned-97-pooled": (0.05, _tuned("tuned-97-pooled")),
    "distilled-nodmd": (0.14, _distilled("distilled-nodmd", rcm={"score_weight": 0.0})),
    "tuned-95-qat": (0.03, _tuned("tuned-95-qat")),
    "tuned-90-qat": (0.03, _tuned("tuned-90-qat")),
}
"""Parts by name, in order: share of the time, and how it is trained. Needed for what ships are the first four."""


def train_video_family(
    corpus: list[str],
    out: str,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "auto",
    preset: str | None = None,
    seed: int = 0,
    *,
    parts: Sequence[str] = tuple(PARTS),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> TrainResult:
    """Train the parts that ``out/models`` lacks, one after another; gives the last one's result.

    Args:
        corpus: must be empty: the world is painted as it is needed.
        minutes: of all parts together; one part has its share of :data:`PARTS` of it, whether the others run or not.
        steps: of each part, in place of ``minutes``.
        preset: a size of the video model, ``base`` by default.
        parts: names of :data:`PARTS`, in an order in which each finds what it is made from.
        settings: by part, arguments of its own recipe, such as ``{"teacher": {"lr": 5e-4}}``.

    Raises:
        ValueError: a part is unknown or not to be trained yet, neither minutes nor steps are given, or a corpus is.
    """
    if unknown := sorted({*parts, *(settings or {})} - set(PARTS)):
        raise ValueError(f"parts: {unknown[0]!r} is unknown; known are {', '.join(PARTS)}")
    if corpus:
        raise ValueError(f"corpus: {corpus[0]!r} given, but this world is painted as it is needed; leave it out")
    if (minutes is None) == (steps is None):
        raise ValueError("minutes, steps: give one of them, the time of all parts together or the steps of each")
    family = Family(Path(out), device, preset or "base", seed, settings)
    result = None
    for name in parts:
        if family.has(name):
            log.info("%s: there already", name)
            continue
        share, run = PARTS[name]
        budget = {"steps": steps} if minutes is None else {"minutes": minutes * share}
        log.info("%s: %s", name, ", ".join(f"{key} {value:.4g}" for key, value in budget.items()))
        result = run(family, {"minutes": None, "steps": None, **budget})
        if result.stop == "signal":
            return result
        family.models.mkdir(parents=True, exist_ok=True)
        trained, kept = weight_paths(family.out / name / "export"), weight_paths(family.models / name)
        for source, target in zip(trained, kept, strict=True):
            shutil.copyfile(source, target)
    if result is None:
        raise ValueError(
            f"parts: {', '.join(parts)} are in {family.models} already; delete what should be trained again"
        )
    return result


def ship_video(out: str, name: str = "video-base", merge: bool = False) -> Path:
    """Write what a run left as one file of at most 12 MiB: few steps and sparse attention together.

    Args:
        out: folder of the run.
        name: of the weights in ``out/models``.
        merge: the distilled model and ``tuned-97-qat`` by weight deltas; or ``few-97-qat``, tuned after distillation.

    Raises:
        ValueError: a part is missing.
    """
    family = Family(Path(out))
    to = family.models / name
    if not merge:
        return pack_video(family.model("few-97-qat"), to)
    return merge_video(family.model("teacher"), family.model("tuned-97-qat"), family.model("distilled"), to)
