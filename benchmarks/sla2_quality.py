"""Quality of sparse-linear attention on queries, keys and values that the trained enhancer makes of long recordings, or
the trained video model of videos.

Shapes: B sequences (bands), L frames, H heads, D head size, T samples.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from allears.core.device import resolve_device
from allears.models.enhance import Enhancer
from allears.models.enhance.sample import enhance
from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.sparse.fit import Sample

from . import results
from .activations import layers, recording
from .clips import Clip
from .registry import case
from .sla2_picture import draw, save_maps
from .sla2_systems import ABOUT, Fitter, Joined, Layer, gradient_rows, maps
from .sla2_tuning import Windows, tune_arms
from .sla2_video import VideoLayers

if TYPE_CHECKING:
    from allears.models.enhance.config import EnhanceConfig

SHORT_OF_TIME = "left out, the time was over"


@case("sla2_quality")
@dataclass
class Sla2Quality:
    """Fit and compare the forms of sparse-linear attention; write benchmarks/results/NAME.json and NAME.png.

    Layers along time of the enhancer, which hears each window whole. Routers, ratios and projections are fitted on the
    first windows and measured on the last. The file is written after each layer.
    """

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifest renders from."""

    clips: Path = results.ROOT / "benchmarks/sets/enhance-val.jsonl"
    """The manifest: validation, never test."""

    noisy: Path | None = None
    """In place of corpus and manifest: a .npy of the noisy clips joined, int16 (T,), as --render wrote it."""

    render: Path | None = None
    """Only write that file."""

    maps: Path | None = None
    """Only draw NAME.png, from the NAME_maps.npz of an earlier run (where matplotlib was missing)."""

    weights: str = "enhance-base"
    """Weights of the enhancer: a shipped name or a folder."""

    video: str | None = None
    """In place of the enhancer a video model, by name or path stem: all its layers over space and time."""

    device: str = "auto"
    """auto, cpu or cuda."""

    seconds: float = 102.4
    """Length of a window; 102.4 s are 6,400 frames along time, 100 key blocks."""

    held_out: int = 1
    """Windows (or videos) at the end that errors are measured on."""

    bands: int = 8
    """Bands kept of each layer and window, spread evenly; or videos recorded."""

    sparsities: tuple[float, ...] = (0.9, 0.95, 0.97)
    """Shares of the key blocks that are not read exactly."""

    block_q: int = 128
    """Queries of a block."""

    mass_steps: int = 300
    """Steps of a router to the attention mass, once a layer."""

    output_steps: int = 150
    """Steps of router and ratio to the output, at each sparsity, in full and again in low precision."""

    lr: float = 0.01
    """Learning rate of both."""

    gradients: int = 2
    """Held-out sequences of each layer for the errors of gradients."""

    tune_steps: int = 40
    """Steps of each arm of the tuning of the whole enhancer (stage 2); 0 leaves it out."""

    tune_seconds: float = 25.6
    """Length of its windows."""

    tune_sparsity: float = 0.9
    """Its sparsity."""

    tune_lr: float = 1e-4
    """Its learning rate."""

    layers: int | None = None
    """The first so many layers alone."""

    minutes: float | None = None
    """Time after which no further layer, and no tuning, is begun."""

    name: str = "sla2_quality"
    """Name of the result files."""

    results_folder: Path = results.RESULTS
    """Folder of the result files."""

    commit: str | None = None
    """The commit that is measured, for a copy of the files without their repository."""

    _rows: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    _notes: list[str] = field(default_factory=list, init=False, repr=False)

    def run(self) -> int:
        if self.maps is not None:
            print("\n".join(draw(self.maps, self.results_folder / f"{self.name}.png")))
            return 0
        started = time.monotonic()
        where = resolve_device(self.device)
        if self.render is not None:
            np.save(self.render, self._noisy().mul(32_767).clamp(-32_768, 32_767).short().numpy())
            print(f"written: {self.render}")
            return 0
        if self.video is not None:
            return self._run_video(self.video, where, started)
        enhancer = Enhancer.from_pretrained(self.weights, device=where)
        noisy = self._noisy().to(where)
        found = self._record(enhancer, noisy)
        cores = self._compare(enhancer.name, found, started)
        if self._tunes(cores, started):
            self._tune(enhancer, noisy, cores, where.type)
        return self._finish()

    def _run_video(self, video: str, where: torch.device, started: float) -> int:
        source, name = VideoLayers.load(video, where, self.bands, self.held_out), Path(video).name
        self._notes.append(source.notes(name, self.layers))
        self._explain()
        cores = self._compare(name, source.record(self.layers), started)
        if self._tunes(cores, started):
            draw_some, held_out = source.batches()
            case_name = f"tuning, {name} s{self.tune_sparsity:.2f}"
            self._rows += tune_arms(
                source.net, cores, draw_some, held_out, self.tune_steps, self.tune_lr, case_name, where.type
            )
        return self._finish()

    def _tunes(self, cores: dict[str, SparseLinearAttention], started: float) -> bool:
        if self.tune_steps and cores and self._over(started):
            self._notes.append(f"tuning: {SHORT_OF_TIME}")
            return False
        return bool(self.tune_steps and cores)

    def _finish(self) -> int:
        path = self._write()
        if self._maps_path().exists():
            self._draw()
        print(f"written: {path}")
        return 0

    def _explain(self) -> None:
        self._notes += [f"{name}: {about}" for name, about in ABOUT.items()]
        self._notes.append("rel_err: |O - dense| / |dense| on what is held out; of several layers the root mean square")

    def _noisy(self) -> Tensor:
        """(T,) float32."""
        if self.noisy is not None:
            return torch.from_numpy(np.load(self.noisy, allow_pickle=False).astype(np.float32) / 32_768)
        from allears.data.render import render_test_set

        from .nvfp4 import joined

        return joined([Clip(*clip) for clip in render_test_set(self.corpus, self.clips)])[0]

    def _record(self, enhancer: Enhancer, noisy: Tensor) -> list[Layer]:
        """Each layer's q, k, v in every window."""
        samples = window_samples(enhancer.config, self.seconds)
        count = len(noisy) // samples
        if count <= self.held_out:
            raise ValueError(f"seconds: {self.seconds} given, {count} windows in all; {self.held_out} are held out")
        names = [name for name in layers(enhancer.net) if name.endswith("along_time")][: self.layers]
        kept: dict[str, list[list[Sample]]] = {name: [] for name in names}
        for index in range(count):
            window = noisy[None, index * samples : (index + 1) * samples]
            generator = torch.Generator().manual_seed(index)
            with (
                torch.inference_mode(),
                recording(enhancer.net, lambda name: self.bands if name in kept else 1) as acts,
            ):
                enhance(enhancer.net, enhancer.config, window, steps=1, generator=generator)
            for name in names:
                parts = [x.clone() for x in acts[name][:3]]
                kept[name].append([Sample(*row) for row in zip(*parts, strict=True)])
            print(f"recorded window {index + 1} of {count}", flush=True)
        q = kept[names[0]][0][0].q
        self._notes.append(
            f"{len(names)} layers along time of {enhancer.name}, {self.bands} bands (L x H x D {tuple(q.shape)}) of "
            f"each of {count} windows of {self.seconds:g} s of validation clips, the last {self.held_out} held out; "
            f"blocks {self.block_q} x 64"
        )
        self._explain()
        fit = count - self.held_out
        parts = ((name, kept[name][:fit], kept[name][fit:]) for name in names)
        return [Layer(name, list(chain(*fitted)), list(chain(*held_out))) for name, fitted, held_out in parts]

    def _compare(self, model: str, found: list[Layer], started: float) -> dict[str, SparseLinearAttention]:
        """Rows of all layers; the cores for the tuning."""
        joined_errors = {sparsity: Joined() for sparsity in self.sparsities}
        cores, drawn = {}, {}
        for layer in found:
            if self._over(started):
                self._notes.append(f"{layer.name}: {SHORT_OF_TIME}")
                continue
            begun = time.monotonic()
            fitter = Fitter(layer, SparseLinear(block_q=self.block_q), self.mass_steps, self.output_steps, self.lr)
            for sparsity in self.sparsities:
                keep = round(1 - sparsity, 6)
                errors, core = fitter.errors(keep)
                joined_errors[sparsity].add(errors)
                case_name = f"{model} s{sparsity:.2f}, {layer.name}"
                for name, of in errors.items():
                    self._rows += [
                        results.row(case_name, name, metric, value)
                        for metric, value in (("rel_err", of.error), ("mass", of.mass), ("kept", of.kept))
                    ]
                print(f"{case_name}: " + ", ".join(f"{n} {e.error:.4f}" for n, e in errors.items()), flush=True)
                if sparsity == self.tune_sparsity:
                    cores[layer.name] = core
                if sparsity == self.sparsities[len(self.sparsities) // 2]:
                    mass, picked = maps(core, layer.held_out[0])
                    drawn[layer.name] = (mass.cpu().numpy(), picked.cpu().numpy())
                    self._rows += gradient_rows(core, layer.held_out[: self.gradients], case_name)
            save_maps(self._maps_path(), drawn)
            print(f"{layer.name}: {time.monotonic() - begun:.1f} s", flush=True)
            self._write(self._summary(model, joined_errors))
        self._rows = self._summary(model, joined_errors) + self._rows
        return cores

    def _summary(self, model: str, joined_errors: dict[float, Joined]) -> list[dict[str, Any]]:
        return [
            results.row(f"{model} s{sparsity:.2f}", name, metric, value)
            for sparsity, errors in joined_errors.items()
            for name, found in errors.values().items()
            for metric, value in found.items()
        ]

    def _tune(self, enhancer: Enhancer, noisy: Tensor, cores: dict[str, SparseLinearAttention], device: str) -> None:
        samples = window_samples(enhancer.config, self.tune_seconds)
        held = self.held_out * window_samples(enhancer.config, self.seconds)
        fit = replace(Windows(enhancer.net, noisy, samples), noisy=noisy[: len(noisy) - held])
        judged = replace(fit, noisy=noisy[len(noisy) - held :])
        case_name = f"tuning, {enhancer.name} s{self.tune_sparsity:.2f}"
        self._rows += tune_arms(
            enhancer.net, cores, fit.draw, judged.spread(2), self.tune_steps, self.tune_lr, case_name, device
        )
        self._notes.append(
            f"{case_name}: {self.tune_steps} steps on windows of {self.tune_seconds:g} s, loss the relative "
            "squared error of the output to the dense model's; all weights but the routers train"
        )

    def _over(self, started: float) -> bool:
        return self.minutes is not None and time.monotonic() - started > 60 * self.minutes

    def _maps_path(self) -> Path:
        return self.results_folder / f"{self.name}_maps.npz"

    def _write(self, before: list[dict[str, Any]] | None = None) -> Path:
        rows = (before or []) + self._rows
        return results.write(self.name, rows, self._notes, self.results_folder, self.commit)

    def _draw(self) -> None:
        try:
            said = draw(self._maps_path(), self.results_folder / f"{self.name}.png")
        except ImportError as error:
            said = [f"no picture ({error}); draw it by --maps {self._maps_path()}"]
        print("\n".join(said))


def window_samples(config: EnhanceConfig, seconds: float) -> int:
    """Samples of a window whose STFT has an even number of frames, the nearest to ``seconds``."""
    frames = 2 * round(seconds * config.sample_rate_hz / config.hop / 2)
    return (frames - 1) * config.hop
