"""Attention and its gradients in float32, on samples small enough for any length.

Outputs are checked on sampled rows of sampled heads, each against all its keys; gradients on all rows of sampled key
heads, in chunks of rows. B batch, L length, H query heads, G key heads, D head size, R = H / G, N sampled rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from allears.bench.attention.inputs import Inputs
from allears.core.device import matmul_precision

_ROWS, _HEADS = 256, 8  # sampled for the output
_GRADIENT_HEADS = 2  # key heads sampled for the gradients
_CHUNK_BYTES = 2**28  # of one matrix of logits


@dataclass(frozen=True)
class OutputSample:
    """Exact output (N, D) of each sampled (batch, head), at the rows (N,)."""

    rows: Tensor
    exact: dict[tuple[int, int], Tensor]

    def rel_err(self, out: Tensor) -> float:
        """Relative L2 error of an output (B, L, H, D) on the sample."""
        got = [out[b, self.rows, h] for b, h in self.exact]
        return _rel_err(got, list(self.exact.values()))


@dataclass(frozen=True)
class GradientSample:
    """Exact dq (L, R, D), dk (L, D), dv (L, D) of each sampled (batch, key head)."""

    exact: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]

    def rel_errs(self, dq: Tensor, dk: Tensor, dv: Tensor) -> dict[str, float]:
        """Relative L2 errors of gradients (B, L, H, D), (B, L, G, D), (B, L, G, D) on the sample."""
        share = dq.shape[2] // dk.shape[2]
        got_q = [dq[b, :, g * share : (g + 1) * share] for b, g in self.exact]
        exact_q, exact_k, exact_v = zip(*self.exact.values(), strict=True)
        return {
            "rel_err_dq": _rel_err(got_q, exact_q),
            "rel_err_dk": _rel_err([dk[b, :, g] for b, g in self.exact], exact_k),
            "rel_err_dv": _rel_err([dv[b, :, g] for b, g in self.exact], exact_v),
        }


def sample_output(inputs: Inputs, causal: bool, seed: int = 0) -> OutputSample:
    """Exact rows of the output: the first, the last and random ones between, of random heads."""
    batch, length, heads, _ = inputs.q.shape
    share = heads // inputs.k.shape[2]
    device = inputs.q.device
    generator = torch.Generator().manual_seed(seed)
    between = torch.randperm(length, generator=generator)[: _ROWS - 2]
    rows = torch.cat([between, torch.tensor([0, length - 1])]).unique().to(device)
    exact = {}
    with full_precision():
        for b, h in picked(batch, heads, _HEADS, generator):
            k, v = inputs.k[b, :, h // share].float(), inputs.v[b, :, h // share].float()
            probs = _probabilities(inputs.q[b, rows, h].float(), k, rows, causal)
            exact[b, h] = probs @ v
    return OutputSample(rows, exact)


def sample_gradients(inputs: Inputs, causal: bool, seed: int = 0) -> GradientSample:
    """Exact gradients of sum(output * grad) for random key heads, with all their query heads."""
    batch, _, heads, _ = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    share = heads // kv_heads
    generator = torch.Generator().manual_seed(seed)
    exact = {}
    with full_precision():
        for b, g in picked(batch, kv_heads, _GRADIENT_HEADS, generator):
            own = slice(g * share, (g + 1) * share)
            exact[b, g] = _head_gradients(
                inputs.q[b, :, own], inputs.k[b, :, g], inputs.v[b, :, g], inputs.grad[b, :, own], causal
            )
    return GradientSample(exact)


def _head_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, grad (L, R, D), k, v (L, D) -> dq (L, R, D), dk (L, D), dv (L, D), all float32."""
    length, share, head_dim = q.shape
    k, v = k.float(), v.float()
    scale = head_dim**-0.5
    dq, dk, dv = q.new_zeros(q.shape, dtype=torch.float32), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, _CHUNK_BYTES // (4 * length))
    for r in range(share):
        for start in range(0, length, step):
            rows = torch.arange(start, min(start + step, length), device=q.device)
            q_rows, grad_rows = q[rows, r].float(), grad[rows, r].float()
            probs = _probabilities(q_rows, k, rows, causal)
            mean = ((probs @ v) * grad_rows).sum(-1, keepdim=True)
            grad_logits = probs * (grad_rows @ v.T - mean) * scale
            dq[rows, r] = grad_logits @ k
            dk += grad_logits.T @ q_rows
            dv += probs.T @ grad_rows
    return dq, dk, dv


def _probabilities(q: Tensor, k: Tensor, rows: Tensor, causal: bool) -> Tensor:
    """Softmax of the rows of q (N, D) on k (L, D): (N, L)."""
    logits = (q @ k.T) * k.shape[-1] ** -0.5
    if causal:
        logits.masked_fill_(torch.arange(len(k), device=k.device) > rows[:, None], -torch.inf)
    return logits.softmax(-1)


def picked(batch: int, heads: int, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    chosen = torch.randperm(batch * heads, generator=generator)[:count].tolist()
    return [divmod(index, heads) for index in chosen]


def _rel_err(got: list[Tensor], exact: list[Tensor] | tuple[Tensor, ...]) -> float:
    error = sum(((a.float() - b) ** 2).sum().item() for a, b in zip(got, exact, strict=True))
    return (error / sum((b**2).sum().item() for b in exact)) ** 0.5


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without TF32, whatever the process has set."""
    with matmul_precision("highest"), torch.no_grad():
        yield
