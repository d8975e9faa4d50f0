"""What a sparse system says that it computes, and exact samples of it from the float32 reference of the library.

Outputs are checked on all rows of sampled query blocks of sampled heads, against all keys; gradients on all rows of
sampled key heads, a chunk of query blocks at a time. Shapes: B batch, L length, H query heads, G key heads,
R = H / G, D head size, N_q and N_k blocks of queries and keys, N sampled rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allears.bench.attention.inputs import Inputs
from allears.bench.attention.reference import GradientSample, OutputSample, full_precision, picked
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, map_from_blocks
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference

_HEADS, _BLOCKS = 6, 4  # sampled for the output
_GRADIENT_HEADS = 2  # key heads sampled for the gradients
_CHUNK_BYTES = 2**28  # of one matrix of logits


@dataclass(frozen=True)
class Formula:
    """What a system computes for given inputs.

    Args:
        blocks: the key blocks that it picked, 64 keys each, for each block of ``options.block_q`` queries.
        options: the form that mixes the branches. Its precision is not read: the samples are exact.
        ratio: of the form ``sla2``, (B or 1, H, N_q or 1).
        proj: of the form ``sla``: weight and bias.
        router: projections (H, D, D) of pooled queries and (G, D, D) of pooled keys that its scores come from, where
            its choice of blocks is to be checked too.
        keep: share of the visible key blocks that it is to pick; read with ``router``.
        causal: a query sees itself and what came before.
    """

    blocks: Blocks
    options: SparseLinear
    ratio: Tensor | None = None
    proj: tuple[Tensor, Tensor | None] | None = None
    router: tuple[Tensor, Tensor] | None = None
    keep: float = 1.0
    causal: bool = False


def sample_output(inputs: Inputs, formula: Formula, seed: int = 0) -> OutputSample:
    """Exact rows of the output: the first and the last query block and random ones between, of random heads."""
    chosen = _query_blocks(inputs, formula, seed)
    rows = _rows_of(chosen, formula, inputs.q.shape[1], inputs.q.device)
    batch, _, heads, _ = inputs.q.shape
    share = heads // inputs.k.shape[2]
    generator = torch.Generator().manual_seed(seed)
    exact = {}
    with full_precision():
        for b, h in picked(batch, heads, _HEADS, generator):
            kv = slice(h // share, h // share + 1)
            q, k, v = inputs.q[b : b + 1, rows, h : h + 1], inputs.k[b : b + 1, :, kv], inputs.v[b : b + 1, :, kv]
            out = _reference(q.float(), k.float(), v.float(), formula, b, slice(h, h + 1), chosen)
            exact[b, h] = out[0, :, 0]
    return OutputSample(rows, exact)


def sample_gradients(inputs: Inputs, formula: Formula, seed: int = 0) -> GradientSample:
    """Exact gradients of sum(output * grad) for random key heads, with all their query heads; the blocks stay fixed."""
    batch, length, heads, _ = inputs.q.shape
    share = heads // inputs.k.shape[2]
    step = max(1, _CHUNK_BYTES // (4 * length * share * formula.options.block_q))
    blocks = torch.arange(formula.blocks.rows.shape[2]).split(step)
    exact = {}
    with full_precision(), torch.enable_grad():
        for b, g in picked(batch, inputs.k.shape[2], _GRADIENT_HEADS, torch.Generator().manual_seed(seed)):
            own = slice(g * share, (g + 1) * share)
            k, v = (x[b : b + 1, :, g : g + 1].float().requires_grad_() for x in (inputs.k, inputs.v))
            dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
            for chunk in blocks:
                rows = _rows_of(chunk, formula, length, inputs.q.device)
                q = inputs.q[b : b + 1, rows, own].float().requires_grad_()
                out = _reference(q, k, v, formula, b, own, chunk)
                grads = torch.autograd.grad(out, (q, k, v), inputs.grad[b : b + 1, rows, own].float())
                dq.append(grads[0][0])
                dk, dv = dk + grads[1], dv + grads[2]
            exact[b, g] = (torch.cat(dq), dk[0, :, 0].detach(), dv[0, :, 0].detach())
    return GradientSample(exact)


def router_gap(inputs: Inputs, formula: Formula, seed: int = 0) -> float:
    """How far the picked blocks fall short of the best ones, averaged over sampled query blocks.

    It is the mean score of the best less that of the picked, in standard deviations of a query block's scores. Ties and
    roundings cost next to nothing, random blocks about 2. Infinite if their number is not what ``keep`` says.
    """
    assert formula.router is not None, "there is a router to check"
    rows, count, _ = formula.blocks
    listed = torch.arange(rows.shape[-1], device=rows.device) < count[..., None]
    if bool((rows < 0)[listed].any()):
        return float("inf")
    chosen, options = _query_blocks(inputs, formula, seed), formula.options
    geometry = Geometry.of(inputs.q, inputs.k, options, formula.causal)
    picked = map_from_blocks(formula.blocks, geometry.n_k)
    seen, forced = (blocks[0, 0] for blocks in (geometry.visible(rows.device), geometry.forced(rows.device)))
    scores, gaps = _scores(inputs, formula.router, formula, chosen), []
    for place, row in enumerate(chosen.tolist()):
        own, must, read = scores[:, :, place, seen[row]], forced[row, seen[row]], picked[:, :, row]
        wanted = max(1, int(must.sum()), int(formula.keep * own.shape[-1] + 1e-4))
        if bool((read & ~seen[row]).any()) or bool((read.sum(-1) != wanted).any()):
            return float("inf")
        if wanted == own.shape[-1]:
            gaps.append(0.0)
            continue
        best = own.gather(-1, own.masked_fill(must, torch.inf).topk(wanted).indices).mean(-1)
        found = own[read[..., seen[row]]].unflatten(0, (*own.shape[:2], wanted)).mean(-1)
        gaps.append(((best - found) / own.std(-1)).mean().item())
    return sum(gaps) / len(gaps)


def _scores(inputs: Inputs, projections: tuple[Tensor, Tensor], formula: Formula, chosen: Tensor) -> Tensor:
    """Scores (B, H, chosen blocks of queries, N_k) in float32, from the means of blocks."""
    proj_q, proj_k = (proj.detach().float() for proj in projections)
    share = inputs.q.shape[2] // inputs.k.shape[2]
    with full_precision():
        blocks_of_q = inputs.q.split(formula.options.block_q, 1)
        pooled_q = torch.stack([blocks_of_q[i].float().mean(1) for i in chosen.tolist()], 2)
        pooled_k = torch.stack([x.float().mean(1) for x in inputs.k.split(formula.options.block_k, 1)], 2)
        if formula.options.smooth_k and not formula.causal:
            pooled_k = pooled_k - inputs.k.float().mean(1)[:, :, None]
        keys = (pooled_k @ proj_k).repeat_interleave(share, 1)
        return (pooled_q @ proj_q) @ keys.transpose(-1, -2)


def _query_blocks(inputs: Inputs, formula: Formula, seed: int) -> Tensor:
    n_q = formula.blocks.rows.shape[2]
    generator = torch.Generator().manual_seed(seed)
    between = 1 + torch.randperm(max(n_q - 2, 0), generator=generator)[: _BLOCKS - 2]
    return torch.cat([between, torch.tensor([0, n_q - 1])]).unique()  # rising: a short last block comes last


def _rows_of(blocks: Tensor, formula: Formula, length: int, device: torch.device) -> Tensor:
    """Rows of whole query blocks, (N,)."""
    size = formula.options.block_q
    rows = (blocks[:, None] * size + torch.arange(size)).flatten()
    return rows[rows < length].to(device)


def _reference(q: Tensor, k: Tensor, v: Tensor, formula: Formula, batch: int, heads: slice, chosen: Tensor) -> Tensor:
    """The reference on the queries of chosen blocks: q (1, N, R, D) of these heads, k and v (1, L, 1, D)."""
    if not formula.causal:
        return _reference_of(q, k, v, formula, batch, heads, chosen)
    parts, start, size = [], 0, formula.options.block_q
    for block in chosen:  # up to its last row: the rows of a call are aligned at the bottom right
        end = min((int(block) + 1) * size, k.shape[1])
        rows = end - int(block) * size
        own = q[:, start : start + rows]
        parts.append(_reference_of(own, k[:, :end], v[:, :end], formula, batch, heads, block[None]))
        start += rows
    return torch.cat(parts, 1)


def _reference_of(
    q: Tensor, k: Tensor, v: Tensor, formula: Formula, batch: int, heads: slice, chosen: Tensor
) -> Tensor:
    own, n_k = slice(batch, batch + 1), -(-k.shape[1] // formula.options.block_k)
    rows, count, linear = formula.blocks
    blocks = Blocks(
        rows[own, heads, chosen, :n_k],
        count[own, heads, chosen],
        None if linear is None else linear[own, heads, chosen, :n_k],
    )
    ratio = formula.ratio
    if ratio is not None:
        ratio = ratio.detach()[own if ratio.shape[0] > 1 else slice(None), heads]
        ratio = ratio[..., chosen] if ratio.shape[-1] > 1 else ratio
    proj = formula.proj
    if proj is not None:
        proj = (proj[0].detach(), None if proj[1] is None else proj[1].detach())
    options = replace(formula.options, precision="exact")
    return sparse_linear_reference(q, k, v, blocks, ratio, options, proj=proj, causal=formula.causal)[0]
