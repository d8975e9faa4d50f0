"""4-bit and 8-bit attention on real activations: queries, keys and values of a trained model on noisy speech.

Shapes: B batch (bands along time, frames along frequency), L positions, H query heads, G key heads, D head size, T
samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from allears.audio.metrics import si_sdr_db
from allears.data.mix import read_specs
from allears.data.render import render_test_set
from allears.models.enhance import Enhancer
from allears.models.enhance.sample import enhance
from allears.ops.attention import AttentionSpec, LowBit, attention
from allears.ops.attention.lowbit.nvfp4 import round_to_mxfp4
from allears.ops.attention.lowbit.nvfp4_reference import four_bit_rounding, nvfp4_forward
from allears.ops.attention.lowbit.rounding import UNROUNDED, Rounding, rounded_forward

from . import results
from .activations import Recorded, attention_of, layers, recording
from .clips import RATE_HZ, Clip, spread
from .registry import case
from .scores import ClipScore, score, summarise

METRICS = ("si_sdr_db", "pesq_wb")
TO_EXACT = "si_sdr_to_exact_db"
ENOUGH = 0.995  # cosine: what SageAttention3 reports on the activations of a video model (arXiv 2505.11594, table 1)
_NVFP4 = four_bit_rounding()
_SCORES = 1 << 25


System = Callable[[Recorded], Tensor]  # to (B, L, H, D)


def through(spec: AttentionSpec) -> System:
    """Attention by the reference of the numerics of ``spec``."""

    def run(act: Recorded) -> Tensor:
        of_layer = replace(spec, kernel="reference", causal=act.causal, scale=act.scale)
        return attention(act.q, act.k, act.v, of_layer)

    return run


def rounding_only(rounding: Rounding) -> System:
    """nvfp4 with some of its operands left in float32."""
    return lambda act: rounded_forward(*act[:3], rounding, smooth_q=True, smooth_k=True, causal=act[3], scale=act[4])[0]


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix (size, size), of a power of two (Sylvester's construction)."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / math.sqrt(2)
    return matrix


def _rotated(act: Recorded) -> Tensor:
    turn = hadamard(act.q.shape[-1])  # H H^T = 1: the scores are the same before rounding
    return nvfp4_forward(act.q @ turn, act.k @ turn, act.v, causal=act.causal, scale=act.scale)[0]


def _mxfp4(act: Recorded) -> Tensor:
    return nvfp4_forward(*act[:3], causal=act.causal, scale=act.scale, rounding=round_to_mxfp4)[0]


SPECS = {
    "allears-nvfp4": AttentionSpec("reference", numerics="nvfp4"),
    "allears-nvfp4-direct-p": AttentionSpec("reference", numerics="nvfp4", lowbit=LowBit(two_level_p=False)),
    "allears-int8fp8": AttentionSpec("reference", numerics="int8_fp8"),
    "allears-int8fp16": AttentionSpec("reference", numerics="int8_fp16"),
    "allears-sagebwd": AttentionSpec("reference", numerics="sagebwd"),
}
SYSTEMS: dict[str, System] = {name: through(spec) for name, spec in SPECS.items()} | {
    "allears-nvfp4-no-smooth-k": through(AttentionSpec(numerics="nvfp4", lowbit=LowBit(smooth_k=False))),
    "allears-nvfp4-no-smooth-q": through(AttentionSpec(numerics="nvfp4", lowbit=LowBit(smooth_q=False))),
    "allears-nvfp4-no-smoothing": through(
        AttentionSpec(numerics="nvfp4", lowbit=LowBit(smooth_k=False, smooth_q=False))
    ),
    "allears-nvfp4-hadamard": _rotated,
    "nvfp4-only-qk": rounding_only(UNROUNDED._replace(queries=_NVFP4.queries, keys=_NVFP4.keys)),
    "nvfp4-only-p": rounding_only(UNROUNDED._replace(weights=_NVFP4.weights)),
    "nvfp4-only-v": rounding_only(UNROUNDED._replace(values=_NVFP4.values)),
    "mxfp4": _mxfp4,
}
"""What is compared with exact attention, layer by layer; all but those of :data:`SPECS` are for insight alone."""


class Sums:
    """Inner products of outputs with exact ones, added up over layers: the errors of all outputs joined."""

    def __init__(self) -> None:
        self.cross = self.found = self.exact = self.error = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Both (B, L, H, D)."""
        x, y = found.double().flatten(), exact.double().flatten()
        self.cross += float(x @ y)
        self.found += float(x @ x)
        self.exact += float(y @ y)
        self.error += float((x - y) @ (x - y))

    def rows(self, case_name: str, system: str) -> list[dict[str, Any]]:
        cosine = self.cross / math.sqrt(self.found * self.exact)
        error = math.sqrt(self.error / self.exact)
        return [results.row(case_name, system, name, x) for name, x in (("cosine", cosine), ("rel_err", error))]


def compare(acts: dict[str, Recorded], systems: dict[str, System], kind: Callable[[str], str], case_name: str) -> list:
    """Rows of each layer (``CASE, LAYER``), of each kind of layer (``CASE, KIND``) and of all (``CASE``), joined.

    Exact is attention in float32 as the textbook has it. Sequences go in parts of at most 2^25 scores, where they have
    no more themselves.
    """
    exact = through(AttentionSpec())
    sums: dict[tuple[str, str], Sums] = {}
    for name, act in track(acts.items(), case_name, transient=True):
        count = max(1, _SCORES // (act.q.shape[1] * act.k.shape[1] * act.q.shape[2]))
        for some in zip(*(x.split(count) for x in act[:3]), strict=True):
            part_of = Recorded(*some, act.causal, act.scale)
            wanted = exact(part_of)
            for system, run in systems.items():
                found = run(part_of)
                for part in (case_name, f"{case_name}, {kind(name)}", f"{case_name}, {name}"):
                    sums.setdefault((part, system), Sums()).add(found, wanted)
    order = sorted(sums, key=lambda key: (key[0].count(","), "." in key[0]))
    return [row for key in order for row in sums[key].rows(*key)]


def joined(clips: Sequence[Clip]) -> Tensor:
    """Noisy clips one after the other, each at the same level (RMS 0.05): (1, T)."""
    parts = [clip.noisy * (0.05 / max(float(np.sqrt(np.mean(clip.noisy**2))), 1e-6)) for clip in clips]
    return torch.from_numpy(np.concatenate(parts))[None]


def chosen_clips(corpus: Path, manifest: Path, count: int) -> list[Clip]:
    """``count`` clips of a manifest, spread evenly over it, rendered from the prepared corpus."""
    ids = [spec.id for spec in read_specs(manifest)]
    chosen = {ids[index] for index in spread(len(ids), count)}
    return [Clip(*clip) for clip in render_test_set(corpus, manifest, keep=lambda spec: spec.id in chosen)]


def record(enhancer: Enhancer, noisy: Tensor, bands: int, frames: int) -> dict[str, Recorded]:
    """The layers' inputs in one pass over ``noisy`` (1, T), not cut into windows; ``bands`` and ``frames`` are kept of
    each layer along time and along frequency."""

    def kept(name: str) -> int:
        return bands if name.endswith("along_time") else frames

    with torch.inference_mode(), recording(enhancer.net, kept) as acts:
        enhance(enhancer.net, enhancer.config, noisy, steps=1, generator=torch.Generator().manual_seed(0))
    return acts


def output_rows(enhancer: Enhancer, clips: Sequence[Clip], specs: dict[str, AttentionSpec], which: str) -> list:
    """Scores of the enhancer's waveforms with exact attention and by each spec, as means over clips.

    ``METRIC_gain`` is the change against exact attention, paired; ``si_sdr_to_exact_db`` takes the output with exact
    attention as the reference, and its worst clip is ``_min``.
    """
    entries: list[ClipScore] = []
    for clip in track(clips, which, transient=True):
        exact: np.ndarray | None = None
        for name, spec in ({"exact": AttentionSpec()} | specs).items():
            with attention_of(enhancer.net, spec):
                output = enhancer(clip.noisy, sample_rate_hz=RATE_HZ)
            scores, note = score(clip.reference, output, METRICS)
            if exact is None:
                exact = output
            else:
                scores[TO_EXACT] = float(si_sdr_db(output, exact))
            entries.append(ClipScore(clip.id, name, clip.facts, scores, note=note))
    of_all = ((which, lambda facts: True),)
    rows = summarise(entries, ["exact", *specs], METRICS, of_all, baseline="exact")
    rows += summarise(entries, list(specs), (TO_EXACT,), of_all, baseline="")
    for name in specs:
        worst = min(entry.scores[TO_EXACT] for entry in entries if entry.system == name)
        rows.append(results.row(which, name, f"{TO_EXACT}_min", worst, n=len(clips)))
    return rows


@case("nvfp4")
@dataclass
class Nvfp4Case:
    """Errors of low-bit attention on the activations of the enhancer, and of its output; write results/NAME.json."""

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifest renders from."""

    clips: Path = results.ROOT / "benchmarks/sets/enhance-val.jsonl"
    """The manifest: validation, never test."""

    weights: str = "enhance-base"
    """Weights of the enhancer: a shipped name or a folder."""

    join: int = 8
    """Clips that are joined into one long recording (5 s each), so that attention along time sees long rows."""

    single: int = 3
    """Clips that are recorded one by one, near the length of the enhancer's windows (6 s)."""

    bands: int = 2
    """Bands kept of each layer along time of the long recording; of the single clips four times as many."""

    frames: int = 96
    """Frames kept of each layer along frequency."""

    outputs: int = 12
    """Clips that are rendered, spread evenly over the set; the enhanced waveform of each is compared."""

    name: str = "nvfp4"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        found = chosen_clips(self.corpus, self.clips, self.outputs)
        enhancer = Enhancer.from_pretrained(self.weights, device="cpu")
        case_name = f"real activations, {enhancer.name}"
        long, short = ([found[i] for i in spread(len(found), count)] for count in (self.join, self.single))
        acts = record(enhancer, joined(long), self.bands, self.frames)
        rows = compare(acts, SYSTEMS, along, case_name)
        notes = [f"{case_name}: {self._describe(acts)} of {len(long)} validation clips joined"]
        notes.append(below(rows, case_name, acts))
        case_name += " single clips"
        each = [record(enhancer, joined([clip]), 4 * self.bands, self.frames) for clip in short]
        acts = {f"{name} {index}": act for index, part in enumerate(each) for name, act in part.items()}
        by_layer = compare(acts, SYSTEMS, along, case_name)
        rows += [row for row in by_layer if not row["case"][-1].isdigit()]
        notes.append(f"{case_name}: {self._describe(each[0])} of each of {len(short)} validation clips")
        which = f"output, {enhancer.name}"
        compared = {name: SPECS[name] for name in ("allears-nvfp4", "allears-nvfp4-direct-p", "allears-int8fp8")}
        rows += output_rows(enhancer, found, compared, which)
        count = f"{len(found)} validation clips, {len(layers(enhancer.net))} attention layers"
        notes.append(f"{which}: {count}; _gain is against exact attention")
        path = results.write(self.name, rows, notes, self.results_folder)
        for row in rows:
            if row["system"].startswith("allears-nvfp4") or row["case"].startswith("output"):
                print(f"{row['case']}, {row['system']}: {row['metric']} {row['value']}")
        print(f"written: {path}")
        return 0

    def _describe(self, acts: dict[str, Recorded]) -> str:
        shapes = dict.fromkeys(f"{along(name)} {' x '.join(map(str, act.q.shape))}" for name, act in acts.items())
        return f"(B x L x H x D, B spread evenly over all bands or frames) {', '.join(shapes)}, float32,"


def along(name: str) -> str:
    """``blocks.3.along_time`` to ``along time``."""
    return name.split()[0].rpartition(".")[2].replace("_", " ")


def below(rows: list[dict[str, Any]], case_name: str, acts: dict[str, Recorded]) -> str:
    """Which layers' cosine in nvfp4 is under :data:`ENOUGH`."""
    wanted = {f"{case_name}, {name}": name for name in acts}
    under = [
        f"{wanted[row['case']]} ({row['value']:.4f})"
        for row in rows
        if row["case"] in wanted and (row["system"], row["metric"]) == ("allears-nvfp4", "cosine")
        if row["value"] < ENOUGH
    ]
    return f"{case_name}: layers of allears-nvfp4 under a cosine of {ENOUGH}: {', '.join(under) or 'none'}"
