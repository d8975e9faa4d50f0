import sys
from types import ModuleType

import pytest
import torch

from allears.ops.attention.linear.call import explain_linear, linear_attention
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.state import new_state


def sample(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def three(*shape, dtype=torch.float32):
    return tuple(sample(*shape, seed=i, dtype=dtype) for i in range(3))


@pytest.fixture
def stand_in(monkeypatch):
    """A Triton kernel that answers q + 1, where Triton interprets; what it was called with."""
    calls = []

    def linear_attention_triton(q, k, v, options, **more):
        calls.append((options, more))
        return q + 1, "the state"

    module = ModuleType("allears.ops.attention.linear.triton_run")
    module.linear_attention_triton = linear_attention_triton
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("allears.ops.attention.linear.call.triton_missing", lambda: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return calls


def test_a_named_kernel_runs_or_says_why_not(monkeypatch):
    q, k, v = three(1, 4, 2, 3)
    monkeypatch.setattr("allears.ops.attention.linear.call.triton_missing", lambda: "no CUDA GPU answers")
    choice = explain_linear(q, k, v)
    assert (choice.kernel, choice.refused, choice.able) == ("reference", {"triton": "no CUDA GPU answers"}, ())
    assert torch.equal(linear_attention(q, k, v, kernel="reference"), linear_attention(q, k, v))
    for call in (linear_attention, explain_linear):
        with pytest.raises(ValueError, match="kernel: 'triton' cannot run this call: no CUDA GPU answers; or use"):
            call(q, k, v, kernel="triton")
        with pytest.raises(ValueError, match="kernel: 'fast' given; known are auto, triton, reference"):
            call(q, k, v, kernel="fast")


def test_triton_gets_the_call_whole(stand_in):
    q, k, v = three(1, 4, 2, 3)
    options = LinearOptions(power=2)
    given = {"scale": torch.ones(2, 3), "conv_weight": torch.ones(3, 5), "conv_bias": torch.ones(3), "causal": True}
    given |= {"state": new_state(v, 1, 5), "lengths": torch.tensor([3])}
    made = linear_attention(q, k, v, options, kernel="triton", return_state=True, **given)
    assert torch.equal(made[0], q + 1) and made[1] == "the state"
    assert stand_in == [(options, given | {"cu_seqlens": None})]
    choice = explain_linear(q, k, v)
    assert choice.kernel == "reference" and "interprets" in choice.refused["triton"]
    assert explain_linear(q, k, v, kernel="triton").kernel == "triton"


def test_triton_refuses_what_it_cannot_compute(stand_in, monkeypatch):
    with pytest.raises(ValueError, match="takes float16, bfloat16 and float32, float64 given"):
        linear_attention(*three(1, 4, 2, 3, dtype=torch.float64), kernel="triton")
    with pytest.raises(ValueError, match="head sizes up to 128; 160 given"):
        linear_attention(*three(1, 4, 2, 160), kernel="triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ValueError, match="runs on CUDA GPUs; the tensors are on cpu"):
        linear_attention(*three(1, 4, 2, 3), kernel="triton")
    assert not stand_in


BAD = [
    ({"k": (1, 4, 1, 3), "v": (1, 4, 1, 3)}, {}, "k, v: 1 heads given beside 2 of q; .* repeat_interleave"),
    ({"v": (1, 5, 2, 3)}, {}, r"v: shape \(1, 5, 2, 3\) differs from k's"),
    ({"q": (4, 2, 3)}, {}, r"q: shape \(4, 2, 3\) given; attention takes \(B, L, H, D\)"),
    ({"q": (1, 3, 2, 3)}, {"causal": True}, "causal: 3 queries and 4 keys given; .* go into the state"),
    ({"q": (1, 3, 2, 3)}, {"conv_weight": torch.ones(3, 5)}, "conv_weight: 3 queries and 4 keys given"),
    ({}, {"scale": torch.ones(3)}, r"scale: torch.float32 \(3,\) given; it must be floating \(H, D\) = \(2, 3\)"),
    ({}, {"scale": torch.ones(2, 3, dtype=torch.int64)}, r"scale: torch.int64 \(2, 3\) given"),
    ({}, {"scale": torch.ones(2, 3), "options": LinearOptions("elu")}, "scale: given with the feature map 'elu'"),
    ({}, {"conv_weight": torch.ones(2, 5)}, r"conv_weight: shape \(2, 5\) given; it must be \(D, K\)"),
    ({}, {"conv_weight": torch.ones(3, 0)}, r"conv_weight: shape \(3, 0\) given; .* K at least 1"),
    ({}, {"conv_weight": torch.ones(3, 4)}, "conv_weight: 4 taps given; without causal their number must be odd"),
    ({}, {"conv_weight": torch.ones(3, 3), "conv_bias": torch.ones(2)}, r"conv_bias: shape \(2,\) given"),
    ({}, {"conv_bias": torch.ones(3)}, "conv_bias: given without conv_weight"),
    ({}, {"conv_weight": torch.ones(3, 3, dtype=torch.int64)}, "conv_weight: torch.int64 on cpu given"),
    ({}, {"state": new_state(torch.ones(1, 1, 2, 3), 1)}, "state: given without causal=True"),
    ({}, {"causal": True, "state": "half"}, "state: str given; give the LinearState of the call before"),
    ({}, {"causal": True, "state": new_state(torch.ones(1, 1, 2, 4), 1)}, "state: its kv is torch.float32"),
    ({}, {"causal": True, "state": new_state(torch.ones(1, 1, 2, 3), 2)}, r"state: its kv .*must be .*\(1, 2, 3, 3\)"),
    ({}, {"causal": True, "state": new_state(torch.ones(1, 1, 2, 3).double(), 1)}, "its kv is torch.float64"),
    ({}, {"causal": True, "state": new_state(torch.ones(1, 1, 2, 3).half(), 1)}, "its v_rows is torch.float16"),
    ({}, {"causal": True, "state": new_state(torch.ones(1, 1, 2, 3), 1, 5)}, "its v_rows .* and 1 taps"),
    ({}, {"return_state": True}, "return_state: True given without causal=True"),
    ({}, {"lengths": torch.tensor([5])}, r"lengths: \[5\] given; each must be from 0 to the number of keys, 4"),
    ({}, {"lengths": torch.tensor([-1])}, r"lengths: \[-1\] given"),
    ({}, {"lengths": torch.tensor([1.0])}, r"lengths: torch.float32 \(1,\) given; it must be int32 or int64"),
    ({}, {"lengths": torch.tensor([1, 2])}, r"lengths: torch.int64 \(2,\) given"),
]
META = [
    ({"scale": torch.ones(2, 3, device="meta")}, "scale: on meta given, q is on cpu"),
    ({"conv_weight": torch.ones(3, 3, device="meta")}, "conv_weight: torch.float32 on meta given"),
    ({"lengths": torch.ones(1, dtype=torch.int64, device="meta")}, "lengths: on meta given, k is on cpu"),
    ({"state": new_state(torch.ones(1, 1, 2, 3, device="meta"), 1), "causal": True}, "state: its kv is on meta, v on"),
]
BAD += [({}, how, words) for how, words in META]
PACKED = [
    ({"cu_seqlens": torch.ones(2, dtype=torch.int32, device="meta")}, "cu_seqlens: on meta given, q is on cpu"),
    ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens: \[0, 3\] given; it must rise from 0 to .* rows, 4"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "it must rise"),
    ({"cu_seqlens": torch.tensor([4])}, r"cu_seqlens: torch.int64 \(1,\) given"),
    ({"cu_seqlens": torch.tensor([0, 4]), "lengths": torch.tensor([4])}, "lengths: given with cu_seqlens"),
]


@pytest.mark.parametrize(("shapes", "how", "words"), BAD)
def test_bad_calls_are_named(shapes, how, words):
    tensors = {name: torch.ones(*shapes.get(name, (1, 4, 2, 3))) for name in "qkv"}
    with pytest.raises(ValueError, match=words):
        linear_attention(**tensors, **how)


@pytest.mark.parametrize(("how", "words"), PACKED)
def test_bad_packing_is_named(how, words):
    with pytest.raises(ValueError, match=words):
        linear_attention(*three(4, 2, 3), **how)
    with pytest.raises(ValueError, match="cu_seqlens: 3 queries and 4 keys given"):
        linear_attention(torch.ones(3, 2, 3), *three(4, 2, 3)[1:], cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"feature_map": "cosine"}, "feature_map: 'cosine' given; it must be one of 'softmax', 'elu'"),
        ({"norm": "all"}, "norm: 'all' given"),
        ({"power": 0}, "power: 0 given; it must be an integer from 1 to 8"),
        ({"power": 2.5}, "power: 2.5 given"),
        ({"power": True}, "power: True given"),
        ({"eps": -1e-6}, "eps: -1e-06 given"),
        ({"eps": float("nan")}, "eps: nan given"),
    ],
)
def test_bad_options_are_named(how, words):
    with pytest.raises(ValueError, match=words):
        LinearOptions(**how)


def test_inputs_are_never_changed_and_strides_are_honoured():
    wide = sample(2, 7, 3, 2, 4)
    q, k, v = wide.unbind(2)
    weight, lengths = sample(4, 3, seed=1), torch.tensor([5, 7])
    before = [x.clone() for x in (wide, weight, lengths)]
    made = linear_attention(q, k, v, conv_weight=weight, lengths=lengths)
    assert all(torch.equal(a, b) for a, b in zip(before, (wide, weight, lengths), strict=True))
    torch.testing.assert_close(
        made, linear_attention(*(x.contiguous() for x in (q, k, v)), conv_weight=weight, lengths=lengths)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_functional_transforms(causal):
    q, k, v = three(2, 6, 2, 3, dtype=torch.float64)
    weight = sample(3, 3, seed=5)

    def run(q, k, v):
        return linear_attention(q, k, v, conv_weight=weight, causal=causal)

    batched = torch.func.vmap(run)(*(torch.stack([x, 2 * x]) for x in (q, k, v)))
    torch.testing.assert_close(batched[1], run(2 * q, 2 * k, 2 * v))
    grads = torch.func.grad(lambda *x: run(*x).square().sum(), argnums=(0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(grads, torch.autograd.grad(run(*leaves).square().sum(), leaves))
    tangent = sample(2, 6, 2, 3, seed=6)
    _, moved = torch.func.jvp(lambda x: run(q, x, v), (k,), (tangent,))
    step = 1e-6
    torch.testing.assert_close(moved, (run(q, k + step * tangent, v) - run(q, k - step * tangent, v)) / (2 * step))
    assert torch.autograd.gradgradcheck(run, tuple(x[:1, :2, :1].clone().requires_grad_() for x in (q, k, v)))


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_narrows_inputs_alone(causal):
    q, k, v = three(1, 40, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = linear_attention(q, k, v, causal=causal)
    assert made.dtype == torch.bfloat16
    wanted = linear_attention(*(x.bfloat16().float() for x in (q, k, v)), causal=causal)
    assert torch.equal(made, wanted.bfloat16())


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_without_a_break_for_any_length(causal):
    torch.compiler.reset()
    compiled = torch.compile(linear_attention, fullgraph=True, backend="eager")
    more = {"conv_weight": sample(4, 3).float(), "causal": causal, "return_state": causal}
    for length in (70, 41):
        q, k, v = three(1, length, 2, 4)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 1)
        with torch.compiler.set_stance("default" if length == 70 else "fail_on_recompile"):
            made = compiled(q, k, v, **more)
        torch.testing.assert_close(made, linear_attention(q, k, v, **more))
