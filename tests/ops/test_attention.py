"""Dense attention: every kernel of this machine against loops, with masks, grouped heads, strides and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears import AttentionSpec, attention, explain
from allears.ops.attention import backends

KERNELS = ["reference", "sdpa", "sdpa-math", "sdpa-flash"]


def textbook(q, k, v, scale=None, look=None):
    """One query and head at a time, in float64; zeros where there is nothing to look at."""
    out = torch.zeros_like(q, dtype=torch.float64)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -math.inf, dtype=torch.float64)
    groups = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                logits = (k[b, :, h // groups].double() @ q[b, i, h].double()) * (scale or 1 / math.sqrt(q.shape[3]))
                if look is not None:
                    logits = logits.masked_fill(~look[b, h, i], -math.inf)
                if (logits > -math.inf).any():
                    out[b, i, h] = logits.softmax(0) @ v[b, :, h // groups].double()
                    lse[b, h, i] = logits.logsumexp(0)
    return out, lse


def tensors(queries, keys, heads=4, groups=2, size=8, dtype=torch.float32, batch=2):
    torch.manual_seed(queries * 31 + keys)
    return (
        torch.randn(batch, queries, heads, size, dtype=dtype),
        torch.randn(batch, keys, groups, size, dtype=dtype),
        torch.randn(batch, keys, groups, size, dtype=dtype),
    )


def assert_textbook(out, wanted):
    torch.testing.assert_close(out.double(), wanted, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (5, 13), (1, 9), (13, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_textbook(kernel, lengths, causal):
    q, k, v = tensors(*lengths)
    look = torch.ones(2, 4, *lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]) if causal else None
    out = attention(q, k, v, AttentionSpec(kernel=kernel, causal=causal, scale=0.3))
    assert_textbook(out, textbook(q, k, v, 0.3, look)[0])


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("length", [1, 63, 100])
@pytest.mark.parametrize("size", [5, 64, 256])
def test_odd_lengths_and_head_sizes_equal_the_reference(kernel, length, size):
    q, k, v = tensors(length, length + 37, size=size, batch=1)
    wanted = attention(q, k, v, AttentionSpec(kernel="reference", causal=True))
    torch.testing.assert_close(attention(q, k, v, AttentionSpec(kernel=kernel, causal=True)), wanted)


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("kernel", KERNELS)
def test_grouped_heads_share_keys_and_values(kernel, groups):
    q, k, v = tensors(6, 8, heads=6, groups=groups)
    wide = [x.repeat_interleave(6 // groups, dim=2) for x in (k, v)]
    assert_textbook(attention(q, k, v, AttentionSpec(kernel=kernel)), textbook(q, *wide)[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_stride(kernel):
    torch.manual_seed(4)
    q = torch.randn(2, 3, 8, 9).permute(0, 3, 1, 2)  # (2, 9, 3, 8), heads first in memory
    k = torch.randn(8, 2, 9, 3).permute(1, 2, 3, 0)  # D outermost: no unit stride
    v = torch.randn(1, 1, 3, 16)[..., ::2].expand(2, 9, 3, 8)
    assert_textbook(attention(q, k, v, AttentionSpec(kernel=kernel)), textbook(q, k, v)[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5, 9), (2, 1, 5, 9), (5, 9), (1, 1, 1, 9), (2, 4, 5, 1)])
def test_masks(kernel, causal, shape):
    q, k, v = tensors(5, 9)
    look = torch.rand(shape) > 0.4
    full = look.expand(2, 4, 5, 9)
    full = full & torch.ones(5, 9, dtype=torch.bool).tril(4) if causal else full
    wanted = textbook(q, k, v, look=full)[0]
    spec = AttentionSpec(kernel=kernel, causal=causal)
    assert_textbook(attention(q, k, v, spec, mask=look), wanted)
    assert_textbook(attention(q, k, v, spec, mask=torch.zeros(shape).masked_fill(~look, -math.inf)), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_added_mask_moves_the_logits(kernel):
    q, k, v = tensors(5, 9, groups=4)
    bias = torch.randn(4, 5, 9)
    wanted = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(8) + bias
    wanted = torch.einsum("bhlm,bmhd->blhd", wanted.double().softmax(-1), v.double())
    assert_textbook(attention(q, k, v, AttentionSpec(kernel=kernel), mask=bias), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_that_empties_a_row_gives_zeros_and_finite_gradients(kernel, kind):
    leaves = [x.requires_grad_() for x in tensors(5, 9)]
    look = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    look[0, 0, 2] = False
    mask = look if kind == "bool" else torch.zeros(look.shape).masked_fill(~look, -math.inf)
    out = attention(*leaves, AttentionSpec(kernel=kernel), mask=mask)
    assert_textbook(out, textbook(*leaves, look=look.expand(2, 4, 5, 9))[0])
    assert out[0, 2].abs().max() == 0
    out.square().sum().backward()
    assert leaves[0].grad[0, 2].abs().max() == 0
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_finite_bias_stays_finite_in_half_precision(kernel):
    """A row at float32's lowest finite value still looks at every key; it is not an empty row."""
    q, k, v = (x.half() for x in tensors(3, 4))
    v = v[:, :1].expand(v.shape)
    mask = torch.zeros(1, 1, 3, 4)
    mask[..., 1, :] = torch.finfo(torch.float32).min
    out = attention(q, k, v, AttentionSpec(kernel=kernel), mask=mask)
    torch.testing.assert_close(out, v[:, :1].repeat_interleave(2, dim=2).expand(out.shape), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kernel", KERNELS[1:])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_the_reference(kernel, masked):
    mask = torch.rand(2, 4, 6, 11) > 0.5 if masked else None
    grads = []
    for name in ("reference", kernel):
        leaves = [x.requires_grad_() for x in tensors(6, 11, dtype=torch.float64)]
        attention(*leaves, AttentionSpec(kernel=name, causal=True), mask=mask).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_reference_gradients_equal_differences():
    mask = torch.rand(1, 2, 3, 4) > 0.3
    mask[..., 1, :] = False
    leaves = [x.requires_grad_() for x in tensors(3, 4, heads=2, groups=1, size=2, dtype=torch.float64, batch=1)]

    def both(q, k, v):
        out, lse = attention(q, k, v, AttentionSpec(kernel="reference"), mask=mask, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(lambda *x: both(*x)[0], leaves)


def test_a_learned_bias_gets_its_gradient():
    grads = []
    for kernel in ("reference", "sdpa", "sdpa-math"):
        q, k, v = tensors(5, 9, dtype=torch.float64)
        bias = torch.linspace(-1, 1, 4 * 45, dtype=torch.float64).view(4, 5, 9).requires_grad_()
        attention(q, k, v, AttentionSpec(kernel=kernel), mask=bias).square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])
    assert "no gradient" in explain(q, k, v, mask=bias).refused["sdpa-flash"]


@pytest.mark.parametrize("kernel", ["reference", "sdpa-flash"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(7, 7), (5, 13), (6, 4)])
def test_lse(kernel, causal, lengths):
    q, k, v = tensors(*lengths)
    look = torch.rand(2, 4, *lengths) > 0.3
    full = look & torch.ones(lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]) if causal else look
    out, lse = attention(q, k, v, AttentionSpec(kernel=kernel, causal=causal), mask=look, return_lse=True)
    wanted = textbook(q, k, v, look=full)
    assert_textbook(out, wanted[0])
    assert_textbook(lse, wanted[1])
    assert lse.dtype == torch.float32
    plain = torch.einsum("blhd,bmhd->bhlm", q, k.repeat_interleave(2, dim=2)) / math.sqrt(8)
    torch.testing.assert_close(attention(q, k, v, return_lse=True)[1], plain.logsumexp(-1))


@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_lse_is_differentiable(used):
    """The flash kernel's gradient through the log-sum-exp against autograd through the formula."""
    grads = []
    for kernel in ("reference", "sdpa-flash"):
        leaves = [x.requires_grad_() for x in tensors(6, 9, dtype=torch.float64)]
        out, lse = attention(*leaves, AttentionSpec(kernel=kernel, causal=True, scale=0.7), return_lse=True)
        loss = out.square().sum() * (used != "lse") + lse.sin().sum() * (used != "out")
        loss.backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_two_halves_merge_through_their_lse():
    """Attention over all keys is the lse-weighted mean over two halves, as ring attention needs; gradients too."""
    whole, parts = ([x.requires_grad_() for x in tensors(5, 12, dtype=torch.float64)] for _ in range(2))
    wanted = attention(*whole)
    q, k, v = parts
    halves = [attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 5), slice(5, 12))]
    weights = torch.stack([lse for _, lse in halves]).softmax(0).transpose(-1, -2)[..., None]
    merged = sum(w * out for w, (out, _) in zip(weights, halves, strict=True))
    torch.testing.assert_close(merged, wanted)
    merged.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("keys", [0, 3])
def test_no_keys_gives_zeros_and_no_queries_nothing(keys):
    q, k, v = tensors(4, keys)
    if keys == 0:
        out, lse = attention(q, k, v, AttentionSpec(causal=True), return_lse=True)
        assert out.abs().max() == 0 and (lse == -math.inf).all()
        assert "no keys" in explain(q, k, v).refused["sdpa"]
    else:
        assert attention(q[:, :0], k, v).shape == (2, 0, 4, 8)
        assert attention(q[:0], k[:0], v[:0]).shape == (0, 4, 4, 8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_reach_what_looks_at_them_and_nothing_else(kernel, bad):
    q, k, v = tensors(4, 6, groups=4)
    wanted = attention(q, k, v, AttentionSpec(kernel=kernel))
    v = v.clone()
    v[1, 3, 2, 5] = bad
    out = attention(q, k, v, AttentionSpec(kernel=kernel))
    hit = torch.zeros(out.shape, dtype=torch.bool)
    hit[1, :, 2, 5] = True
    assert not out[hit].isfinite().any()
    torch.testing.assert_close(out[~hit], wanted[~hit])
    k = k.clone()
    k[0, 4, 1, 0] = math.nan
    out = attention(q, k, v, AttentionSpec(kernel=kernel))
    assert out[0, :, 1].isnan().all() and out[0, :, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_nan_query_touches_its_own_row_only(kernel):
    """torch's flash kernel for the CPU gives zeros for it, where the others give NaN."""
    q, k, v = tensors(4, 6, groups=4)
    q[0, 2, 1, 3] = math.nan
    out = attention(q, k, v, AttentionSpec(kernel=kernel))
    assert out[0, 2, 1].eq(0).all() if kernel in ("sdpa", "sdpa-flash") else out[0, 2, 1].isnan().all()
    assert out.isfinite().sum() >= out.numel() - 8 and out[0, [0, 1, 3]].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    groups=st.integers(1, 2),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "bool", "float"]),
    seed=st.integers(0, 99),
)
def test_kernels_agree(queries, keys, groups, causal, mask, seed):
    torch.manual_seed(seed)
    q = torch.randn(1, queries, 2 * groups, 6)
    k, v = torch.randn(2, 1, keys, groups, 6)
    look = torch.rand(1, 1, queries, keys) > 0.5
    given_mask = {"none": None, "bool": look, "float": torch.randn(look.shape).masked_fill(~look, -math.inf)}[mask]
    before = [x.clone() for x in (q, k, v)]
    outs = [attention(q, k, v, AttentionSpec(kernel=name, causal=causal), mask=given_mask) for name in KERNELS]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=2e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


def test_every_kernel_is_listed():
    names = [backend.name for backend in backends()]
    assert names == ["sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-math", "flash-attn-4", "reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn-4"])
@pytest.mark.parametrize("lengths", [(63, 63), (100, 163), (1, 77)])
@pytest.mark.parametrize("size", [64, 72, 128])
@pytest.mark.parametrize("lse", [False, True])
def test_gpu_kernels_equal_the_reference(kernel, lengths, size, lse):
    base = [x.cuda().bfloat16() for x in tensors(*lengths, size=size)]
    choice = explain(*base, AttentionSpec(causal=True), return_lse=lse)
    if kernel != choice.kernel and kernel not in choice.able:
        pytest.skip(choice.refused[kernel])
    results = []
    for name in ("reference", kernel):
        leaves = [x.detach().requires_grad_() for x in base]
        out = attention(*leaves, AttentionSpec(kernel=name, causal=True), return_lse=lse)
        loss = (out[0].float().square().sum() + out[1].sin().sum()) if lse else out.float().square().sum()
        loss.backward()
        results.append([*(out if lse else [out]), *(x.grad for x in leaves)])
    for a, b in zip(*results, strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm()
        assert error < 0.02
