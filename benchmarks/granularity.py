"""Errors of 8-bit attention by how many numbers share a scale, on the CPU's references: Gaussian inputs with an offset
on each channel of K, and the activations of a trained model.

Shapes: B batch, L tokens, H heads, D head size, M scales of a head, N keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allears.models.enhance import Enhancer
from allears.ops.attention.lowbit.quantise import (
    E4M3_TOP,
    INT8_TOP,
    dequantise_blocks,
    quantise_int8_blocks,
    quantise_weights,
    scale_of,
    scaled,
    to_e4m3,
    to_int8,
)
from allears.ops.attention.lowbit.rounding import INT8_FP8, UNROUNDED, Round, Rounding, rounded_forward

from . import results
from .activations import Recorded
from .nvfp4 import System, along, chosen_clips, compare, joined, record
from .registry import case
from .sagebwd_sigma import gaussian

Groups = Callable[[Tensor], Tensor]
"""Tokens (L,) to the number of the scale that each has, of its head."""


def every(count: int) -> Groups:
    """One scale for ``count`` neighbouring tokens."""
    return lambda token: token // count


def q_threads(token: Tensor) -> Tensor:
    """Of 32 queries every eighth: those that one thread of SageAttention 2's products holds (arXiv 2411.10958)."""
    return token // 32 * 8 + token % 8


def k_threads(token: Tensor) -> Tensor:
    """Of 64 keys two of every eight: those that one thread of SageAttention 2's products holds."""
    return token // 64 * 4 + token % 8 // 2


def int8_by(groups: Groups) -> Round:
    """INT8 and back, a scale for each head and group of tokens."""

    def quantised(x: Tensor) -> Tensor:
        of_token = groups(torch.arange(x.shape[1]))
        largest = x.float().abs().amax(-1)
        most = torch.zeros(x.shape[0], int(of_token.max()) + 1, x.shape[2])
        most.scatter_reduce_(1, of_token[None, :, None].expand_as(largest), largest, "amax")
        scale = scale_of(most, INT8_TOP)[:, of_token, :, None]
        return to_int8(x, scale).float() * scale

    return quantised


def int8_whole(x: Tensor) -> Tensor:
    """INT8 and back, one scale for all heads and tokens of an entry."""
    scale = scale_of(x.float().abs().amax((1, 2, 3), keepdim=True), INT8_TOP)
    return to_int8(x, scale).float() * scale


def e4m3_channels(v: Tensor) -> Tensor:
    """E4M3 and back, a scale for each channel of a head, as SageAttention 2 has it."""
    scale = scale_of(v.float().abs().amax(1, keepdim=True), E4M3_TOP)
    return to_e4m3(scaled(v, scale)).float() * scale


def half(x: Tensor) -> Tensor:
    return x.half().float()


def int8_rows(weights: Tensor) -> Tensor:
    """P in INT8 and back, a scale for each query and tile of keys."""
    values, scale = quantise_weights(weights, -1)
    return values * scale


QK: dict[str, tuple[Round, Round]] = {
    "tensor": (int8_whole, int8_whole),
    "block": (int8_by(every(128)), int8_by(every(64))),
    "warp": (int8_by(every(32)), int8_by(every(64))),
    "thread": (int8_by(q_threads), int8_by(k_threads)),
    "row-block": (INT8_FP8.queries, INT8_FP8.keys),
    "row": (int8_by(every(1)), int8_by(every(1))),
}
"""INT8 for Q and K, by what shares a scale: everything; 128 queries and 64 keys; 32 queries and 64 keys; a thread's 4
queries and 16 keys; one query and 128 keys, as this library has it; one token."""
PV: dict[str, tuple[Round, Round]] = {
    "fp16": (half, half),
    "fp8": (INT8_FP8.values, INT8_FP8.weights),
    "fp8-channel": (e4m3_channels, INT8_FP8.weights),
    "int8": (lambda v: dequantise_blocks(*quantise_int8_blocks(v)), int8_rows),
}
"""V and P: float16; E4M3 with a scale for 128 keys, and with one for each channel; INT8 with a scale for 128 keys, and
of P for each row of these."""
SMOOTH = {"none": (False, False), "k": (True, False), "kq": (True, True)}
"""What has its mean taken off: (K, Q)."""


def rounded(qk: str | None, pv: str | None, smooth: str) -> System:
    """Attention with Q and K, and P and V, rounded so, or not at all."""
    queries, keys = QK[qk] if qk else (UNROUNDED.queries, UNROUNDED.keys)
    values, weights = PV[pv] if pv else (UNROUNDED.values, UNROUNDED.weights)
    smooth_k, smooth_q = SMOOTH[smooth]
    attend = partial(
        rounded_forward, rounding=Rounding(queries, keys, values, weights), smooth_q=smooth_q, smooth_k=smooth_k
    )

    def run(act: Recorded) -> Tensor:
        return attend(act.q, act.k, act.v, causal=act.causal, scale=act.scale)[0]

    return run


SYSTEMS: dict[str, System] = {
    **{f"qk-{qk} smooth-{s}": rounded(qk, None, s) for s in SMOOTH for qk in QK},
    **{f"pv-{pv}": rounded(None, pv, "none") for pv in PV},
    **{f"qk-{qk} pv-{pv} smooth-k": rounded(qk, pv, "k") for qk in QK for pv in PV},
}
"""Only Q and K rounded, with each smoothing; only P and V; and both, with smoothed K."""


@case("granularity")
@dataclass
class GranularityCase:
    """Errors of 8-bit attention by granularity of the scales, smoothing and form of P V; write results/NAME.json."""

    sigmas: tuple[int, ...] = (1, 3)
    """Deviations of Gaussian queries and keys."""

    length: int = 2048
    """Positions of Gaussian inputs, of one head."""

    size: int = 128
    """Their head size."""

    offset: float = 2.0
    """Size of the normal offset on each channel of their keys."""

    seeds: int = 2
    """Gaussian inputs of each deviation; errors are of the outputs of all, joined."""

    corpus: Path = Path("corpus")
    """The prepared corpus that the manifest renders from."""

    clips: Path = results.ROOT / "benchmarks/sets/enhance-val.jsonl"
    """The manifest: validation, never test."""

    weights: str = "enhance-base"
    """Weights of the enhancer whose activations are recorded: a shipped name or a folder; empty: none."""

    join: int = 4
    """Clips that are joined into one recording (5 s each)."""

    bands: int = 1
    """Bands kept of each layer along time."""

    name: str = "granularity"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    def run(self) -> int:
        if min(self.sigmas, default=0) < 1 or self.seeds < 1 or self.length < 1:
            raise ValueError(
                f"sigmas, seeds, length: {self.sigmas}, {self.seeds}, {self.length} given; give positive numbers"
            )
        notes = [
            f"gaussian: (1, {self.length}, 1, {self.size}), values of bfloat16, a normal offset of size "
            f"{self.offset:g} on each channel of K, {self.seeds} inputs; errors are against attention in float32, of "
            "all outputs joined"
        ]
        rows: list[dict[str, Any]] = []
        for sigma in self.sigmas:
            acts = {f"seed {seed}": self._gaussian(sigma, seed) for seed in range(self.seeds)}
            rows += joined_rows(acts, f"gaussian sigma {sigma}")
        if self.weights:
            enhancer = Enhancer.from_pretrained(self.weights, device="cpu")
            noisy = joined(chosen_clips(self.corpus, self.clips, self.join))
            acts = {n: act for n, act in record(enhancer, noisy, self.bands, 1).items() if n.endswith("along_time")}
            rows += joined_rows(acts, f"activations, {enhancer.name}")
            shape = " x ".join(map(str, next(iter(acts.values())).q.shape))
            notes.append(
                f"activations: all {len(acts)} layers along time of {enhancer.name}, B x L x H x D = {shape}, of "
                f"{self.join} noisy validation clips joined"
            )
        path = results.write(self.name, rows, notes, self.results_folder)
        for row in rows:
            if row["metric"] == "rel_err":
                print(f"{row['case']}, {row['system']}: {row['value']:.4f}")
        print(f"written: {path}")
        return 0

    def _gaussian(self, sigma: int, seed: int) -> Recorded:
        q, k, v, _ = gaussian(self.length, self.size, sigma, seed, torch.device("cpu"), self.offset)
        return Recorded(q.float(), k.float(), v.float(), False, None)


def joined_rows(acts: dict[str, Recorded], case_name: str) -> list[dict[str, Any]]:
    """Errors of every system, of the outputs of all of ``acts`` joined."""
    return [row for row in compare(acts, SYSTEMS, along, case_name) if row["case"] == case_name]
