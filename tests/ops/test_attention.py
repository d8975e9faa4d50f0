import math

import pytest
import torch

from allears import AttentionSpec, attention, explain
from allears.ops.attention import backends


def textbook(q, k, v, scale=None, look=None):
    """One query and head at a time, in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    groups = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                logits = (k[b, :, h // groups].double() @ q[b, i, h].double()) * (scale or 1 / math.sqrt(q.shape[3]))
                if look is not None:
                    logits = logits.masked_fill(~look[b, h, i], -math.inf)
                out[b, i, h] = logits.softmax(0) @ v[b, :, h // groups].double()
    return out


def tensors(queries, keys, heads=4, groups=2, size=8, dtype=torch.float32):
    torch.manual_seed(queries * 31 + keys)
    return (
        torch.randn(2, queries, heads, size, dtype=dtype),
        torch.randn(2, keys, groups, size, dtype=dtype),
        torch.randn(2, keys, groups, size, dtype=dtype),
    )


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (5, 13)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_textbook(kernel, lengths, causal):
    q, k, v = tensors(*lengths)
    look = torch.ones(2, 4, *lengths, dtype=torch.bool).tril(lengths[1] - lengths[0]) if causal else None
    out = attention(q, k, v, AttentionSpec(kernel=kernel, causal=causal, scale=0.3))
    torch.testing.assert_close(out.double(), textbook(q, k, v, 0.3, look), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_masks(kernel):
    q, k, v = tensors(5, 9)
    look = torch.rand(2, 1, 5, 9) > 0.4
    look[..., 0] = True
    wanted = textbook(q, k, v, look=look.expand(2, 4, 5, 9))
    spec = AttentionSpec(kernel=kernel)
    torch.testing.assert_close(attention(q, k, v, spec, mask=look).double(), wanted, atol=2e-6, rtol=1e-5)
    added = torch.zeros(look.shape).masked_fill(~look, -math.inf)
    torch.testing.assert_close(attention(q, k, v, spec, mask=added).double(), wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_and_causal_together(kind):
    q, k, v = tensors(5, 9)
    look = torch.rand(2, 4, 5, 9) > 0.4
    look[..., 0] = True
    wanted = textbook(q, k, v, look=look & torch.ones(5, 9, dtype=torch.bool).tril(4))
    mask = look if kind == "bool" else torch.zeros(look.shape).masked_fill(~look, -math.inf)
    for kernel in ("reference", "sdpa"):
        out = attention(q, k, v, AttentionSpec(kernel=kernel, causal=True), mask=mask)
        torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=1e-5)


def test_gradients_agree():
    grads = []
    for kernel in ("reference", "sdpa"):
        leaves = [x.requires_grad_() for x in tensors(6, 11, dtype=torch.float64)]
        attention(*leaves, AttentionSpec(kernel=kernel, causal=True)).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_queries_without_keys_are_refused_or_zero():
    q, k, v = tensors(6, 4)
    choice = explain(q, k, v, AttentionSpec(causal=True))
    assert choice.kernel == "reference" and "NaN" in choice.refused["sdpa"]
    assert attention(q, k, v, AttentionSpec(causal=True))[:, :2].abs().max() == 0
    with pytest.raises(ValueError, match="cannot run this call"):
        attention(q, k, v, AttentionSpec(kernel="sdpa", causal=True))


def test_inputs_are_not_changed_and_compile_is_whole():
    q, k, v = tensors(6, 6)
    before = [x.clone() for x in (q, k, v)]
    eager = attention(q, k, v)
    compiled = torch.compile(lambda *x: attention(*x), fullgraph=True, backend="eager")(q, k, v)
    torch.testing.assert_close(compiled, eager)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q: shape"),
        (lambda q, k, v: (q, k, v[:, 1:]), "v: shape"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), "k: shape"),
        (lambda q, k, v: (q[:, :, :3], k, v), "do not divide"),
        (lambda q, k, v: (q.half(), k, v), "dtypes"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*tensors(4, 4)))


def test_bad_mask_and_kernel():
    q, k, v = tensors(4, 4)
    with pytest.raises(ValueError, match="does not broadcast"):
        attention(q, k, v, mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="dtype"):
        attention(q, k, v, mask=torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="known are auto"):
        attention(q, k, v, AttentionSpec(kernel="fast"))
    with pytest.raises(ValueError, match="scale"):
        AttentionSpec(scale=0.0)
    assert {backend.name for backend in backends()} == {"sdpa", "reference"}
