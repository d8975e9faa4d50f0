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
from allears.ops.attention.sparse_linear.blocks import Blocks
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
        keep: share of the key blocks that it is to pick; read with ``router``.
    """

    blocks: Blocks
    options: SparseLinear
    ratio: Tensor | None = None
    proj: tuple[Tensor, Tensor | None] | None = None
    router: tuple[Tensor, Tensor] | None = None
    keep: float = 1.0


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
    chosen = _query_blocks(inputs, formula, seed)
    proj_q, proj_k = (proj.detach().float() for proj in formula.router)
    share = inputs.q.shape[2] // inputs.k.shape[2]
    with full_precision():
        blocks_of_q = inputs.q.split(formula.options.block_q, 1)
        pooled_q = torch.stack([blocks_of_q[i].float().mean(1) for i in chosen.tolist()], 2)
        pooled_k = torch.stack([x.float().mean(1) for x in inputs.k.split(formula.options.block_k, 1)], 2)
        pooled_k = pooled_k - inputs.k.float().mean(1)[:, :, None]
        keys = (pooled_k @ proj_k).repeat_interleave(share, 1)
        scores = (pooled_q @ proj_q) @ keys.transpose(-1, -2)
        count = max(1, int(formula.keep * scores.shape[-1] + 1e-4))
        own = formula.blocks.rows[:, :, chosen, :count]
        if bool((formula.blocks.count[:, :, chosen] != count).any()) or own.shape[-1] < count or bool((own < 0).any()):
            return float("inf")
        best = scores.topk(count).values.mean(-1)
        return ((best - scores.gather(-1, own.long()).mean(-1)) / scores.std(-1)).mean().item()


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
    own = slice(batch, batch + 1)
    rows, count, linear = formula.blocks
    blocks = Blocks(
        rows[own, heads, chosen], count[own, heads, chosen], None if linear is None else linear[own, heads, chosen]
    )
    ratio = formula.ratio
    if ratio is not None:
        ratio = ratio.detach()[own if ratio.shape[0] > 1 else slice(None), heads]
        ratio = ratio[..., chosen] if ratio.shape[-1] > 1 else ratio
    proj = formula.proj
    if proj is not None:
        proj = (proj[0].detach(), None if proj[1] is None else proj[1].detach())
    options = replace(formula.options, precision="exact")
    return sparse_linear_reference(q, k, v, blocks, ratio, options, proj=proj)[0]
