"""What every family refuses in words: what is no tensor, what has no values, torch.func where it has no gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from allears import AttentionSpec, LowBit, attention, explain
from allears.nn.attention import SelfAttention
from allears.ops.attention import Facts, Sparsity, backends, linear_attention
from allears.ops.attention.jvp.call import attention_jvp
from allears.ops.attention.linear.call import explain_linear
from allears.ops.attention.sparse_linear import SparseLinear, blocks_from_map, sparse_linear_attention
from allears.ops.attention.sparse_linear.backends import KERNELS

SPARSE = AttentionSpec(sparse=Sparsity(keep=0.5))
TRAINS = {
    "sagebwd": AttentionSpec(numerics="sagebwd"),
    "int8_fp8": AttentionSpec(numerics="int8_fp8", lowbit=LowBit(backward="drop_in")),
    "nvfp4": AttentionSpec(numerics="nvfp4", lowbit=LowBit(backward="matched")),
}


def three(length=70, device="cpu"):
    torch.manual_seed(length)
    return tuple(torch.randn(1, length, 2, 16, device=device) for _ in range(3))


def sparse_linear(q, k, v):
    blocks = blocks_from_map(torch.ones(1, 2, 1, 2, dtype=torch.bool))
    return sparse_linear_attention(q, k, v, blocks, torch.full((2, 1), 0.5))


DOORS = {
    "exact": attention,
    "explain": explain,
    "int8": lambda q, k, v: attention(q, k, v, AttentionSpec(numerics="int8_fp8")),
    "sparse": lambda q, k, v: attention(q, k, v, SPARSE),
    "sparse_linear": sparse_linear,
    "linear": linear_attention,
    "explain_linear": explain_linear,
    "jvp": lambda q, k, v: attention_jvp(q, k, v, q, None, None),
}


@pytest.mark.parametrize("door", DOORS)
def test_tensors_without_values_are_refused(door):
    with pytest.raises(ValueError, match="q: on the device 'meta' given, which holds no values; move q, k and v to"):
        DOORS[door](*three(device="meta"))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("which", range(3))
def test_arrays_and_lists_are_refused(door, which):
    for other, kind in ((np.zeros((1, 70, 2, 16), np.float32), "ndarray"), ([[0.0]], "list"), (None, "NoneType")):
        given = list(three())
        given[which] = other
        with pytest.raises(ValueError, match=rf"{'qkv'[which]}: {kind} given; it must be a torch.Tensor"):
            DOORS[door](*given)


def test_arrays_beside_q_k_and_v_are_refused():
    q, k, v = three()
    with pytest.raises(ValueError, match=r"mask: ndarray given; it must be a torch.Tensor"):
        attention(q, k, v, mask=np.ones((70, 70), bool))
    offsets = {"cu_seqlens_q": [0, 70], "cu_seqlens_k": torch.tensor([0, 70])}
    with pytest.raises(ValueError, match=r"cu_seqlens_q: list given; it must be a torch.Tensor"):
        attention(q[0], k[0], v[0], **offsets)
    for name, given in (
        ("scale", np.ones((2, 16))),
        ("conv_weight", np.ones((16, 3))),
        ("lengths", [70]),
        ("cu_seqlens", (0, 70)),
    ):
        with pytest.raises(ValueError, match=f"{name}: {type(given).__name__} given; it must be a torch.Tensor"):
            linear_attention(*(x[0] if name == "cu_seqlens" else x for x in (q, k, v)), **{name: given})


@pytest.mark.parametrize("numerics", TRAINS)
def test_torch_func_is_refused_where_it_has_no_gradient(numerics):
    q, k, v = three()
    spec = TRAINS[numerics]

    def run(q):
        return attention(q, k, v, spec).square().sum()

    words = "reference: torch.func has no gradient of its operator; use backward"
    two = torch.stack([q, q])
    for ask in (
        lambda: torch.func.grad(run)(q),
        lambda: torch.func.vjp(run, q),
        lambda: torch.func.vmap(torch.func.grad(run))(two),
        lambda: torch.func.grad(lambda x: torch.func.vmap(run)(x).sum())(two),  # here q itself asks for nothing
    ):
        with pytest.raises(ValueError, match=words):
            ask()
    with pytest.raises(ValueError, match=r"'reference' cannot run this call: torch.func has no gradient"):
        torch.func.grad(lambda q: attention(q, k, v, replace(spec, kernel="reference")).sum())(q)
    leaf = q.clone().requires_grad_()
    run(leaf).backward()  # and this is what the words advise
    assert leaf.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_torch_func_without_a_gradient_is_not_refused():
    q, k, v = three()
    spec = TRAINS["sagebwd"]
    batched = torch.func.vmap(lambda q: attention(q, k, v, spec))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(batched[1], attention(2 * q, k, v, spec))
    weight = torch.ones(2, 16)  # what is differentiated does not pass attention
    grad = torch.func.grad(lambda w: (w * attention(q, k, v, spec)).sum())(weight)
    torch.testing.assert_close(grad, attention(q, k, v, spec).sum((0, 1)))


def test_the_lse_has_a_gradient_by_torch_func_of_another_kernel():
    q, k, v = three()
    assert explain(q, k, v, return_lse=True).kernel == "sdpa-flash"

    def run(q, spec=None):
        return attention(q, k, v, spec, return_lse=True)[1].square().sum()

    leaf = q.clone().requires_grad_()
    run(leaf).backward()
    torch.testing.assert_close(torch.func.grad(run)(q), leaf.grad)
    with pytest.raises(ValueError, match=r"'sdpa-flash' cannot run this call: torch.func has no gradient"):
        torch.func.grad(lambda q: run(q, AttentionSpec(kernel="sdpa-flash")))(q)


GPU = Facts("cuda", (9, 0), torch.bfloat16, 128, False, "none", False, True, False, False, False, False, True, False)
FUNC = {"func": True}


@pytest.mark.parametrize(
    ("name", "spec", "change", "refused"),
    [
        ("sdpa", AttentionSpec(), FUNC, False),
        ("sdpa-cudnn", AttentionSpec(), FUNC, False),
        ("sdpa-flash", AttentionSpec(), FUNC, False),
        ("sdpa-flash", AttentionSpec(), FUNC | {"lse": True}, True),
        ("sdpa-flash", AttentionSpec(), FUNC | {"packed": True, "square": False}, True),
        ("sdpa-flash", AttentionSpec(), FUNC | {"causal": True, "square": False}, True),
        ("sdpa-flash", AttentionSpec(), {"lse": True}, False),
        ("flash-attn-4", AttentionSpec(), FUNC, True),
        ("reference", AttentionSpec(), FUNC | {"lse": True}, False),
        ("hopper", TRAINS["sagebwd"], FUNC, True),
        ("hopper", TRAINS["sagebwd"], {}, False),
        ("triton", SPARSE, FUNC, True),
        ("reference", SPARSE, FUNC, False),
    ],
)
def test_kernels_of_gpus_know_what_torch_func_can(name, spec, change, refused, monkeypatch):
    monkeypatch.setattr("allears.ops.attention.sparse_linear.backends.interpreted", lambda: False)
    kernel = next(b for b in backends(spec.numerics, spec.sparse is not None) if b.name == name)
    reason = kernel.refuses(GPU._replace(**change), spec)
    assert reason == ("torch.func has no gradient of its operator; use backward() or torch.autograd.grad" * refused)


def test_sparse_linear_attention_knows_it_too(monkeypatch):
    eight = SparseLinear(precision="int8_fp8")
    facts = {k.name: k.refuses(GPU._replace(func=True), eight, True) for k in KERNELS if k.name == "reference"}
    assert "torch.func" in facts["reference"]
    blocks = blocks_from_map(torch.ones(1, 2, 1, 2, dtype=torch.bool))
    q, k, v = three()

    def run(ratio, options):
        return sparse_linear_attention(q, k, v, blocks, ratio, options).square().sum()

    ratio = torch.full((2, 1), 0.5)
    with pytest.raises(ValueError, match=r"reference: torch\.func has no gradient"):
        torch.func.grad(run)(ratio, eight)
    leaf = ratio.clone().requires_grad_()
    run(leaf, SparseLinear()).backward()
    torch.testing.assert_close(torch.func.grad(run)(ratio, SparseLinear()), leaf.grad)


def test_modules_differentiate_by_torch_func_with_exact_attention():
    layer = SelfAttention(16, 2)
    x = torch.randn(1, 9, 16)
    weights = dict(layer.named_parameters())
    grads = torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,)).square().sum())(weights)
    layer(x).square().sum().backward()
    for name, weight in nn.Module.named_parameters(layer):
        torch.testing.assert_close(grads[name], weight.grad)


@pytest.mark.parametrize(("cuda", "package"), [("13.0", "flash-attn-4[cu13]"), ("12.8", "flash-attn-4")])
def test_flash_attn_4_is_asked_for_with_what_this_torch_needs(cuda, package, monkeypatch):
    monkeypatch.setattr("allears.ops.attention.dense.flash4.no_gpu", lambda: "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    kernel = next(b for b in backends() if b.name == "flash-attn-4")
    assert kernel.reason == f"the package is not installed: pip install '{package}'"
