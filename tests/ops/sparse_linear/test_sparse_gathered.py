"""Sparse-linear attention by gathered blocks equals the reference, in values and gradients."""

import pytest
import torch

from allears.ops.attention.sparse_linear import (
    SparseLinear,
    explain_sparse_linear,
    select_top_k,
    sla_blocks,
    sparse_linear_attention,
)
from allears.ops.attention.sparse_linear.blocks import Geometry

SHAPES = [(256, 256, 4, 4), (200, 291, 4, 2), (70, 130, 2, 1), (1, 64, 2, 2), (129, 1, 2, 2)]


def problem(shape, form, keep, seed=0, dtype=torch.float64):
    l_q, l_k, heads, kv_heads = shape
    draws = torch.Generator().manual_seed(seed)
    q = torch.randn(2, l_q, heads, 16, generator=draws, dtype=dtype)
    k, v = (torch.randn(2, l_k, kv_heads, 16, generator=draws, dtype=dtype) + 0.5 for _ in range(2))
    geometry = Geometry(l_q, l_k, 64, 64)
    scores = torch.randn(2, heads, geometry.n_q, geometry.n_k, generator=draws)
    if form == "sla":
        blocks = sla_blocks(scores, keep, 0.3, geometry=geometry)
    else:
        blocks = select_top_k(scores, keep, geometry=geometry)
    more = {"options": SparseLinear(form=form, block_q=64)}
    if form == "sla2":
        more["ratio"] = torch.rand(heads, 1, generator=draws, dtype=dtype)
    if form == "sla":
        more["proj"] = (torch.randn(16, 16, generator=draws, dtype=dtype), None)
    return (q, k, v, blocks), more


@pytest.mark.parametrize("form", ["sla2", "sla", "sparse"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference(shape, form, keep):
    (q, k, v, blocks), more = problem(shape, form, keep)
    found = []
    for kernel in ("gathered", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = sparse_linear_attention(*leaves, blocks, kernel=kernel, return_lse=True, **more)
        grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
        found.append((out.detach(), lse.detach(), *grads))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def test_the_door_takes_it_on_a_cpu_and_says_why_not():
    (q, k, v, blocks), more = problem((128, 128, 2, 2), "sla2", 0.5, dtype=torch.float32)
    assert explain_sparse_linear(q, k, v, blocks, **more).kernel == "gathered"
    low = {**more, "options": SparseLinear(block_q=64, precision="int8_fp8")}
    choice = explain_sparse_linear(q, k, v, blocks, **low)
    assert choice.kernel == "reference" and "full precision only" in choice.refused["gathered"]
    with pytest.raises(ValueError, match="kernel: 'gathered' cannot run this call"):
        sparse_linear_attention(q, k, v, blocks, kernel="gathered", **low)
    bad = blocks._replace(rows=blocks.rows + 5)
    with pytest.raises(ValueError, match="outside 0 to 1"):
        sparse_linear_attention(q, k, v, bad, **more)
    half = sparse_linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), blocks, **more)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), sparse_linear_attention(q, k, v, blocks, **more), atol=0.03, rtol=0.03)
