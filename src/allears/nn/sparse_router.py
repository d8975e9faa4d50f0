"""What sparse-linear attention learns beside the model: which key blocks a query block reads, and how its two branches
mix (SLA2, arXiv 2602.12675).

Shapes: B batch (S sequences of a packed one), H query heads, G key/value heads, D head size, N_q and N_k blocks of
queries and keys.
"""

import torch
from torch import Tensor, nn

from allears.ops.attention.sparse_linear.scores import projected_scores

_LOWEST_RATIO = 0.01


class BlockRouter(nn.Module):
    """Scores of key blocks for query blocks: scale * (P_q mean q) . (P_k mean k), with a P for each head.

    The projections start as the identity, which is the router of SLA (arXiv 2509.24006) and SpargeAttn.

    Args:
        heads, head_dim: H and D.
        kv_heads: G; ``None``: G = H.
    """

    def __init__(self, heads: int, head_dim: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.proj_q = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.proj_k = nn.Parameter(torch.eye(head_dim).repeat(kv_heads or heads, 1, 1))

    def forward(self, q_pool: Tensor, k_pool: Tensor, scale: float, k_mean: Tensor | None = None) -> Tensor:
        """q_pool (B, H, N_q, D), k_pool (B, G, N_k, D) of smoothed keys, or of keys beside their mean k_mean (B, G, D),
        to logits (B, H, N_q, N_k) in float32."""
        if not torch.is_autocast_enabled(q_pool.device.type):  # a context takes longer than some of the kernels
            return projected_scores(q_pool, k_pool, k_mean, self.proj_q.float(), self.proj_k.float(), scale)
        with torch.autocast(q_pool.device.type, enabled=False):
            return projected_scores(q_pool, k_pool, k_mean, self.proj_q.float(), self.proj_k.float(), scale)


class MixingRatio(nn.Module):
    """The share of the exact branch, in (0, 1): a logit a head, and, if asked for, a linear form of the pooled query.

    Args:
        heads, head_dim: H and D.
        of_query: let the ratio depend on the block of queries (the paper leaves the shape open: N, N / block or less).
        start: the ratio at the beginning.
    """

    def __init__(self, heads: int, head_dim: int, of_query: bool = False, start: float = 0.9) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.logit(torch.full((heads,), start)))
        self.weight = nn.Parameter(torch.zeros(heads, head_dim)) if of_query else None

    def forward(self, q_pool: Tensor | None = None) -> Tensor:
        """(1, H, 1), or from q_pool (B, H, N_q, D) the ratio of each block (B, H, N_q), in float32.

        Raises:
            ValueError: the ratio depends on the query and there is none.
        """
        logit = self.logit.float()[None, :, None]
        if self.weight is None:
            return torch.sigmoid(logit)
        if q_pool is None:
            raise ValueError("q_pool: None given, but this ratio depends on the query; give the pooled queries")
        return torch.sigmoid(logit + (q_pool.float() * self.weight.float()[None, :, None]).sum(-1))

    @property
    def trains(self) -> bool:
        """Whether one of its parameters takes gradients."""
        return self.logit.requires_grad or (self.weight is not None and self.weight.requires_grad)

    @torch.no_grad()
    def set(self, ratio: Tensor) -> None:
        """Start from a ratio a head (H,), brought into 0.01 to 0.99."""
        self.logit.copy_(torch.logit(ratio.float().clamp(_LOWEST_RATIO, 1 - _LOWEST_RATIO)))
        if self.weight is not None:
            self.weight.zero_()
