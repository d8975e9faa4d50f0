"""Attention in 8 and 4 bits one query, head and tile at a time, in float64: what the references must equal.

The quantisers are the library's (their own test is ``test_quantise.py``); everything else is written again.
"""

import math

import torch

TILE = 128


def inputs(queries, keys, heads=2, groups=1, size=16, batch=1, dtype=torch.float32, seed=0, offset=1.0):
    """q, k with a channel offset, v."""
    generator = torch.Generator().manual_seed(seed + 31 * queries + keys)
    shapes = ((batch, queries, heads, size), (batch, keys, groups, size), (batch, keys, groups, size))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q.to(dtype), (k + offset * torch.randn(size, generator=generator)).to(dtype), v.to(dtype)


def seen_keys(query, queries, keys, causal):
    return max(0, min(keys, query + keys - queries + 1)) if causal else keys


def attend(logits_of, product, queries, keys, heads, size, causal):
    """Output and log-sum-exp of one batch entry. ``logits_of(h, i)`` gives (L_k), ``product(h, weights, tile)`` (D)."""
    out = torch.zeros(queries, heads, size, dtype=torch.float64)
    lse = torch.full((heads, queries), -math.inf, dtype=torch.float64)
    for h in range(heads):
        for i in range(queries):
            logits = logits_of(h, i)[: seen_keys(i, queries, keys, causal)]
            top, total, row = -math.inf, 0.0, torch.zeros(size, dtype=torch.float64)
            for start in range(0, len(logits), TILE):
                part = logits[start : start + TILE]
                new = max(top, part.max().item())
                weights = torch.zeros(min(TILE, keys - start), dtype=torch.float64)
                weights[: len(part)] = (part - new).exp()
                row = row * math.exp(top - new) + product(h, weights, slice(start, start + TILE))
                total = total * math.exp(top - new) + weights.sum().item()
                top = new
            if total:
                out[i, h], lse[h, i] = row / total, top + math.log(total)
    return out, lse


def dense(q, k, v, causal=False, scale=None, d_out=None, d_lse=None):
    """Output and log-sum-exp in float64, and the gradients by autograd if ``d_out`` is given."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ratio = q.shape[2] // k.shape[2]
    wide_k, wide_v = (x.repeat_interleave(ratio, dim=2) for x in leaves[1:])
    logits = torch.einsum("blhd,bnhd->bhln", leaves[0], wide_k) * (scale or 1 / math.sqrt(q.shape[3]))
    if causal:
        hidden = ~torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        logits = logits.masked_fill(hidden, -math.inf)
    blind = (logits == -math.inf).all(-1)
    weights = logits.masked_fill(blind.unsqueeze(-1), 0.0).softmax(-1).masked_fill(blind.unsqueeze(-1), 0.0)
    out = torch.einsum("bhln,bnhd->blhd", weights, wide_v)
    lse = logits.masked_fill(blind.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(blind, -math.inf)
    if d_out is None:
        return out.detach(), lse.detach()
    loss = (out * d_out.double()).sum()
    if d_lse is not None:
        loss = loss + (lse.masked_fill(blind, 0.0) * d_lse.double()).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)


def rel(got, wanted):
    """Relative L2 error."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
