"""The forward's kernel in Triton's interpreter against the references. The interpreter multiplies bfloat16 by its bits,
so that V in 16 bits is float16 here.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed: T tokens.
"""

import math
import os

import pytest
import torch
from tests.ops.lowbit.textbook import dense, inputs, rel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.attention.lowbit import int8_reference, sagebwd_reference  # noqa: E402
from allears.ops.attention.lowbit.options import LowBit  # noqa: E402
from allears.ops.attention.lowbit.triton_host import Launch, int8_forward, sagebwd_forward  # noqa: E402
from allears.ops.attention.lowbit.varlen import over_sequences  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ("fp8", "fp16", "int8")
pytestmark = pytest.mark.usefixtures("poison")


def on_device(*tensors):
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def reference(kind, q, k, v, causal=False, scale=None, smooth=True):
    options = LowBit(smooth_k=smooth)
    if kind == "int8":
        return sagebwd_reference.sagebwd_forward(q, k, v, causal=causal, scale=scale, options=options)[:2]
    return int8_reference.int8_forward(q, k, v, pv=kind, causal=causal, scale=scale, options=options)


def kernel(kind, q, k, v, smooth=True, **how):
    options = LowBit(smooth_k=smooth)
    if kind == "int8":
        return sagebwd_forward(q, k, v, options=options, **how)[:2]
    return int8_forward(q, k, v, pv=kind, options=options, return_lse=True, **how)


def check(got, wanted, tolerance=1e-3):
    (out, lse), (out_wanted, lse_wanted) = got, wanted
    assert out.dtype == out_wanted.dtype
    assert rel(out, out_wanted) < tolerance
    torch.testing.assert_close(lse, lse_wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "groups", "size", "causal"),
    [(63, 130, 2, 2, 16, False), (100, 256, 1, 1, 64, True), (130, 100, 4, 2, 32, True), (1, 1, 1, 1, 24, False)],
)
def test_equals_the_reference(kind, queries, keys, heads, groups, size, causal):
    """Odd lengths; L_q below and above L_k, where causal alignment leaves queries without keys; grouped heads;
    padding."""
    q, k, v = on_device(*inputs(queries, keys, heads, groups, size, dtype=torch.float16))
    check(kernel(kind, q, k, v, causal=causal), reference(kind, q, k, v, causal))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_float32_scale_and_no_smoothing(kind):
    def mixed(x):
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)

    q, k, v = (mixed(x) for x in on_device(*inputs(70, 140, 2, 1, 32, batch=2)))
    before = [x.clone() for x in (q, k, v)]
    got = kernel(kind, q, k, v, smooth=False, scale=0.3, launch=Launch(64, 4, 1))
    check(got, reference(kind, q, k, v, scale=0.3, smooth=False))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_close_to_exact_attention(kind):
    q, k, v = on_device(*inputs(100, 200, 1, 1, 64, dtype=torch.float16))
    out, lse = kernel(kind, q, k, v)
    exact, exact_lse = dense(q, k, v)
    assert rel(out, exact) < {"fp8": 0.05, "fp16": 0.015, "int8": 0.025}[kind]
    assert (lse - exact_lse).abs().max() < 0.05


@pytest.mark.parametrize(("kind", "causal"), [("fp8", True), ("fp16", True), ("int8", True), ("int8", False)])
def test_packed_sequences_run_one_by_one(kind, causal):
    """Among them empty ones, one without keys, and one with more queries than keys."""
    cu_q = torch.tensor([0, 70, 70, 73, 140, 150], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, 131, 150, 150, 190, 200], dtype=torch.int32, device=DEVICE)
    q, k, v = on_device(*(x[0] for x in inputs(150, 200, 1, 1, 16, dtype=torch.float16)))
    got = kernel(kind, q, k, v, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    wanted = over_sequences(lambda q, k, v: reference(kind, q, k, v, causal), q, k, v, cu_q, cu_k)
    check(got, wanted)
    assert not got[0][70:73].any() and got[1][:, 70:73].eq(-math.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_no_keys(kind):
    q = torch.zeros(1, 5, 2, 16, device=DEVICE)
    out, lse = kernel(kind, q, q, q)
    assert not out.any()
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(5)))
    out, lse = kernel(kind, q, q[:, :0], q[:, :0])
    assert out.shape == q.shape and not out.any() and lse.eq(-math.inf).all()
    out, lse = kernel(kind, q[:, :0], q, q)
    assert out.shape == (1, 0, 2, 16) and lse.shape == (1, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_bad_numbers_show_where_their_scale_reaches(kind, bad):
    """Causal attention hides the second block of keys from the first 128 queries, and with it what is bad there."""
    q, k, v = on_device(*inputs(140, 140, 1, 1, 16))
    for broken in range(3):
        given = [q.clone(), k.clone(), v.clone()]
        given[broken][0, 130, 0, 2] = bad
        out, lse = kernel(kind, *given, smooth=False, causal=True)
        of_query = ~out.isfinite().all(-1).flatten()
        wanted = torch.arange(140, device=DEVICE) >= 128
        if broken == 0:
            wanted = torch.arange(140, device=DEVICE) == 130
        elif broken == 2 and kind == "fp16":
            wanted = torch.arange(140, device=DEVICE) >= 130
            of_query[128:130] = False  # a product of 0 and infinity, which a chip may see or not
        assert torch.equal(of_query, wanted)
        assert torch.equal(~lse.isfinite().flatten(), wanted if broken < 2 else torch.zeros_like(wanted))


def test_scales_of_v_that_differ_wildly():
    """The output is kept in units of a block's scale of V: tiny, zero and huge blocks in any order stay right."""
    for factors in ((1.0, 1e-30, 1e-20), (0.0, 1e-30, 1e20), (1e20, 0.0, 1.0)):
        q, k, v = on_device(*inputs(3, 384, 1, 1, 16))
        v = v * torch.tensor(factors, device=DEVICE).repeat_interleave(128)[:, None, None]
        check(kernel("fp8", q, k, v), reference("fp8", q, k, v))


def test_refusals_name_the_argument():
    q = torch.zeros(1, 4, 2, 16, device=DEVICE)
    cu = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="pv: 'int4' given"):
        int8_forward(q, q, q, pv="int4")
    with pytest.raises(ValueError, match="smooth_q: True given"):
        int8_forward(q, q, q, pv="fp8", options=LowBit(smooth_q=True))
    with pytest.raises(ValueError, match="one given without the other"):
        int8_forward(q[0], q[0], q[0], pv="fp8", cu_seqlens_q=cu)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: torch\.int64"):
        int8_forward(q[0], q[0], q[0], pv="fp8", cu_seqlens_q=cu, cu_seqlens_k=cu.long())
    with pytest.raises(ValueError, match="packed sequences are"):
        sagebwd_forward(q, q, q, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="head size 257"):
        sagebwd_forward(*(torch.zeros(1, 4, 1, 257, device=DEVICE),) * 3)
