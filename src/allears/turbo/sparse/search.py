"""How sparse one layer can be: stage 1 at several shares, and the choice among them.

Shapes: L queries or keys, H query heads, G key/value heads, D head size.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention.sparse_linear import SparseLinear
from allears.turbo.sparse.fit import Errors, Sample, fit_projection, fit_ratio, fit_router, measure
from allears.turbo.sparse.record import LayerFacts

log = logging.getLogger(__name__)

_MOST_KEPT = 0.5


@dataclass(frozen=True)
class SparseSettings:
    """How layers are made sparse.

    Args:
        keeps: shares of the key blocks that are read exactly, in (0, 1]; the smallest that is good enough is taken.
        max_error: relative L2 error against dense attention on held-out samples, above which a layer stays dense.
        options: form, blocks, feature map and numbers; with ``int8_fp8`` the fit and the errors are of these.
        ratio_of_query: let the mixing ratio depend on the block of queries; it takes many samples to gain by it.
        steps, lr, query_blocks: see :func:`allears.turbo.sparse.fit.fit_router`.
        holdout: share of the samples that errors are measured on; of a single sample, that one.
        seed: of the rows that are drawn.

    Raises:
        ValueError: a number is out of its range.
    """

    keeps: tuple[float, ...] = (0.03, 0.05, 0.1)
    max_error: float = 0.1
    options: SparseLinear = field(default_factory=SparseLinear)
    ratio_of_query: bool = False
    steps: int = 200
    lr: float = 0.01
    query_blocks: int = 8
    holdout: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.keeps or not all(0 < keep <= 1 for keep in self.keeps):
            raise ValueError(f"keeps: {self.keeps} given; wanted one or more shares in (0, 1]")
        for name in ("max_error", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} given; it must be positive")
        for name in ("steps", "query_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} given; wanted at least 1")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: {self.holdout} given; wanted a share of the samples between 0 and 1")


@dataclass(frozen=True)
class Trial:
    """One layer at one share, on held-out samples.

    Args:
        keep: the share asked for, and ``kept``, the share that whole blocks gave.
        mass: attention mass of the picked blocks.
        error_sparse: relative L2 error of the exact branch alone, with the blocks picked by pooled q and k.
        error_pooled: with these blocks, and the fitted ratio (in the form ``sla``: projection).
        error: with the router that is kept; it is ``learned``, unless ``pooled`` was better.
    """

    keep: float
    kept: float
    mass: float
    error_sparse: float
    error_pooled: float
    error: float
    router: Literal["learned", "pooled"]


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Args:
        name: of the layer in the model.
        keep: its share of exact key blocks; ``None``: it stays dense, and ``reason`` says why.
        trials: from the smallest share to the first that was good enough.
        seconds: that the fit took.
    """

    name: str
    keep: float | None
    reason: str
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of the key blocks that are not read exactly; 0 of a dense layer."""
        return 1 - self.trials[-1].kept if self.keep is not None else 0.0


def build_core(facts: LayerFacts, keep: float, settings: SparseSettings) -> SparseLinearAttention:
    """A core for a layer, not fitted."""
    return SparseLinearAttention(
        facts.heads,
        facts.head_dim,
        keep,
        settings.options,
        kv_heads=facts.kv_heads,
        causal=facts.causal,
        scale=facts.scale,
        ratio_of_query=settings.ratio_of_query,
    )


def search_layer(
    name: str,
    facts: LayerFacts,
    samples: Sequence[Sample],
    settings: SparseSettings,
    device: torch.device,
    watch: Callable[[float, int, float], None] | None = None,
) -> tuple[LayerReport, SparseLinearAttention | None]:
    """Fit a layer at each share from the smallest on, until its error is small enough.

    Args:
        watch: called after each step with the share, the step from 1, and the relative squared error.

    Returns:
        The report, and the fitted core; ``None`` for a layer that stays dense.
    """
    started = time.monotonic()
    trials: list[Trial] = []

    def report(keep: float | None, reason: str = "") -> LayerReport:
        return LayerReport(name, keep, reason, tuple(trials), round(time.monotonic() - started, 3))

    if facts.dense_because:
        return report(None, facts.dense_because), None
    here = [sample.to(device) for sample in samples]
    held = math.ceil(settings.holdout * len(here)) if len(here) > 1 else 0
    fitted, judged = (here[:-held], here[-held:]) if held else (here, here)
    for keep in sorted(settings.keeps):
        core, trial = _try(facts, keep, settings, fitted, judged, device, watch)
        trials.append(trial)
        log.info("%s, keep %g: mass %.3f, error %.4f (%s router)", name, keep, trial.mass, trial.error, trial.router)
        if trial.kept > _MOST_KEPT:
            return report(None, f"too short: at keep {keep:g} its blocks hold {trial.kept:.0%} of the keys"), None
        if trial.error <= settings.max_error:
            return report(keep), core
    return report(None, f"error {min(t.error for t in trials):.3f} is above {settings.max_error:g}"), None


def _try(
    facts: LayerFacts,
    keep: float,
    settings: SparseSettings,
    fitted: list[Sample],
    judged: list[Sample],
    device: torch.device,
    watch: Callable[[float, int, float], None] | None,
) -> tuple[SparseLinearAttention, Trial]:
    pooled = build_core(facts, keep, settings).to(device)
    _finish(pooled, fitted)
    of_pooled = measure(pooled, judged)
    best: tuple[SparseLinearAttention, Errors, Literal["learned", "pooled"]] = (pooled, of_pooled, "pooled")
    if pooled.router is not None:
        learned = build_core(facts, keep, settings).to(device)
        fit_router(
            learned,
            fitted,
            steps=settings.steps,
            lr=settings.lr,
            query_blocks=settings.query_blocks,
            straight_through=settings.options.precision != "exact",
            seed=settings.seed,
            watch=None if watch is None else lambda step, loss: watch(keep, step, loss),
        )
        _finish(learned, fitted)
        of_learned = measure(learned, judged)
        if of_learned.error < of_pooled.error:
            best = (learned, of_learned, "learned")
    core, errors, router = best
    return core, Trial(keep, errors.kept, errors.mass, of_pooled.sparse, of_pooled.error, errors.error, router)


def _finish(core: SparseLinearAttention, fitted: list[Sample]) -> None:
    """Fit what mixes the branches, with the blocks fixed."""
    if core.ratio is not None:
        fit_ratio(core, fitted)
    if core.proj is not None:
        fit_projection(core, fitted)
