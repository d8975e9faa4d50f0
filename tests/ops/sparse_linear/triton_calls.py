"""Calls of the Triton kernels that several tests make.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed: T tokens of S sequences.
"""

import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

DEVICE = "cuda" if ON_GPU else "cpu"


def offsets(*lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def random_map(geometry, entries, heads, keep, seed=0):
    """(E, H, N_q, N_k) bool: about a share ``keep`` of the visible blocks, the forced ones, and at least one."""
    made = torch.Generator().manual_seed(seed)
    noise = torch.rand(entries, heads, geometry.n_q, geometry.n_k, generator=made).to(DEVICE)
    seen = geometry.visible(noise.device)
    best = noise.masked_fill(~seen, -1.0)
    picked = (noise < keep) | (best == best.amax(-1, keepdim=True)) if geometry.n_k else noise < keep
    return (picked | geometry.forced(noise.device)) & seen


def rel(got, wanted):
    """Relative L2 error."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
