"""SoftTop-k: a mask in (0, 1) with a fixed sum for each row, and its exact gradient (SLA2, arXiv 2602.12675).

Shapes: ... any leading sizes, N entries of a row.
"""

from typing import Any

import torch
from torch import Tensor

_HALVINGS = 50  # of a bracket of at most some 1e5, to float64's last digits


def soft_top_k(
    scores: Tensor, budget: float | Tensor, temperature: float = 0.1, visible: Tensor | None = None
) -> Tensor:
    """sigmoid(scores / temperature + lambda), lambda by bisection such that each row sums to ``budget``.

    The gradient is that of the whole map, lambda included (implicit differentiation): with s = m (1 - m), the
    derivative of m_i by score_j is (s_i [i = j] - s_i s_j / sum s) / temperature, so a gradient step keeps the sum.

    Args:
        scores: (..., N) floating.
        budget: sum of a row, a number or (...); at least the number of visible entries makes all of them 1. Without
            gradient.
        temperature: positive; towards 0 the mask becomes the hard top-k.
        visible: broadcastable to (..., N) bool; other entries are 0 and take no part. All if None.

    Returns:
        (..., N) in [0, 1], in the dtype of ``scores``.

    Raises:
        ValueError: ``temperature`` is not positive, the budget is a negative number, or a gradient is asked for it.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} given; it must be positive")
    if isinstance(budget, Tensor) and budget.requires_grad:
        raise ValueError("budget: it has no gradient; give it detached")
    if not isinstance(budget, Tensor) and budget < 0:
        raise ValueError(f"budget: {budget} given; it must be at least 0")
    wanted = torch.as_tensor(budget, device=scores.device, dtype=torch.float64).expand(scores.shape[:-1])
    seen = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand(scores.shape)
    return _SoftTopK.apply(scores, wanted, temperature, seen)


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, budget: Tensor, temperature: float, visible: Tensor) -> Tensor:
        mask = _solve(scores.double() / temperature, budget, visible)
        ctx.save_for_backward(mask)
        ctx.temperature = temperature
        return mask.to(scores.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mask: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        (mask,) = ctx.saved_tensors
        slope = mask * (1 - mask)
        total = slope.sum(-1, keepdim=True)
        weighted = slope * d_mask.double()
        common = weighted.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1.0)
        return ((weighted - slope * common) / ctx.temperature).to(d_mask.dtype), None, None, None


def _solve(logits: Tensor, budget: Tensor, visible: Tensor) -> Tensor:
    """(..., N) float64 of logits (..., N) and budgets (...); 0 where not visible."""
    if logits.shape[-1] == 0:
        return logits
    count = visible.sum(-1, keepdim=True)
    share = (budget[..., None] / count.clamp(min=1)).clamp(0.0, 1.0)
    middle = share.clamp(1e-12, 1 - 1e-12).logit()  # lambda if all logits were 0
    low = middle - logits.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    high = middle - logits.masked_fill(~visible, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0)
    wanted = share * count
    for _ in range(_HALVINGS):
        guess = (low + high) / 2
        over = ((logits + guess).sigmoid() * visible).sum(-1, keepdim=True) > wanted
        low, high = torch.where(over, low, guess), torch.where(over, guess, high)
    mask = (logits + (low + high) / 2).sigmoid()
    mask = torch.where(share >= 1, torch.ones_like(mask), torch.where(share <= 0, torch.zeros_like(mask), mask))
    return mask * visible
