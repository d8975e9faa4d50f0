"""What surrounds the GPU kernels (offsets, padded heads, gradients of the log-sum-exp), with the place of the kernels
taken by the reference on the CPU.
"""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from allears import AttentionSpec, attention
from allears.ops.attention.call import Packing
from allears.ops.attention.dense import flash, flash4, sdpa


def packed_reference(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    """As flash kernels: offsets int32, head sizes in steps of 8, +inf for a query without keys."""
    assert q.shape[-1] % 8 == 0 and cu_q.dtype == cu_k.dtype == torch.int32
    spec = AttentionSpec(kernel="reference", causal=causal, scale=scale)
    offsets = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    out, lse = attention(q, k, v, spec, **offsets, return_lse=True)
    return out, lse.masked_fill(lse == -math.inf, math.inf)


def tensors(queries, keys, size, batch=2):
    torch.manual_seed(queries + keys + size)
    q = torch.randn(batch, queries, 4, size, dtype=torch.float64)
    k, v = torch.randn(2, batch, keys, 2, size, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (5, 13), (6, 2)])
def test_flash_gpu_on_a_dense_batch(monkeypatch, size, causal, lengths):
    monkeypatch.setattr(sdpa, "flash_packed", packed_reference)
    q, k, v = tensors(*lengths, size)
    out, lse = sdpa._flash_gpu(q, k, v, None, causal, 0.4, True)
    wanted = attention(q, k, v, AttentionSpec("reference", causal, 0.4), return_lse=True)
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1])
    assert torch.equal(sdpa._flash_gpu(q, k, v, None, causal, 0.4, False), out)


@pytest.mark.parametrize("size", [5, 16])
def test_flash_gpu_on_packed_sequences(monkeypatch, size):
    monkeypatch.setattr(sdpa, "flash_packed", packed_reference)
    q, k, v = (x.flatten(0, 1) for x in tensors(6, 9, size))
    packing = Packing(torch.tensor([0, 5, 12]).int(), torch.tensor([0, 3, 18]).int(), 7, 15)
    out, lse = sdpa._flash_gpu(q, k, v, packing, True, 0.4, True)
    wanted = attention(q, k, v, AttentionSpec("reference", True, 0.4), **packing._asdict(), return_lse=True)
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1])
    assert (lse == -math.inf).sum() == 4 * 2  # the first sequence has two queries more than keys


@pytest.mark.parametrize("used", [(1, 0), (0, 1), (1, 1)])
def test_gradient_formula_of_the_packed_operator(monkeypatch, used):
    """The kernel's backward stood in by its textbook form; what is tested is what is made of it for dlse."""
    q, k, v = (x.flatten(0, 1).requires_grad_() for x in tensors(5, 8, 8))
    cu_q, cu_k, rest = torch.tensor([0, 4, 10]).int(), torch.tensor([0, 9, 16]).int(), (6, 9, True, 0.4)

    def backward(grad, q, k, v, cu_q, cu_k, out, lse, max_q, max_k, causal, scale):
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for (a, b), (c, d) in zip(((0, 4), (4, 10)), ((0, 9), (9, 16)), strict=True):
            look = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
            for h in range(4):
                g = h // 2
                scores = (q[a:b, h] @ k[c:d, g].T * scale).masked_fill(~look, -math.inf)
                p = (scores - lse[h, a:b, None]).exp()
                delta = (grad[a:b, h] * out[a:b, h]).sum(-1, keepdim=True)
                ds = p * (grad[a:b, h] @ v[c:d, g].T - delta)
                grads[0][a:b, h] += scale * ds @ k[c:d, g]
                grads[1][c:d, g] += scale * ds.T @ q[a:b, h]
                grads[2][c:d, g] += p.T @ grad[a:b, h]
        return grads

    monkeypatch.setattr(flash, "flash_packed_backward", backward)
    out, lse = packed_reference(q, k, v, cu_q, cu_k, *rest)
    g_out, g_lse = (torch.randn_like(x) if on else None for x, on in zip((out, lse), used, strict=True))
    loss = sum((x * g).sum() for x, g in ((out, g_out), (lse, g_lse)) if g is not None)
    wanted = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
    saved = [x.detach() for x in (q, k, v, cu_q, cu_k, out, lse)]
    grads = flash._flash_packed_gradient(SimpleNamespace(saved_tensors=saved, rest=rest), g_out, g_lse)
    assert len(grads) == 9 and all(x is None for x in grads[3:])
    for a, b in zip(grads[:3], wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)


@pytest.fixture
def package(monkeypatch):
    """A stand-in for flash_attn.cute with its documented arguments and results."""
    module = ModuleType("flash_attn.cute")

    def dense(q, k, v, *, softmax_scale, causal, return_lse):
        assert return_lse and q.shape[-1] % 8 == 0
        return attention(q, k, v, AttentionSpec("reference", causal, softmax_scale), return_lse=True)

    def varlen(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, return_lse):
        assert return_lse
        return packed_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)

    module.flash_attn_func, module.flash_attn_varlen_func = dense, varlen
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)


@pytest.mark.parametrize("size", [6, 16])
def test_flash4_pads_heads_and_keeps_the_scale(package, size):
    q, k, v = tensors(5, 13, size)
    out, lse = flash4.flash4_attention(q, k, v, causal=True, return_lse=True)
    wanted = attention(q, k, v, AttentionSpec("reference", True), return_lse=True)
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1])


def test_flash4_packed(package):
    q, k, v = (x.flatten(0, 1) for x in tensors(6, 9, 6))
    packing = Packing(torch.tensor([0, 5, 12]).int(), torch.tensor([0, 3, 18]).int(), 7, 15)
    out, lse = flash4.flash4_attention(q, k, v, causal=True, scale=0.4, return_lse=True, **packing._asdict())
    wanted = attention(q, k, v, AttentionSpec("reference", True, 0.4), **packing._asdict(), return_lse=True)
    torch.testing.assert_close(out, wanted[0])
    torch.testing.assert_close(lse, wanted[1])
