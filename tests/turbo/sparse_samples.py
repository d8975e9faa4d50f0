"""Queries, keys and values whose important blocks do not show in the plain means of their rows."""

import torch

from allears.turbo.sparse import Sample


def misleading(seed: int, blocks: int = 8, heads: int = 2) -> Sample:
    """(64 * blocks, heads, 8) each. In a hot block the keys are +-4 in channel 0, which its mean hides and channel 1
    tells; channels 2 to 5 have a mean of their own in each block, which says nothing.
    """
    draws = torch.Generator().manual_seed(seed)
    length = 64 * blocks
    q, k = (0.3 * torch.randn(length, heads, 8, generator=draws) for _ in range(2))
    v = torch.randn(length, heads, 8, generator=draws)
    sign = torch.where(torch.arange(length) % 2 == 0, 1.0, -1.0)[:, None]
    hot = torch.zeros(blocks, heads)
    for head in range(heads):
        hot[torch.randperm(blocks, generator=draws)[:2], head] = 1.0
    hot = hot.repeat_interleave(64, 0)
    k[..., 0] += 4 * sign * hot
    k[..., 1] += hot - 0.5
    k[..., 2:6] += torch.randn(blocks, heads, 4, generator=draws).repeat_interleave(64, 0)
    q[..., 0] += 3 * sign
    q[..., 1:6] += 0.7
    return Sample(q, k, v)
