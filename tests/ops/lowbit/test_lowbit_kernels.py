"""The operators of the GPU kernels: on the CPU with stand-ins for Hopper's host and Triton's interpreter, so that what
surrounds the kernels runs (padding, alignment, what is saved, fakes); on a GPU the kernels against the references.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size, N blocks of 128 keys.
"""

import math
import os

import pytest
import torch
from tests.ops.lowbit.plain_autograd import sagebwd_attention
from tests.ops.lowbit.textbook import dense, inputs, rel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from allears import AttentionSpec, attention, explain
from allears.ops.attention import LowBit, dispatch
from allears.ops.attention.lowbit import backends, ops, ops_sagebwd
from allears.ops.attention.lowbit.hopper import host
from allears.ops.attention.lowbit.int8_reference import int8_forward
from allears.ops.attention.lowbit.sagebwd_reference import (
    SageSaved,
    sagebwd_backward,
    sagebwd_forward,
)

ON_GPU = torch.cuda.is_available()
HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_decisions", {})
    torch.manual_seed(0)


def leaves_of(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


# --- Hopper's operators around a stand-in


def stand_in(monkeypatch):
    """The three functions of Hopper's host from the references, with the host's layouts and its demands."""

    def demand(*tensors):
        for x in tensors:
            assert x.dtype in HALF and x.shape[-1] in (64, 128)
            assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 and s for s in x.stride()[:-1])

    def quantise_kv(k, v, pv, smooth):
        demand(k, v)
        given.update(k=k, v=v, smooth=smooth)
        blocks = -(-k.shape[1] // 128)
        k8 = torch.zeros(k.shape[0], k.shape[2], blocks * 128, k.shape[3], dtype=torch.int8)
        scales = torch.zeros(k.shape[0], k.shape[2], blocks, 2)
        if pv == "int8":
            options = LowBit(smooth_k=smooth)
            _, _, saved = sagebwd_forward(k, k, v, options=options)
            k8[:, :, : k.shape[1]] = saved.k8.transpose(1, 2)
            scales[..., 0] = saved.k_scale
        return host.QuantisedKV(k8, k8.transpose(2, 3).contiguous(), scales, None)

    def attend(q, kv, keys, pv, causal, scale, need_lse, save_q):
        demand(q)
        how = {"causal": causal, "scale": scale, "options": LowBit(smooth_k=given["smooth"])}
        if pv == "fp8":
            out, lse = int8_forward(q, given["k"], given["v"], pv="fp8", **how)
            return host.Forward(out.contiguous(), lse.contiguous() if need_lse else None, None, None, None)
        out, lse, saved = sagebwd_forward(q, given["k"], given["v"], **how)
        q8, (q_scale, lse2) = saved.q8.transpose(1, 2).contiguous(), torch.stack([saved.q_scale, saved.lse])
        kept = (q8, q_scale, lse2 * math.log2(math.e)) if save_q else (None, None, None)
        return host.Forward(out.contiguous(), lse.contiguous() if need_lse else None, *kept)

    def attend_backward(d_out, v, kv, forward, causal, scale):
        demand(d_out, v)
        k8 = kv.k[:, :, : v.shape[1]].transpose(1, 2)
        lse = forward.lse2 * math.log(2)
        q8, nothing = forward.q8.transpose(1, 2), torch.zeros(v[:, 0].shape)
        saved = SageSaved(q8, forward.q_scale, k8, kv.scales[..., 0], v, nothing, forward.out, lse)
        return tuple(x.contiguous() for x in sagebwd_backward(d_out, saved, causal=causal, scale=scale))

    given = {}
    for function in (quantise_kv, attend, attend_backward):
        monkeypatch.setattr(host, function.__name__, function)


def misaligned(x):
    """The same numbers two bytes beside what is aligned."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return buffer.view(x.shape).copy_(x)


@pytest.mark.parametrize("change", [lambda x: x, misaligned, lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)])
@pytest.mark.parametrize("size", [40, 64, 100])
def test_hopper_pads_and_aligns(monkeypatch, change, size):
    stand_in(monkeypatch)
    q, k, v = inputs(30, 140, heads=4, groups=2, size=size, dtype=torch.float16)
    how = {"causal": True, "scale": 0.2, "options": LowBit()}
    out, lse = backends.run_int8_hopper(change(q), change(k), change(v), return_lse=True, **how)
    wanted, wanted_lse = int8_forward(q, k, v, pv="fp8", **how)
    assert out.shape == q.shape and rel(out, wanted) < 2e-3 and torch.allclose(lse, wanted_lse, atol=1e-4)
    leaves, theirs = leaves_of(*(change(x) for x in (q, k, v))), leaves_of(q, k, v)
    out = backends.run_sagebwd_hopper(*leaves, return_lse=False, **how)
    wanted, _ = sagebwd_attention(*theirs, **how)
    assert out.shape == q.shape and rel(out, wanted) < 2e-3
    d_out = torch.randn_like(q)
    for a, b in zip(
        torch.autograd.grad(out, leaves, change(d_out)), torch.autograd.grad(wanted, theirs, d_out), strict=True
    ):
        assert a.shape == b.shape and rel(a, b) < 5e-3


def test_opcheck_of_hopper(monkeypatch):
    stand_in(monkeypatch)
    q, k, v = leaves_of(*inputs(30, 140, heads=4, groups=2, size=64, dtype=torch.float16))
    for lse in (False, True):
        torch.library.opcheck(ops.int8_attention_hopper, (q.detach(), k.detach(), v.detach(), True, 0.2, True, lse))
    # The gradient of all results, as opcheck takes it, includes the log-sum-exp, which this kernel refuses.
    parts = ("test_schema", "test_faketensor", "test_autograd_registration")
    for train in (False, True):
        torch.library.opcheck(ops_sagebwd.sagebwd_hopper, (q, k, v, True, 0.2, True, True, train), test_utils=parts)
    lse = ops_sagebwd.sagebwd_hopper(q, k, v, True, 0.2, True, True, True)[1]
    with pytest.raises(ValueError, match="no gradient of the log-sum-exp"):
        torch.autograd.grad(lse.sum(), q)


def test_hopper_compiles_whole_with_its_gradient(monkeypatch):
    stand_in(monkeypatch)
    tensors = inputs(30, 140, heads=4, groups=2, size=40, dtype=torch.float16)
    how = {"causal": True, "scale": 0.2, "options": LowBit(), "return_lse": False}
    compiled = torch.compile(lambda *x: backends.run_sagebwd_hopper(*x, **how), fullgraph=True, backend="aot_eager")
    got, wanted = (
        torch.autograd.grad(f(*(leaves := leaves_of(*tensors))).square().sum(), leaves)
        for f in (compiled, lambda *x: backends.run_sagebwd_hopper(*x, **how))
    )
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# --- Triton's operators, in its interpreter where there is no GPU


def triton_spec(numerics, **how):
    pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")
    return AttentionSpec("triton", numerics=numerics, **how)


@pytest.mark.skipif(ON_GPU, reason="the GPU runs larger cases")
@pytest.mark.parametrize("numerics", ["int8_fp8", "int8_fp16"])
def test_triton_forward_through_the_door(numerics):
    spec = triton_spec(numerics, causal=True)
    q, k, v = inputs(20, 140, heads=2, groups=1, size=24, dtype=torch.float16)
    out, lse = attention(q, k, v, spec, return_lse=True)
    wanted, wanted_lse = attention(q, k, v, AttentionSpec("reference", True, numerics=numerics), return_lse=True)
    assert rel(out, wanted) < 2e-3
    torch.testing.assert_close(lse, wanted_lse, atol=1e-3, rtol=0)
    assert torch.equal(attention(q, k, v, spec), out)
    assert explain(q, k, v, AttentionSpec(numerics=numerics)).kernel == "reference"
    with pytest.raises(ValueError, match="bfloat16"):
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), spec)


@pytest.mark.skipif(ON_GPU, reason="the GPU runs larger cases")
@pytest.mark.parametrize(
    ("options", "packed"),
    [
        *((options, x) for options in (LowBit(), LowBit(smooth_k=False, grad_scales="tile")) for x in (False, True)),
        (LowBit(smooth_q=True), False),
    ],
)
def test_triton_sagebwd_through_the_door(options, packed):
    q, k, v = inputs(20, 140, heads=2, groups=1, size=24, dtype=torch.float16)
    how, shape = {}, (1, 2, 20)
    if packed:
        q, k, v = (x[0] for x in (q, k, v))
        how = {"cu_seqlens_q": torch.tensor([0, 7, 20]).int(), "cu_seqlens_k": torch.tensor([0, 131, 140]).int()}
        shape = (2, 20)
    weights = torch.randn_like(q), torch.randn(shape)
    both = []
    for kernel in ("triton", "reference"):
        spec = AttentionSpec(kernel, True, numerics="sagebwd", lowbit=options)
        leaves = leaves_of(q, k, v)
        results = attention(*leaves, spec, **how, return_lse=True)
        both.append((*results, *torch.autograd.grad(results, leaves, weights)))
    assert all(a.shape == b.shape and rel(a, b) < 4e-3 for a, b in zip(*both, strict=True) if b.isfinite().all())


@pytest.mark.skipif(ON_GPU, reason="the GPU runs larger cases")
@pytest.mark.parametrize("numerics", ["int8_fp8", "int8_fp16", "sagebwd"])
def test_triton_with_lengths_of_padded_entries(numerics):
    """Among them one with all keys, one without any, and queries that do not exist; what stands behind keys is NaN."""
    triton_spec(numerics)
    q, k, v = inputs(7, 131, heads=2, groups=1, size=24, batch=3, dtype=torch.float16)
    k[2, 4:] = v[2, 4:] = math.nan
    lengths = {"key_lengths": torch.tensor([131, 0, 4]), "query_lengths": torch.tensor([7, 7, 3])}
    weights, both = (torch.randn_like(q), torch.randn(3, 2, 7)), []
    for kernel in ("triton", "reference"):
        spec = AttentionSpec(kernel, True, numerics=numerics)
        leaves = leaves_of(q, k, v)
        with torch.set_grad_enabled(numerics == "sagebwd"):
            assert (
                explain(*leaves, spec, **lengths, return_lse=True).form == "lengths as packed sequences, where they lie"
            )
            results = attention(*leaves, spec, **lengths, return_lse=True)
        both.append([*results, *(torch.autograd.grad(results, leaves, weights) if numerics == "sagebwd" else ())])
    lse, wanted = both[0].pop(1), both[1].pop(1)
    torch.testing.assert_close(lse, wanted, atol=1e-3, rtol=0)
    assert not both[0][0][1].any() and lse[1].eq(-math.inf).all() and lse[2, :, 3:].eq(-math.inf).all()
    assert all(a.isfinite().all() and rel(a, b) < 4e-3 for a, b in zip(*both, strict=True))


@pytest.mark.skipif(ON_GPU, reason="the GPU runs larger cases")
def test_opcheck_of_triton():
    triton_spec("int8_fp8")
    q, k, v = leaves_of(*inputs(9, 140, heads=2, groups=1, size=24, dtype=torch.float16))
    parts = ("test_schema", "test_faketensor", "test_autograd_registration")
    flat = [x[0].detach() for x in (q, k, v)]
    cu_q, cu_k = torch.tensor([0, 4, 9]).int(), torch.tensor([0, 131, 140]).int()
    for smooth in (True, False):
        for op, rest in ((ops.int8_attention_triton, (True, True, 0.2, smooth, True)),):
            torch.library.opcheck(op, (q.detach(), k.detach(), v.detach(), None, None, *rest), test_utils=parts)
            torch.library.opcheck(op, (*flat, cu_q, cu_k, *rest), test_utils=parts)
        for tensors, centred in (((q, k, v, None, None), not smooth), ((*flat, cu_q, cu_k), False)):
            torch.library.opcheck(
                ops_sagebwd.sagebwd_triton, (*tensors, True, 0.2, smooth, centred, "row"), test_utils=parts
            )


# --- on a GPU: the kernels against the references and exact attention

SHAPES = [  # L_q, L_k, H, G, D, causal
    (1, 1, 1, 1, 64, False),
    (63, 100, 2, 2, 64, False),
    (300, 300, 4, 2, 128, True),
    (257, 1000, 4, 1, 128, True),
    (500, 333, 2, 1, 64, True),
    (200, 777, 3, 3, 40, False),
    (129, 640, 2, 1, 100, True),
]
LARGE = [(200, 333, 2, 1, 160, True), (130, 300, 4, 2, 256, False)]


def on_gpu(*tensors):
    return [x.cuda() for x in tensors]


def errors_of(spec, q, k, v, causal, d_out=None):
    """Errors of the output, and of the gradients if asked for, against exact attention; and the results."""
    leaves = leaves_of(q, k, v)
    out = attention(*leaves, spec) if d_out is not None else attention(q, k, v, spec)
    results = [out.detach()]
    if d_out is not None:
        results += torch.autograd.grad(out, leaves, d_out)
        exact_out, _, exact = dense(q, k, v, causal, d_out=d_out)
    else:
        (exact_out, _), exact = dense(q, k, v, causal), ()
    return [rel(a, b) if b.any() else 0.0 for a, b in zip(results, (exact_out, *exact), strict=True)], results


def p_top(kernel):
    """The integer of the largest P in sagebwd."""
    return 255.0 if kernel == "hopper" else 127.0


def sagebwd_reference(kernel, scales, q, k, v, causal, d_out=None, smooth_q=None):
    """Output and log-sum-exp, or output and gradients, of the reference with the P that ``kernel`` has."""
    how = {"causal": causal, "options": LowBit(smooth_q=smooth_q, grad_scales=scales)}
    out, lse, saved = sagebwd_forward(q, k, v, **how, p_top=p_top(kernel))
    if d_out is None:
        return out, lse
    return out, *sagebwd_backward(d_out, saved, **how, p_top=p_top(kernel))


GPU_KERNELS = [
    pytest.param("int8_fp8", "hopper", marks=needs_hopper),
    pytest.param("int8_fp8", "triton", marks=needs_gpu),
    pytest.param("int8_fp16", "triton", marks=needs_gpu),
    pytest.param("sagebwd", "hopper", marks=needs_hopper),
    pytest.param("sagebwd", "triton", marks=needs_gpu),
]
TRAINING_KERNELS = [
    pytest.param("hopper", "row", marks=needs_hopper),
    pytest.param("triton", "row", marks=needs_gpu),
    pytest.param("triton", "tile", marks=needs_gpu),
]


@pytest.mark.parametrize(("numerics", "kernel"), GPU_KERNELS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_on_a_gpu(numerics, kernel, dtype, shape):
    *sizes, causal = shape
    q, k, v = on_gpu(*inputs(*sizes, batch=2, dtype=dtype))
    kept = [x.clone() for x in (q, k, v)]
    spec, reference = (AttentionSpec(name, causal, numerics=numerics) for name in (kernel, "reference"))
    out, lse = attention(q, k, v, spec, return_lse=True)
    if numerics == "sagebwd":
        wanted, wanted_lse = sagebwd_reference(kernel, "row", q, k, v, causal)
    else:
        wanted, wanted_lse = attention(q, k, v, reference, return_lse=True)
    exact, _ = dense(q, k, v, causal)
    assert rel(out, exact) < 1.15 * rel(wanted, exact) + 2e-3
    assert rel(out, wanted) < (0.06 if numerics == "int8_fp8" else 6e-3)
    # The mean of K sums in another order, so a value of K may round to the next integer.
    bound = 0.04 if kernel == "hopper" and numerics == "int8_fp8" else 8e-3
    torch.testing.assert_close(lse, wanted_lse, atol=bound, rtol=0)
    assert torch.equal(attention(q, k, v, spec), out)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), kept, strict=True))


@pytest.mark.parametrize(("kernel", "scales"), TRAINING_KERNELS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gradients_on_a_gpu(kernel, scales, dtype, shape, smooth_q=None):
    *sizes, causal = shape
    q, k, v = on_gpu(*inputs(*sizes, batch=2, dtype=dtype))
    d_out = torch.randn_like(q)
    options = LowBit(smooth_q=smooth_q, grad_scales=scales)
    got, results = errors_of(AttentionSpec(kernel, causal, numerics="sagebwd", lowbit=options), q, k, v, causal, d_out)
    reference = sagebwd_reference(kernel, scales, q, k, v, causal, d_out, smooth_q)
    exact_out, _, exact = dense(q, k, v, causal, d_out=d_out)
    wanted = [rel(a, b) if b.any() else 0.0 for a, b in zip(reference, (exact_out, *exact), strict=True)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, wanted, strict=True):
        assert a < 1.15 * b + 3e-3, name
    for name, a, b in zip(("out", "dq", "dk", "dv"), results, reference, strict=True):
        bound = 0.04 if kernel == "hopper" and name == "dq" else 0.015  # Hopper's dQ is a product in 16 bits
        assert a.dtype == dtype and rel(a, b) < bound, name


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("scales", ["row", "tile"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [*SHAPES[1:], *LARGE])
def test_smoothed_queries_on_a_gpu(scales, dtype, shape):
    if scales == "row" or shape in SHAPES:
        test_gradients_on_a_gpu("triton", scales, dtype, shape, smooth_q=True)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("shape", LARGE)
def test_heads_above_128_on_a_gpu(shape):
    for numerics in ("int8_fp8", "int8_fp16", "sagebwd"):
        test_forward_on_a_gpu(numerics, "triton", torch.bfloat16, shape)
    test_gradients_on_a_gpu("triton", "row", torch.bfloat16, shape)


@pytest.mark.parametrize(("numerics", "kernel"), GPU_KERNELS)
def test_strides_and_bad_numbers_on_a_gpu(numerics, kernel):
    q, k, v = on_gpu(*inputs(150, 300, 4, 2, 64, batch=2, dtype=torch.bfloat16))
    spec = AttentionSpec(kernel, True, numerics=numerics)
    out = attention(q, k, v, spec)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]  # heads outside, as many models have it
    assert rel(attention(*moved, spec), out) < 2e-3
    mixed = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert rel(attention(*mixed, spec), out) < 2e-3
    for broken in range(3):
        given = [x.clone() for x in (q, k, v)]
        given[broken][0, 3, 0, 2] = math.nan
        result = attention(*given, AttentionSpec(kernel, numerics=numerics))
        hit = result[0, 3, 0] if broken == 0 else result[0, :, 0, 2]
        assert not hit.isfinite().any()
        assert result[1].isfinite().all()


@pytest.mark.parametrize(("kernel", "scales"), TRAINING_KERNELS)
def test_strides_of_gradients_on_a_gpu(kernel, scales):
    q, k, v = on_gpu(*inputs(150, 300, 4, 2, 64, batch=2, dtype=torch.bfloat16))
    spec = AttentionSpec(kernel, True, numerics="sagebwd", lowbit=LowBit(grad_scales=scales))
    d_out = torch.randn_like(q)
    plain, moved = (
        leaves_of(q, k, v),
        [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)],
    )
    wanted = torch.autograd.grad(attention(*plain, spec), plain, d_out)
    got = torch.autograd.grad(attention(*moved, spec), moved, d_out.transpose(1, 2).contiguous().transpose(1, 2))
    assert all(rel(a, b) < 5e-3 for a, b in zip(got, wanted, strict=True))
    got = torch.autograd.grad(attention(*plain, spec).sum(), plain)  # a gradient of strides 0
    wanted = torch.autograd.grad(attention(*plain, spec), plain, torch.ones_like(q))
    assert all(rel(a, b) < 5e-3 for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(("kernel", "scales"), TRAINING_KERNELS)
def test_compile_and_graphs_on_a_gpu(kernel, scales):
    q, k, v = on_gpu(*inputs(150, 300, 4, 2, 64, batch=2, dtype=torch.bfloat16))
    spec = AttentionSpec(kernel, True, numerics="sagebwd", lowbit=LowBit(grad_scales=scales))

    def step(*leaves):
        return torch.autograd.grad(attention(*leaves, spec).float().square().sum(), leaves)

    leaves = leaves_of(q, k, v)
    wanted = step(*leaves)
    compiled = torch.compile(lambda *x: attention(*x, spec), fullgraph=True, backend="aot_eager")
    made = torch.autograd.grad(compiled(*leaves).float().square().sum(), leaves)
    assert all(rel(a, b) < 5e-3 for a, b in zip(made, wanted, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step(*leaves)
    for x in held:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(rel(a, b) < 5e-3 for a, b in zip(held, wanted, strict=True))


@pytest.mark.parametrize("numerics", ["int8_fp8", "int8_fp16", "sagebwd"])
@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_packed_sequences_on_a_gpu(numerics):
    """``auto`` takes Triton's kernels for them, on Hopper too."""
    q, k, v = on_gpu(*(x[0] for x in inputs(350, 500, 4, 2, 64, dtype=torch.bfloat16)))
    offsets = {
        "cu_seqlens_q": torch.tensor([0, 70, 70, 73, 350], device="cuda").int(),
        "cu_seqlens_k": torch.tensor([0, 131, 150, 150, 500], device="cuda").int(),
    }
    assert explain(q, k, v, AttentionSpec(numerics=numerics), **offsets).kernel == "triton"
    out = attention(q, k, v, AttentionSpec(causal=True, numerics=numerics), **offsets)
    wanted = attention(q, k, v, AttentionSpec("reference", True, numerics=numerics), **offsets)
    assert rel(out, wanted) < 6e-3
    if numerics == "sagebwd":
        results = []
        for kernel in ("auto", "reference"):
            leaves = leaves_of(q, k, v)
            spec = AttentionSpec(kernel, True, numerics=numerics)
            results.append(torch.autograd.grad(attention(*leaves, spec, **offsets), leaves, torch.ones_like(q)))
        assert all(rel(a, b) < 0.015 for a, b in zip(*results, strict=True))
