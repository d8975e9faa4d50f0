"""Smoothed queries of SageBwd by the Triton kernels, in the interpreter, against the reference.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size, M blocks of 128 queries.
"""

import math
import os

import pytest
import torch
from tests.ops.lowbit.test_sagebwd_smooth_q import with_offsets
from tests.ops.lowbit.textbook import dense, inputs, rel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.attention.lowbit import sagebwd_reference as reference  # noqa: E402
from allears.ops.attention.lowbit import smooth, triton_host, triton_smooth_q  # noqa: E402
from allears.ops.attention.lowbit.options import LowBit  # noqa: E402
from allears.ops.attention.lowbit.triton_host import Launch, sagebwd_backward, sagebwd_forward  # noqa: E402
from allears.ops.attention.lowbit.triton_quant import quantise_keys_values, sizes_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-3  # an integer that lies between two values may round to either, as sums are taken in another order
pytestmark = pytest.mark.usefixtures("poison")


def problem(queries, keys, heads=1, groups=1, size=16, batch=1, dtype=torch.float16):
    """q with an offset of each block, k, v, d_out and d_lse."""
    q, k, v = inputs(queries, keys, heads, groups, size, batch, dtype)
    given = (with_offsets(q, 2.0), k, v, torch.randn_like(q), torch.randn(batch, heads, queries))
    return tuple(x.to(DEVICE) for x in given)


def results(module, q, k, v, d_out, d_lse, options, launches=None, **how):
    """Output, log-sum-exp, dQ, dK, dV by ``module``."""
    extra = {"launches": launches} if launches else {}
    out, lse, saved = module.sagebwd_forward(q, k, v, options=options, **how)
    return out, lse, *module.sagebwd_backward(d_out, saved, d_lse=d_lse, options=options, **how, **extra)


def check(got, wanted):
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=6e-3)
    for name, a, b in zip(("O", "lse", "dQ", "dK", "dV")[: len(got)], got, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert name == "lse" or rel(a, b) < TOLERANCE, name


@pytest.mark.parametrize("grain", ["row", "tile"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "size", "causal"),
    [
        (1, 1, 1, 1, 32, False),
        (63, 130, 1, 1, 16, False),
        (130, 63, 2, 1, 24, True),
        (130, 140, 4, 2, 16, True),
        (130, 300, 1, 1, 64, False),
    ],
)
def test_equals_the_reference(grain, queries, keys, heads, groups, size, causal):
    given = problem(queries, keys, heads, groups, size)
    options = LowBit(smooth_q=True, grad_scales=grain)
    check(results(triton_host, *given, options, causal=causal), results(reference, *given, options, causal=causal))


@pytest.mark.parametrize("grain", ["row", "tile"])
def test_strides_float32_scale_and_k_as_given(grain):
    def mixed(x):
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    *given, _ = problem(140, 140, 2, 1, 32, batch=2, dtype=torch.float32)
    given = [mixed(x) for x in given]
    before = [x.clone() for x in given]
    options = LowBit(smooth_q=True, smooth_k=False, grad_scales=grain)
    launches = (Launch(128 if grain == "tile" else 64, 4, 1), Launch(64, 4, 1))
    got = results(triton_host, *given, None, options, launches, scale=0.3)
    check(got, results(reference, *given, None, options, scale=0.3))
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_heads_above_128():
    given = problem(40, 130, 2, 1, 160)
    options = LowBit(smooth_q=True)
    check(results(triton_host, *given, options, causal=True), results(reference, *given, options, causal=True))


def test_offsets_of_blocks_cost_nothing_any_more():
    q, k, v, d_out, d_lse = problem(140, 150, size=64)
    q = with_offsets(q.cpu(), 4.0).to(DEVICE)
    exact, _, gradients = dense(q, k, v, d_out=d_out, d_lse=d_lse)
    plain, centred = (
        [rel(a, b) for a, b in zip((out, *grads), (exact, *gradients), strict=True)]
        for out, _, *grads in (results(triton_host, q, k, v, d_out, d_lse, LowBit(smooth_q=x)) for x in (None, True))
    )
    assert centred[0] < 0.6 * plain[0] and all(a < 0.85 * b for a, b in zip(centred, plain, strict=True))


@pytest.mark.parametrize("smooth_k", [False, True])
def test_means_and_correction(smooth_k):
    """Keys in padding have none; D is padded too; M is more than one program's product."""
    q, k, *_ = problem(17 * 128 + 1, 131, 2, 1, 20)
    sizes = sizes_of(q, k, None)
    mean = triton_smooth_q.query_means(q, sizes)
    _, wanted_mean = smooth.smooth_queries(q)
    torch.testing.assert_close(mean[..., :20], wanted_mean.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert mean.shape == (1, 2, 18, 32) and not mean[..., 20:].any()
    keys, k_mean = smooth.smooth_keys(k) if smooth_k else (k.float(), None)
    mean_of_k = quantise_keys_values(k, k, None, sizes, smooth_k, "none").k_mean
    got = triton_smooth_q.query_correction(mean, k, mean_of_k, sizes, 0.5)
    torch.testing.assert_close(got[..., :131], smooth.query_correction(wanted_mean, keys) * 0.5, rtol=1e-4, atol=1e-4)
    assert (k_mean is None) == (mean_of_k is None) and got.shape[-1] == 256 and not got[..., 131:].any()


def test_zeros_and_nothing_to_do():
    options = LowBit(smooth_q=True)
    q, k, v, d_out, _ = problem(70, 140)
    for given in ((q * 0, k * 0, v * 0, d_out * 0), (q[:, :0], k, v, d_out[:, :0])):
        assert not any(x.any() for x in results(triton_host, *given, None, options)[2:])
    out, lse, d_q, d_k, _ = results(triton_host, q, k[:, :0], v[:, :0], d_out, None, options)
    assert not out.any() and lse.eq(-math.inf).all() and not d_q.any() and d_k.numel() == 0


def test_the_gradient_of_the_log_sum_exp_alone():
    """dO is zero, so that its scale is, and d_lse alone makes dS."""
    q, k, v, d_out, d_lse = problem(70, 140)
    for grain in ("row", "tile"):
        options = LowBit(smooth_q=True, grad_scales=grain)
        got, wanted = (results(module, q, k, v, d_out * 0, d_lse, options) for module in (triton_host, reference))
        check(got[:4], wanted[:4])
        assert not got[4].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_bad_numbers_are_not_hidden():
    for bad in (math.nan, math.inf):
        q, k, v, d_out, _ = problem(140, 20, dtype=torch.float32)
        q[0, 3, 0, 2] = bad
        out, _, d_q, d_k, _ = results(triton_host, q, k, v, d_out, None, LowBit(smooth_q=True))
        for x in (out, d_q):
            assert not x[0, :128].isfinite().any() and x[0, 128:].isfinite().all()
        assert not d_k.isfinite().any()


def test_packed_sequences_are_refused():
    q = torch.zeros(4, 2, 16, device=DEVICE)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="smooth_q: True given; the Triton kernels smooth Q of dense batches alone"):
        sagebwd_forward(q, q, q, options=LowBit(smooth_q=True), cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_a_backward_without_the_option_follows_what_was_saved():
    """The means are in what the forward saved, so that dQ, dK and dV are of the Q that it saw."""
    q, k, v, d_out, _ = problem(40, 50)
    _, _, saved = sagebwd_forward(q, k, v, options=LowBit(smooth_q=True))
    one, other = (sagebwd_backward(d_out, saved, options=LowBit(smooth_q=x)) for x in (None, True))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
