"""The forms of sparse-linear attention that are compared on one recorded layer, each fitted to it.

Shapes: L positions, H heads, D head size, N_q and N_k blocks of queries and keys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import Blocks, SparseLinear, map_from_blocks, select_top_k
from allears.turbo.sparse.fit import Errors, Sample, block_mass, dense, fit_projection, fit_ratio, fit_router, measure

from . import results

ORACLE = "sla2-oracle"
ABOUT = {
    "sparse": "top-k of pooled q and k, exact branch alone",
    "sla": "the same blocks, O_s + projection of the linear branch over the marginal blocks (10 % skipped), the "
    "projection by least squares",
    "sla2-topk": "the same blocks, mixed by a ratio a head",
    "sla2-topk-query": "the same, the ratio also a linear form of the pooled query",
    "sla2": "learned router, ratio a head",
    "sla2-query": "the same router, the ratio also a linear form of the pooled query",
    "sla2-int8fp8": "sla2, its sparse branch in INT8 and FP8 afterwards",
    "sla2-qat-int8fp8": "router and ratio fitted through the forward in INT8 and FP8, and measured in it",
    ORACLE: "blocks of the most attention mass, which no router knows, and a ratio a head: a bound for routers",
}
"""What is compared, in the order of the table."""


class Oracle(SparseLinearAttention):
    """Blocks by their true attention mass."""

    @torch.no_grad()
    def route(self, q: Tensor, k: Tensor) -> Blocks:
        return select_top_k(block_mass(self, q, k), self.keep, geometry=self.geometry(q, k))


@dataclass(frozen=True)
class Layer:
    """A recorded layer.

    Args:
        name: of the layer.
        fitted, held_out: samples to fit to and to measure on, on the device.
        causal, scale: of its attention.
    """

    name: str
    fitted: list[Sample]
    held_out: list[Sample]
    causal: bool = False
    scale: float | None = None


@dataclass
class Fitter:
    """Fits all systems to a layer; the part of the router's fit that no share enters is made once.

    Args:
        layer: see :class:`Layer`.
        options: of all systems, but for form and precision.
        mass_steps, output_steps: of :func:`fit_router`: on attention mass, and then on the output, at each share.
        lr, query_blocks: see there.
    """

    layer: Layer
    options: SparseLinear
    mass_steps: int
    output_steps: int
    lr: float = 0.01
    query_blocks: int = 8
    _router: SparseLinearAttention | None = field(default=None, repr=False)

    def new(self, keep: float, options: SparseLinear | None = None, of_query: bool = False, kind: type | None = None):
        """A core for the layer, not fitted."""
        heads, size = self.layer.fitted[0].q.shape[1:]
        core = (kind or SparseLinearAttention)(
            heads,
            size,
            keep,
            options or self.options,
            kv_heads=self.layer.fitted[0].k.shape[1],
            causal=self.layer.causal,
            scale=self.layer.scale,
            ratio_of_query=of_query,
        )
        return core.to(self.layer.fitted[0].q.device)

    def learned(self, keep: float, precision: str = "exact") -> SparseLinearAttention:
        """A core with a fitted router and ratio; in low bit, fitted through it."""
        core = self.new(keep, replace(self.options, precision=precision))
        core.router.load_state_dict(self._mass_router().state_dict())
        self._fit(core, self.output_steps, 0.0, straight_through=precision != "exact")
        fit_ratio(core, self.layer.fitted)
        return core

    def errors(self, keep: float) -> tuple[dict[str, Errors], SparseLinearAttention]:
        """Errors of every system on held-out samples, and the core of ``sla2``."""
        held_out, fitted = self.layer.held_out, self.layer.fitted
        cores: dict[str, SparseLinearAttention] = {
            "sparse": self.new(keep, replace(self.options, form="sparse")),
            "sla": self.new(keep, replace(self.options, form="sla")),
            "sla2-topk": self.new(keep),
            "sla2-topk-query": self.new(keep, of_query=True),
            ORACLE: self.new(keep, kind=Oracle),
        }
        fit_projection(cores["sla"], fitted)
        for name in ("sla2-topk", "sla2-topk-query", ORACLE):
            fit_ratio(cores[name], fitted)
        best = cores["sla2"] = self.learned(keep)
        of_query = cores["sla2-query"] = self.new(keep, of_query=True)
        of_query.router.load_state_dict(best.router.state_dict())
        fit_ratio(of_query, fitted)
        rounded = cores["sla2-int8fp8"] = copy.deepcopy(best)
        rounded.options = replace(best.options, precision="int8_fp8")
        cores["sla2-qat-int8fp8"] = self.learned(keep, "int8_fp8")
        return {name: measure(cores[name], held_out) for name in ABOUT}, best

    def _mass_router(self) -> torch.nn.Module:
        if self._router is None:
            core = self.new(0.05)
            self._fit(core, self.mass_steps, 1.0)
            self._router = core
        return self._router.router

    def _fit(self, core: SparseLinearAttention, steps: int, mass_share: float, straight_through: bool = False) -> None:
        fit_router(
            core,
            self.layer.fitted,
            steps=steps,
            lr=self.lr,
            query_blocks=self.query_blocks,
            mass_share=mass_share,
            straight_through=straight_through,
        )


class Joined:
    """Errors of layers joined: sums of squares relative to each layer's dense output, equally weighted."""

    def __init__(self) -> None:
        self._errors: dict[str, list[Errors]] = {}

    def add(self, errors: dict[str, Errors]) -> None:
        for name, found in errors.items():
            self._errors.setdefault(name, []).append(found)

    def values(self) -> dict[str, dict[str, float]]:
        """Of each system the root mean square of its layers' relative errors, and the mean mass and share kept."""
        return {
            name: {
                "rel_err": math.sqrt(sum(e.error**2 for e in found) / len(found)),
                "mass": sum(e.mass for e in found) / len(found),
                "kept": sum(e.kept for e in found) / len(found),
            }
            for name, found in self._errors.items()
        }


@torch.no_grad()
def maps(core: SparseLinearAttention, sample: Sample) -> tuple[Tensor, Tensor]:
    """True attention mass of blocks and the blocks that the router picks, both (H, N_q, N_k), float32 and bool."""
    q, k = sample.q[None].float(), sample.k[None].float()
    return block_mass(core, q, k)[0], map_from_blocks(core.route(q, k), core.geometry(q, k).n_k)[0]


def gradient_errors(
    core: SparseLinearAttention, samples: Sequence[Sample], wanted: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """Relative L2 errors of the gradients of the int8_fp8 forward, ``drop_in`` and ``matched``, against those of the
    exact one, for the squared error of the output to ``wanted``, over all samples joined.

    Args:
        wanted: dense outputs (1, L, H, D).
    """
    sums: dict[str, dict[str, list[float]]] = {}
    for sample, target in zip(samples, wanted, strict=True):
        blocks = core.route(sample.q[None].float(), sample.k[None].float())
        exact = _gradients(core, sample, blocks, target, core.options)
        for backward in ("drop_in", "matched"):
            options = replace(core.options, precision="int8_fp8", backward=backward)
            for name, found in _gradients(core, sample, blocks, target, options).items():
                pair = sums.setdefault(backward, {}).setdefault(name, [0.0, 0.0])
                pair[0] += float((found - exact[name]).square().sum())
                pair[1] += float(exact[name].square().sum())
    return {
        backward: {name: math.sqrt(off / max(size, 1e-30)) for name, (off, size) in found.items()}
        for backward, found in sums.items()
    }


def gradient_rows(core: SparseLinearAttention, samples: Sequence[Sample], case_name: str) -> list[dict[str, Any]]:
    """Rows of :func:`gradient_errors` against dense attention."""
    if not samples:
        return []
    targets = [dense(core, *(x[None].float() for x in sample)).detach() for sample in samples]
    return [
        results.row(f"gradients, {case_name}", f"int8fp8-{backward.replace('_', '-')}", f"rel_err_{name}", value)
        for backward, found in gradient_errors(core, samples, targets).items()
        for name, value in found.items()
    ]


def _gradients(
    core: SparseLinearAttention, sample: Sample, blocks: Blocks, target: Tensor, options: SparseLinear
) -> dict[str, Tensor]:
    one = copy.deepcopy(core)
    one.options = options
    q, k, v = (x[None].float().clone().requires_grad_() for x in sample)
    found = one.attend(q, k, v, blocks)
    exact = core.attend(q, k, v, blocks).detach()
    leaves = {"dq": q, "dk": k, "dv": v, "dratio": one.ratio.logit}
    grads = torch.autograd.grad(found, list(leaves.values()), 2 * (exact - target))
    return dict(zip(leaves, grads, strict=True))
