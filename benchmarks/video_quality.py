"""Quality of the small video model over steps x sparsity x bits, on held-out prompts, judged by program.

Shapes: N videos, T frames, H rows, W columns, D features.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allears.core.device import matmul_precision, resolve_device
from allears.data.world import WorldSpec, draw_specs
from allears.data.world_check import Check, check_videos
from allears.data.world_features import WorldClassifier, frechet_distance
from allears.data.world_render import render
from allears.recipes.video import sample_specs
from allears.recipes.video_distil import sample_few_specs
from allears.recipes.video_judge import features, load_judge, score_videos, true_features

from . import results
from .registry import case
from .video_quality_models import MAIN, Family, Setting, ladder
from .video_quality_picture import draw, save_frames

SHORT_OF_TIME = "left out, the time was over"
CASE = "held-out prompts"
_METRICS = {"consistency_db": "consistency"}


@case("video_quality")
@dataclass
class VideoQuality:
    """Sample, check and compare the settings; write benchmarks/results/NAME.json and NAME.png.

    The file is written after each setting. The first rows are true videos, and the teacher with two noises: how far
    scores move without a change.
    """

    folder: Path = Path("runs/video/models")
    """Weights by name, NAME.safetensors and NAME.json: teacher, judge, distilled, distilled-nodmd, tuned-90, tuned-95,
    tuned-97, each of these also with -qat (tuned through 8-bit attention) and -pooled (no learned router), and few-97
    (the distilled model, tuned with sparse attention). What is missing is left out."""

    device: str = "auto"
    """auto, cpu or cuda."""

    clips: int = 192
    """Prompts."""

    seed: int = 17
    """Of the prompts."""

    batch: int = 32
    """Videos at a time."""

    teacher_steps: int = 50
    """Steps of the settings that are not few."""

    sparsities: tuple[float, ...] = (0.9, 0.95, 0.97)
    """Shares of the key blocks that are not read exactly; dense is always there."""

    linear: str = "fp8_row"
    """Scheme of the 8-bit linear layers."""

    workers: int = 8
    """Processes that judge videos; 1 judges them here, where they are."""

    shown: int = 4
    """Prompts in the picture."""

    minutes: float | None = None
    """Time after which no further setting is begun."""

    frames: Path | None = None
    """Only draw NAME.png, from the NAME_frames.npz of an earlier run (where matplotlib was missing)."""

    name: str = "video_quality"
    """Name of the result files."""

    results_folder: Path = results.RESULTS
    """Folder of the result files."""

    commit: str | None = None
    """The commit that is measured, for a copy of the files without their repository."""

    _rows: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    _notes: list[str] = field(default_factory=list, init=False, repr=False)
    _pool: ProcessPoolExecutor | None = field(default=None, init=False, repr=False)
    _pictures: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @matmul_precision("high")
    def run(self) -> int:
        if self.frames is not None:
            draw(self.frames, self.results_folder / f"{self.name}.png")
            return 0
        started = time.monotonic()
        where = resolve_device(self.device)
        family = Family(self.folder, self.linear)
        judge = load_judge(self.folder / "judge", where) if family.has("judge") else None
        specs = draw_specs(self.clips, self.seed, "test")
        real = self._begin(family, judge, specs, where)
        home: Tensor | None = None
        for setting in ladder(self.teacher_steps, self.sparsities):
            if lacks := family.lacks(setting):
                self._notes.append(f"{setting.name}: left out, no {lacks}")
                continue
            if self.minutes is not None and time.monotonic() - started > 60 * self.minutes:
                self._notes.append(f"{setting.name}: {SHORT_OF_TIME}")
                continue
            try:
                videos, seconds = self._sample(family, setting, specs, where)
            except (RuntimeError, ValueError) as error:  # one setting that fails must not hide the others
                self._notes.append(f"{setting.name}: failed, {str(error).splitlines()[0][:300]}")
                print(self._notes[-1], flush=True)
                continue
            seen = None if judge is None else features(judge, videos)
            home = seen if home is None else home
            more = {"seconds_per_video": seconds}
            if seen is not None and home is not None and seen is not home:
                more["frechet_to_teacher"] = frechet_distance(seen, home)
            self._add(setting.name, videos, specs, judge, real, more)
            if setting.name in MAIN:
                self._pictures[setting.name] = videos[: self.shown].cpu()
            self._write()
        if self._pool is not None:
            self._pool.shutdown()
        path = self._write()
        save_frames(self._frames_path(), self._pictures, specs[: self.shown])
        try:
            draw(self._frames_path(), self.results_folder / f"{self.name}.png")
        except ImportError as error:
            print(f"no picture ({error}); draw it by --frames {self._frames_path()}")
        print(f"written: {path}, {time.monotonic() - started:.0f} s")
        return 0

    def _begin(
        self, family: Family, judge: WorldClassifier | None, specs: list[WorldSpec], where: torch.device
    ) -> Tensor | None:
        """Notes, and the row of true videos; their features (N, D)."""
        config = family.teacher.config
        real = None if judge is None else true_features(judge, specs, where, config.frames, config.size_px)
        true = torch.cat(
            [render(specs[i : i + 64], where, config.frames, config.size_px) for i in range(0, self.clips, 64)]
        )
        self._notes += [
            f"{self.clips} prompts of scenes that training does not show; teacher: {self.teacher_steps} Euler steps, "
            f"guidance {config.guidance:g}; fewer steps: distilled weights, where sparse merged with the tuned ones "
            "by weight deltas, or (tuned after) tuned with sparse attention themselves",
            f"8 bit: attention in INT8 and FP8, linear layers of the blocks {self.linear}; 16 bit: bfloat16 on a GPU, "
            "float32 on a CPU",
            "prompt_score, all_right and the aspects in per cent; frechet to true videos of the same captions, on "
            "features of a classifier of this world; frechet_to_teacher: to the first row of the teacher; consistency "
            "in dB",
            *family.notes(self.sparsities),
        ]
        self._add("true videos", true, specs, judge, real, {})
        self._pictures["true videos"] = true[: self.shown].cpu()
        return real

    def _sample(
        self, family: Family, setting: Setting, specs: list[WorldSpec], where: torch.device
    ) -> tuple[Tensor, float]:
        """Videos (N, 3, T, H, W), and seconds for each."""
        net = family.build(setting).to(where).requires_grad_(False)
        config = family.teacher.config
        asked = [replace(spec, seed=spec.seed + setting.other_noise) for spec in specs]

        def make(some: list[WorldSpec], steps: int) -> Tensor:
            with torch.inference_mode(), torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
                if setting.few:
                    return sample_few_specs(net, config, some, where, steps, self.batch)
                return sample_specs(net, config, some, where, steps, batch=self.batch)

        if where.type == "cuda":
            for size in {min(self.batch, self.clips), self.clips % self.batch or self.batch}:
                make(asked[:size], 1)  # kernels are compiled
            torch.cuda.synchronize()
        begun = time.perf_counter()
        videos = make(asked, setting.steps)
        if where.type == "cuda":
            torch.cuda.synchronize()
        if not bool(torch.isfinite(videos).all()):
            raise ValueError("videos: some are not finite")
        return videos.clone(), (time.perf_counter() - begun) / len(specs)

    def _add(
        self,
        name: str,
        videos: Tensor,
        specs: list[WorldSpec],
        judge: WorldClassifier | None,
        real: Tensor | None,
        more: dict[str, float],
    ) -> None:
        found = {**score_videos(videos, specs, judge, real, self._checks(videos, specs)), **more}
        self._rows += [results.row(CASE, name, _METRICS.get(key, key), value) for key, value in found.items()]
        first = ("prompt_score", "all_right", "frechet", "frechet_to_teacher", "consistency_db", "seconds_per_video")
        print(f"{name}: " + ", ".join(f"{key} {found[key]:.4g}" for key in first if key in found), flush=True)

    def _checks(self, videos: Tensor, specs: list[WorldSpec]) -> list[Check]:
        if self.workers < 2:
            return check_videos(videos, specs)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), torch.set_num_threads, (1,))
        parts = [videos[i : i + 8].cpu().numpy() for i in range(0, len(specs), 8)]
        asked = [specs[i : i + 8] for i in range(0, len(specs), 8)]
        return [check for found in self._pool.map(_check, parts, asked) for check in found]

    def _frames_path(self) -> Path:
        return self.results_folder / f"{self.name}_frames.npz"

    def _write(self) -> Path:
        return results.write(self.name, self._rows, self._notes, self.results_folder, self.commit)


def _check(videos: np.ndarray, specs: list[WorldSpec]) -> list[Check]:
    """In a process of its own."""
    return check_videos(torch.from_numpy(videos), specs)
