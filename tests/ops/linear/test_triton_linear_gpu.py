"""Linear attention's Triton kernels on a GPU at real sizes: values and gradients, compilation, repetition.

Shapes as in ``plain.py``.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from tests.ops.linear.plain import call, check, outputs_and_gradients, problem

from allears.ops.attention.linear.call import linear_attention
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.triton_run import linear_attention_triton

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = [(8, 64), (8, 16), (16, 64), (12, 128), (3, 24), (1, 64), (4, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), FORMS)
def test_both_ways(heads, size, dtype):
    check(problem(4999, 4999, heads, size, batch=2, taps=5, dtype=dtype), LinearOptions())
    check(problem(1000, 3001, heads, size, dtype=dtype), LinearOptions())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size"), FORMS)
def test_causal(heads, size, dtype):
    tensors = problem(2999, 2999, heads, size, batch=2, taps=4, dtype=dtype)
    check(tensors, LinearOptions(), causal=True)


@pytest.mark.parametrize("options", [LinearOptions("elu"), LinearOptions("relu"), LinearOptions("softmax")])
@pytest.mark.parametrize("causal", [False, True])
def test_other_feature_maps(options, causal):
    tensors = problem(2999, 2999, 8, 32, taps=5, scale=False, dtype=torch.bfloat16)
    check(tensors, options, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_and_lengths(causal):
    tensors = problem(3000, 3000, 8, 64, batch=3, taps=5, dtype=torch.bfloat16)
    check(tensors, LinearOptions(), causal=causal, lengths=torch.tensor([7, 3000, 1999], device="cuda"))
    tensors |= {name: tensors[name].flatten(0, 1) for name in "qkv"}
    cu = torch.tensor([0, 1000, 1000, 1001, 9000], device="cuda", dtype=torch.int32)
    check(tensors, LinearOptions(), causal=causal, cu_seqlens=cu)


@pytest.mark.parametrize("causal", [False, True])
def test_strides(causal):
    tensors = problem(999, 999, 8, 64, batch=2, taps=5, dtype=torch.bfloat16)
    for name in "qkv":
        tensors[name] = tensors[name].transpose(1, 2).contiguous().transpose(1, 2)
    check(tensors, LinearOptions(), causal=causal)
    for name in "qkv":
        tensors[name] = tensors[name].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    check(tensors, LinearOptions(), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_a_call_repeats_bit_by_bit(causal):
    tensors = problem(20_000, 20_000, 8, 64, taps=5, dtype=torch.bfloat16)
    first, second = (
        outputs_and_gradients(linear_attention_triton, tensors, LinearOptions(), causal=causal) for _ in range(2)
    )
    assert all(torch.equal(x, second[name]) for name, x in first.items() if x is not None)


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole_for_any_length(causal):
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    for rows in (1000, 1504, 777):
        tensors = problem(rows, rows, 8, 64, taps=5, dtype=torch.bfloat16)
        q, k, v = (tensors.pop(name).requires_grad_() for name in "qkv")
        out = compiled(q, k, v, causal=causal, kernel="triton", **tensors)
        wanted = linear_attention(q, k, v, causal=causal, kernel="triton", **tensors)
        assert torch.equal(out, wanted)
        got = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        right = torch.autograd.grad(wanted.float().square().sum(), (q, k, v))
        assert all(torch.equal(a, b) for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_kernel_is_compiled_again_for_a_length(dtype, monkeypatch):
    from allears.ops.attention.linear import triton_groups_host
    from allears.ops.attention.linear.triton_fwd import output_kernel, states_kernel
    from allears.ops.attention.linear.triton_groups import group_output_kernel, group_states_kernel

    monkeypatch.setattr(triton_groups_host, "HOPPER_STATES", False)
    monkeypatch.setattr(triton_groups_host, "HOPPER_OUTPUT", False)
    kernels = states_kernel, output_kernel, group_states_kernel, group_output_kernel

    def run(rows):
        call(linear_attention_triton, problem(rows, rows, 8, 64, taps=5, dtype=dtype), LinearOptions())
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    first = run(1000)
    assert sum(first) > 0
    assert all(run(rows) == first for rows in (1, 16, 17, 4096, 100_000))
