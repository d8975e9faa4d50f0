"""Sparse-linear attention query by query in float64, written apart from the library; and random calls of it."""

import math

import torch

from allears.ops.attention.sparse_linear import Geometry, SparseLinear, blocks_from_map


def features(x, kind):
    if kind == "softmax":
        e = torch.exp(x - x.max(-1, keepdim=True).values)
        return e / e.sum(-1, keepdim=True)
    return torch.where(x > 0, x + 1, x.exp()) if kind == "elu" else x.clamp(min=0) + 1e-6


def textbook(q, k, v, map, ratio, options, *, proj=None, causal=False, scale=None, linear=None):
    """q (B, L_q, H, D), k and v (B, L_k, G, D), map and linear (B, H, N_q, N_k) bool, ratio (B, H, N_q).

    Returns float64 output and the log-sum-exp of the selected keys.
    """
    q, k, v = q.double(), k.double(), v.double()
    (batch, queries, heads, size), keys, shared = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    scale = scale or 1 / math.sqrt(size)
    bare = k - k.mean(1, keepdim=True) if options.smooth_k and not causal else k
    place = torch.arange(keys)
    of_key = place // options.block_k
    out, lse = torch.zeros_like(q), torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(queries)):
        block, g = i // options.block_q, h // shared
        last_row = min((block + 1) * options.block_q, queries) - 1
        chosen = map[b, h, block, of_key]
        exact = chosen & (place <= i + keys - queries) if causal else chosen
        rest = ~chosen if linear is None else linear[b, h, block, of_key]
        if causal:  # a block that is not selected is visible in full, or not at all
            rest = rest & (place <= last_row + keys - queries)
        sparse = linear_out = torch.zeros(size, dtype=torch.float64)
        if exact.any():
            logits = scale * k[b, exact, g] @ q[b, i, h]
            sparse = torch.softmax(logits, 0) @ v[b, exact, g]
            lse[b, h, i] = torch.logsumexp(logits, 0)
        if rest.any():
            products = features(bare[b, rest, g], options.feature_map) @ features(q[b, i, h], options.feature_map)
            linear_out = products @ v[b, rest, g] / products.sum()
        if options.form == "sparse" or not rest.any():
            out[b, i, h] = sparse
        elif options.form == "sla":
            out[b, i, h] = sparse + proj[0].double() @ linear_out + (0 if proj[1] is None else proj[1].double())
        else:
            share = ratio[b, h, block].double()
            out[b, i, h] = share * sparse + (1 - share) * linear_out
    return out, lse


def operands(queries, keys, heads=4, groups=2, size=8, batch=1, dtype=torch.float64, seed=0):
    """q, k, v; keys with a mean that smoothing would take off."""
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads, size, generator=made, dtype=dtype)
    k = torch.randn(batch, keys, groups, size, generator=made, dtype=dtype) + 1.5
    return q, k, torch.randn(batch, keys, groups, size, generator=made, dtype=dtype)


def random_map(q, k, options, causal=False, density=0.4, seed=1):
    """(B, H, N_q, N_k) bool: what a router may select, with at least one block where there is any."""
    geometry = Geometry.of(q, k, options, causal)
    made = torch.Generator().manual_seed(seed)
    drawn = torch.rand(q.shape[0], q.shape[2], geometry.n_q, geometry.n_k, generator=made)
    map = (drawn < density) | geometry.forced()
    if geometry.n_k:
        best = drawn.masked_fill(~geometry.visible(), 2.0).argmin(-1, keepdim=True)
        map = map.scatter(-1, best, True)
    return map & geometry.visible()


def random_blocks(q, k, options, causal=False, **how):
    return blocks_from_map(random_map(q, k, options, causal, **how))


def random_ratio(q, options, seed=2):
    """(B, H, N_q) in (0.2, 0.9)."""
    shape = (q.shape[0], q.shape[2], -(-q.shape[1] // options.block_q))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=q.dtype) * 0.7 + 0.2


def plain(**choices):
    return SparseLinear(**{"block_q": 64, **choices})
