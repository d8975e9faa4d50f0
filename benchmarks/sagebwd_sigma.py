"""Errors of SageBwd and of the other low-bit families on Gaussian inputs, beside the table of the SageBwd paper.

Shapes: L positions of one head in one batch, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allears.core.device import matmul_precision, resolve_device
from allears.ops.attention import AttentionSpec, LowBit, attention, explain
from allears.ops.attention.lowbit.sagebwd_reference import sagebwd_backward, sagebwd_forward

from . import nvfp4, results
from .activations import Recorded
from .registry import case

NAMES = ("", "_dq", "_dk", "_dv")  # of the output and the gradients, behind the name of a metric
PAPER: dict[int, dict[str, tuple[float, ...]]] = {
    1: {"rel_err": (0.016, 0.018, 0.022), "cosine": (0.9999, 0.9998)},
    3: {"rel_err": (0.039, 0.076, 0.078), "cosine": (0.9992, 0.9971)},
    5: {"rel_err": (0.060, 0.201, 0.201), "cosine": (0.9982, 0.980)},
    8: {"rel_err": (0.097, 0.467, 0.470), "cosine": (0.9953, 0.890)},
    10: {"rel_err": (0.116, 0.665, 0.668), "cosine": (0.9933, 0.782)},
}
"""By the deviation of q and k: O, dQ, dK (arXiv 2603.02170, table 1); it gives no shapes and no dV."""
FORWARD_SIZE, FORWARD_OFFSET = (2048, 128), 2.0
OFFSET_SIZE, OFFSETS = (512, 16), (0, 1, 6)
FORWARD = (
    *nvfp4.SPECS,
    "allears-nvfp4-no-smooth-k",
    "allears-nvfp4-no-smooth-q",
    "allears-nvfp4-no-smoothing",
    "allears-nvfp4-hadamard",
    "mxfp4",
)
Trained = tuple[Tensor, Tensor, Tensor, Tensor]  # output, dQ, dK, dV
Train = Callable[[Tensor, Tensor, Tensor, Tensor], Trained]  # of q, k, v and the gradient of the output, (1, L, 1, D)


def exact(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Trained:
    """Attention and its gradients in float32 as the textbook has it."""
    with matmul_precision("highest"):
        leaves = [x[0, :, 0].float().requires_grad_() for x in (q, k, v)]
        out = (leaves[0] @ leaves[1].T * q.shape[-1] ** -0.5).softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(out, leaves, d_out[0, :, 0].float())
    found = [x.detach()[None, :, None] for x in (out, *gradients)]
    return found[0], found[1], found[2], found[3]


def by_reference(options: LowBit, p_top: float) -> Train:
    """The reference of ``sagebwd`` with the largest integer of P."""

    def train(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Trained:
        out, _, saved = sagebwd_forward(q, k, v, options=options, p_top=p_top)
        return out, *sagebwd_backward(d_out, saved, options=options, p_top=p_top)

    return train


def by_spec(spec: AttentionSpec) -> Train:
    """What :func:`attention` runs for a spec."""

    def train(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Trained:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(leaves[0], leaves[1], leaves[2], spec)
        d_q, d_k, d_v = torch.autograd.grad(out, leaves, d_out)
        return out.detach(), d_q, d_k, d_v

    return train


TILE = LowBit(grad_scales="tile")
REFERENCES: dict[str, Train] = {
    "allears-sagebwd-reference": by_reference(LowBit(), 127.0),
    "allears-sagebwd-reference-255": by_reference(LowBit(), 255.0),
    "allears-sagebwd-reference-tile": by_reference(TILE, 127.0),
}
KERNELS = {
    "allears-sagebwd": AttentionSpec(numerics="sagebwd"),
    "allears-sagebwd-triton": AttentionSpec("triton", numerics="sagebwd"),
    "allears-sagebwd-triton-tile": AttentionSpec("triton", numerics="sagebwd", lowbit=TILE),
}


def gaussian(length: int, size: int, sigma: float, seed: int, device: torch.device, offset: float = 0.0) -> Trained:
    """q and k of deviation ``sigma``, v and the gradient of the output of deviation 1, in bfloat16; each channel of k
    has a normal offset of size ``offset``."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, d_out = (torch.randn(1, length, 1, size, generator=generator) * s for s in (sigma, sigma, 1, 1))
    k = k + offset * torch.randn(size, generator=generator)
    made = [x.bfloat16().to(device) for x in (q, k, v, d_out)]
    return made[0], made[1], made[2], made[3]


class Errors:
    """Errors of one system in one case, gathered over inputs."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """Outputs, or outputs and gradients."""
        for name, got, right in zip(NAMES, found, wanted, strict=False):
            x, y = got.double().flatten(), right.double().flatten()
            self.values.setdefault(f"rel_err{name}", []).append(float((x - y).norm() / y.norm()))
            self.values.setdefault(f"cosine{name}", []).append(float(x @ y / (x.norm() * y.norm())))

    def rows(self, case_name: str, system: str) -> list[dict[str, Any]]:
        """Means over the inputs, with the lowest and the highest."""
        return [
            results.row(case_name, system, metric, sum(x) / len(x), min(x), max(x), len(x))
            for metric, x in self.values.items()
        ]


@case("sagebwd_sigma")
@dataclass
class SageBwdSigmaCase:
    """Errors of the low-bit families on Gaussian inputs; write benchmarks/results/NAME.json."""

    lengths: tuple[int, ...] = (1024, 2048, 4096)
    """Positions of the inputs whose errors are averaged."""

    sizes: tuple[int, ...] = (64, 128)
    """Head sizes."""

    seeds: int = 1
    """Inputs of each length."""

    device: str = "auto"
    """cuda, cpu or auto; the kernels run on a GPU alone."""

    name: str = "sagebwd_sigma"
    """Name of the result file."""

    results_folder: Path = results.RESULTS
    """Folder of the result file."""

    commit: str | None = None
    """The commit that is measured, for a copy of the files without their repository."""

    notes: list[str] = field(init=False, default_factory=list)

    def run(self) -> int:
        if not self.lengths or min(self.lengths) < 1 or self.seeds < 1:
            raise ValueError(f"lengths, seeds: {self.lengths} and {self.seeds} given; give positive numbers")
        device = resolve_device(self.device)
        self.notes.append(
            f"bfloat16 inputs on {device}, one head: q, k of deviation sigma, v and the gradient of the output 1; "
            f"means over L = {', '.join(map(str, self.lengths))} and {self.seeds} seed(s) each, low and high over the "
            "same; against attention in float32; paper: arXiv 2603.02170, table 1, which gives no shapes"
        )
        rows = [*self.training(device), *self.forward(device), *self.offsets(device)]
        path = results.write(self.name, rows, self.notes, self.results_folder, self.commit)
        print(f"written: {path}")
        return 0

    def training(self, device: torch.device) -> list[dict[str, Any]]:
        """Cases ``sigma S D``: the paper's table by the references and the kernels."""
        rows: list[dict[str, Any]] = []
        systems = {**REFERENCES, **self.kernels(device)}
        for size in self.sizes:
            for sigma, paper in PAPER.items():
                name = f"sigma {sigma} D {size}"
                for metric, values in paper.items():
                    rows += [results.row(name, "paper", metric + m, x) for m, x in zip(NAMES, values, strict=False)]
                found = {system: Errors() for system in systems}
                for length in self.lengths:
                    for seed in range(self.seeds):
                        given = gaussian(length, size, sigma, seed, device)
                        wanted = exact(*given)
                        for system, train in systems.items():
                            found[system].add(train(*given), wanted)
                rows += [row for system, errors in found.items() for row in errors.rows(name, system)]
        return rows

    def kernels(self, device: torch.device) -> dict[str, Train]:
        """Those of :data:`KERNELS` that run here; the notes name the others, and which kernel ran."""
        able: dict[str, Train] = {}
        for system, spec in KERNELS.items():
            for size in self.sizes:
                q, k, v, _ = gaussian(128, size, 1, 0, device)
                try:
                    kernel = explain(q.requires_grad_(), k, v, spec).kernel
                except (ValueError, ImportError) as error:
                    able.pop(system, None)
                    self.notes.append(f"{system}: not available: {error}")
                    break
                if kernel == "reference":
                    able.pop(system, None)
                    self.notes.append(f"{system}: not available: only the reference runs on {device}")
                    break
                able[system] = by_spec(spec)
                self.notes.append(f"{system}: kernel {kernel} at head size {size}")
        return able

    def forward(self, device: torch.device) -> list[dict[str, Any]]:
        """Cases ``forward sigma S``: outputs of each family's reference, with an offset of K's channels."""
        rows: list[dict[str, Any]] = []
        length, size = FORWARD_SIZE
        self.notes.append(f"forward: L = {length}, D = {size}, offset of size {FORWARD_OFFSET} on each channel of K")
        systems = {name: nvfp4.SYSTEMS[name] for name in FORWARD}
        plain = AttentionSpec(numerics="int8_fp8", lowbit=LowBit(smooth_k=False))
        systems["allears-int8fp8-no-smooth-k"] = nvfp4.through(plain)
        for sigma in (1, 3):
            q, k, v, d_out = gaussian(length, size, sigma, 0, device, FORWARD_OFFSET)
            wanted = exact(q, k, v, d_out)[:1]
            for system, run in systems.items():
                errors = Errors()
                errors.add([run(Recorded(q.float(), k.float(), v.float(), False, None))], wanted)
                rows += errors.rows(f"forward sigma {sigma}", system)
        return rows

    def offsets(self, device: torch.device) -> list[dict[str, Any]]:
        """Cases ``offset N``: gradients through a quantised forward, where all keys share an offset."""
        rows: list[dict[str, Any]] = []
        length, size = OFFSET_SIZE
        self.notes.append(f"offset: L = {length}, D = {size}, a normal offset of size N on each channel of K")
        for offset in OFFSETS:
            q, k, v, d_out = gaussian(length, size, 1, 0, device, offset)
            wanted = exact(q, k, v, d_out)
            for numerics in ("nvfp4", "int8_fp8"):
                for backward in ("matched", "drop_in"):
                    spec = AttentionSpec("reference", numerics=numerics, lowbit=LowBit(backward=backward))
                    errors = Errors()
                    errors.add(by_spec(spec)(q, k, v, d_out), wanted)
                    rows += errors.rows(f"offset {offset}", f"allears-{numerics.replace('_', '')}-{backward}")
        return rows
