"""Stage 1 of SLA2 for one layer: router and ratio fitted to recorded q, k, v, so that the output is the dense one's.

Shapes: L_q queries, L_k keys, H query heads, G key/value heads, D head size, N_q blocks of queries.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import AttentionSpec, attention
from allears.ops.attention.sparse_linear import sparse_linear_attention
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.options import Form
from allears.ops.attention.sparse_linear.routers import pool_blocks

_RIDGE = 1e-4


class Sample(NamedTuple):
    """What one sequence brought to a layer: q (L_q, H, D), k and v (L_k, G, D), after positions and norms."""

    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, device: torch.device) -> "Sample":
        return Sample(*(part.to(device) for part in self))


class Errors(NamedTuple):
    """How far a layer is from dense attention on some samples.

    Args:
        error: relative L2 error of the output, |O - dense| / |dense|, over all samples joined.
        sparse: that of the exact branch alone.
        mass: attention mass of the picked blocks, meaned over rows, heads and samples.
        kept: share of the key blocks that are read exactly.
    """

    error: float
    sparse: float
    mass: float
    kept: float


@torch.enable_grad()
def fit_router(
    core: SparseLinearAttention,
    samples: Sequence[Sample],
    *,
    steps: int,
    lr: float = 0.01,
    query_blocks: int = 8,
    mass_share: float = 0.5,
    heat: float = 10.0,
    straight_through: bool = False,
    seed: int = 0,
    watch: Callable[[int, float], None] | None = None,
) -> None:
    """Fit router and ratio by Adam to recorded q, k, v. Afterwards the stage is ``hard``.

    First the router alone, to the attention mass of blocks: cross-entropy of the softmax of its scores. Then router and
    ratio as in section 5.3 of the paper, to the squared error against dense attention through the soft map, while its
    temperature falls to the core's: a warm map lets all blocks through in part, which the hard one does not.

    Args:
        core: in float32, of a form with a router.
        samples: on the core's device. A step takes ``query_blocks`` blocks of queries of one, against all its keys.
        lr: at the beginning; it falls to 0 as a cosine.
        mass_share: share of the steps for the first part.
        heat: temperature at the beginning of the second part, relative to the core's.
        straight_through: in the second part take the error of the hard map, in the numbers of ``core.options``, with
            the gradient of the soft one: quantisation-aware fitting.
        watch: called after each step with its number from 1 and its loss: in the first part the cross-entropy above
            that of the best router, in nats, in the second the relative squared error.

    Raises:
        ValueError: the form trains no router, or there are no samples.
    """
    _check(core, samples)
    if core.router is None:
        raise ValueError(f"form: {core.options.form!r} trains no router; use form='sla2' or 'sparse'")
    draws = torch.Generator().manual_seed(seed)
    last, temperature = round(mass_share * steps), core.temperature
    core.set_stage("soft")
    try:
        optimizer = torch.optim.Adam([p for p in core.parameters() if p.requires_grad], lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            whole = _batch(samples[int(torch.randint(len(samples), (), generator=draws))])
            q, k, v = draw_rows(*whole, core.options.block_q, query_blocks, core.causal, draws)
            if step < last:
                loss = _mass_loss(core, q, k)
            else:
                if step == last and core.ratio is not None:
                    core.init_from(*whole)
                core.temperature = temperature * heat ** (1 - (step - last) / max(steps - last - 1, 1))
                loss = _output_loss(core, q, k, v, straight_through)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if watch is not None:
                watch(step + 1, float(loss.detach()))
    finally:
        core.temperature = temperature
        core.set_stage("hard")


def _mass_loss(core: SparseLinearAttention, q: Tensor, k: Tensor) -> Tensor:
    """Mean divergence of the softmax of the scores from the attention mass of blocks."""
    mass = block_mass(core, q, k)
    seen = core.geometry(q, k).visible(q.device)
    logs = core.scores(q, k).masked_fill(~seen, -math.inf).log_softmax(-1).masked_fill(~seen, 0.0)
    return (torch.xlogy(mass, mass) - mass * logs).sum(-1).mean()


def _output_loss(core: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, straight_through: bool) -> Tensor:
    wanted = dense(core, q, k, v)
    found = core(q, k, v)
    if straight_through:
        with torch.no_grad():
            hard = core.attend(q, k, v, core.route(q, k))
        found = found + (hard - found).detach()
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)


@torch.no_grad()
def block_mass(core: SparseLinearAttention, q: Tensor, k: Tensor) -> Tensor:
    """What share of the attention of a block of queries goes to each block of keys, (B, H, N_q, N_k); rows sum to 1.

    A row of queries without keys counts nothing. Costs memory of L_q * L_k.
    """
    geometry = core.geometry(q, k)
    keys = k.repeat_interleave(core.heads // core.kv_heads, 2)
    logits = core.scale * torch.einsum("blhd,bmhd->bhlm", q, keys)
    weights = logits.masked_fill(~geometry.tokens(q.device), -math.inf).softmax(-1).nan_to_num(0.0)
    by_keys = pool_blocks(weights.permute(0, 3, 1, 2), core.options.block_k)  # (B, H, N_k, L_q), means
    sizes = torch.full((geometry.n_k,), core.options.block_k, device=q.device)
    sizes[-1] = k.shape[1] - core.options.block_k * (geometry.n_k - 1)
    summed = (by_keys * sizes[:, None]).permute(0, 3, 1, 2)  # (B, L_q, H, N_k)
    mass = pool_blocks(summed, core.options.block_q)
    return mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)


@torch.no_grad()
def fit_ratio(core: SparseLinearAttention, samples: Sequence[Sample]) -> None:
    """The ratio that is best for the hard map, to the end: with the blocks fixed the squared error of each block of
    queries is a parabola in its ratio, whose coefficients are small and are taken once.

    Raises:
        ValueError: this form has no ratio, or there are no samples.
    """
    _check(core, samples)
    if core.ratio is None:
        raise ValueError(f"form: {core.options.form!r} has no ratio; use form='sla2'")
    slopes, curves, pools = [], [], []
    size = 0.0
    for sample in samples:
        q, k, v = _batch(sample)
        exact, linear = branches(core, q, k, v)
        wanted = dense(core, q, k, v)
        apart = exact - linear
        for found, x in ((slopes, (wanted - linear) * apart), (curves, apart.square())):
            found.append(pool_blocks(x, core.options.block_q).sum(-1)[0].double())  # means of rows: (H, N_q)
        pools.append(pool_blocks(q, core.options.block_q)[0].double())
        size += float(wanted.square().sum(-1).mean())
    slope, curve = torch.cat(slopes, -1), torch.cat(curves, -1)
    pool = torch.cat(pools, 1)
    core.ratio.set((slope.sum(-1) / curve.sum(-1).clamp_min(1e-30)).float())
    if core.ratio.weight is None:
        return
    logit, weight = core.ratio.logit.double().clone(), core.ratio.weight.double().clone()
    parameters = [logit.requires_grad_(), weight.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        ratio = torch.sigmoid(logit[:, None] + (pool * weight[:, None]).sum(-1))
        loss = (curve * ratio.square() - 2 * slope * ratio).sum() / (size + 1e-30) + _RIDGE * weight.square().sum()
        loss.backward()
        return float(loss.detach())

    with torch.enable_grad():
        optimizer.step(closure)
    core.ratio.logit.copy_(logit.detach().clamp(-12.0, 12.0))
    core.ratio.weight.copy_(weight.detach())


@torch.no_grad()
def fit_projection(core: SparseLinearAttention, samples: Sequence[Sample]) -> None:
    """The best projection of the form ``sla`` for its blocks, by least squares.

    Raises:
        ValueError: this form has no projection, or there are no samples.
    """
    _check(core, samples)
    if core.proj is None:
        raise ValueError(f"form: {core.options.form!r} has no projection; use form='sla'")
    size = core.head_dim + 1
    gram, cross = (torch.zeros(size, n, dtype=torch.float64, device=samples[0].q.device) for n in (size, size - 1))
    for sample in samples:
        q, k, v = _batch(sample)
        exact, linear = branches(core, q, k, v)
        x = torch.cat([linear, torch.ones_like(linear[..., :1])], -1).flatten(0, 2).double()
        gram += x.T @ x
        cross += x.T @ (dense(core, q, k, v) - exact).flatten(0, 2).double()
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, cross)
    core.proj.weight.copy_(solved[:-1].T)
    core.proj.bias.copy_(solved[-1])


@torch.no_grad()
def measure(core: SparseLinearAttention, samples: Sequence[Sample]) -> Errors:
    """Errors of the layer as it infers: hard map, numbers of its options."""
    _check(core, samples)
    off = off_sparse = size = mass = kept = 0.0
    for sample in samples:
        q, k, v = _batch(sample)
        blocks = core.route(q, k)
        wanted = dense(core, q, k, v)
        off += float((core.attend(q, k, v, blocks) - wanted).square().sum())
        off_sparse += float((_exact_branch(core, q, k, v, blocks) - wanted).square().sum())
        size += float(wanted.square().sum())
        mass += float(core.mass(q, k, v).nanmean()) / len(samples)
        seen = core.geometry(q, k).visible(q.device).sum(-1)
        kept += float((blocks.count / seen.clamp_min(1)).mean()) / len(samples)
    size = max(size, 1e-30)
    return Errors(math.sqrt(off / size), math.sqrt(off_sparse / size), mass, kept)


def dense(core: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention of float32 q (B, L_q, H, D), k and v (B, L_k, G, D) with the core's scale and causality."""
    return attention(q, k, v, AttentionSpec(causal=core.causal, scale=core.scale))


def branches(core: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of the exact and of the linear branch over the core's blocks, both (B, L_q, H, D); where a block of
    queries has no linear blocks, both are the exact one's, or, in the form ``sla``, the linear one is 0.
    """
    blocks = core.route(q, k)
    exact = _exact_branch(core, q, k, v, blocks)
    if core.proj is not None:
        eye = torch.eye(core.head_dim, device=q.device)
        mixed = _attend(core, q, k, v, blocks, "sla", proj=(eye, None))
        return exact, mixed - exact
    return exact, _attend(core, q, k, v, blocks, "sla2", ratio=torch.zeros(1, device=q.device))


def draw_rows(
    q: Tensor, k: Tensor, v: Tensor, block: int, count: int, causal: bool, draws: torch.Generator
) -> Iterator[Tensor]:
    """q, k, v with ``count`` blocks of queries at random; causal, neighbouring ones and the keys that they see."""
    number = -(-q.shape[1] // block)
    count = min(count, number)
    if not causal:
        chosen = torch.randperm(number, generator=draws)[:count].sort().values
        rows = (chosen[:, None] * block + torch.arange(block)).flatten()
        return iter((q[:, rows[rows < q.shape[1]].to(q.device)], k, v))
    first = int(torch.randint(number - count + 1, (), generator=draws)) * block
    end = min(first + count * block, q.shape[1])
    seen = max(end + k.shape[1] - q.shape[1], 0)
    return iter((q[:, first:end], k[:, :seen], v[:, :seen]))


def _exact_branch(core: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    return _attend(core, q, k, v, blocks, "sparse")


def _attend(
    core: SparseLinearAttention, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, form: Form, **more: Any
) -> Tensor:
    options = replace(core.options, form=form)
    return sparse_linear_attention(
        q, k, v, blocks, options=options, causal=core.causal, scale=core.scale, kernel=core.kernel, **more
    )


def _batch(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """(1, L, heads, D) each, float32."""
    return sample.q[None].float(), sample.k[None].float(), sample.v[None].float()


def _check(core: SparseLinearAttention, samples: Sequence[Sample]) -> None:
    if not samples:
        raise ValueError("samples: none given; record at least one sequence of this layer")
    heads = (core.heads, core.kv_heads, core.head_dim)
    found = (samples[0].q.shape[1], samples[0].k.shape[1], samples[0].q.shape[2])
    if found != heads:
        raise ValueError(f"samples: (H, G, D) = {found} given, the layer has {heads}; take samples of this layer")
