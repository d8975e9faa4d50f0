"""The door: choice and refusal of kernels, low-bit families, compile, autocast and the transforms of torch.func."""

import math
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from allears import AttentionSpec, attention, explain
from allears.ops.attention import Backend, Facts, LowBit, backends, dispatch
from allears.ops.attention.dense.flash import flash_cpu, flash_cpu_backward

PLAIN = Facts("cuda", (9, 0), torch.bfloat16, 128, False, "none", False, True, False, False, False, False, False, False)


def tensors(queries=6, keys=6, heads=4, groups=2, size=8, dtype=torch.float32):
    torch.manual_seed(queries * 31 + keys)
    q = torch.randn(2, queries, heads, size, dtype=dtype)
    k, v = torch.randn(2, 2, keys, groups, size, dtype=dtype)
    return q, k, v


def kernel(name):
    return next(backend for backend in backends() if backend.name == name)


def test_explain_names_the_kernel_and_every_other_one():
    q, k, v = tensors()
    choice = explain(q, k, v)
    assert choice.kernel == "sdpa" and choice.able == ("sdpa-flash", "sdpa-math", "reference")
    assert set(choice.refused) == {"sdpa-cudnn", "flash-attn-4"}
    assert explain(q, k, v, return_lse=True).kernel == "sdpa-flash"
    assert "log-sum-exp" in explain(q, k, v, return_lse=True).refused["sdpa"]
    assert explain(q, k, v, AttentionSpec(kernel="sdpa-math")).kernel == "sdpa-math"


def test_a_named_kernel_runs_or_raises():
    q, k, v = tensors()
    with pytest.raises(ValueError, match=r"'sdpa-math' cannot run this call: .*log-sum-exp"):
        attention(q, k, v, AttentionSpec(kernel="sdpa-math"), return_lse=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'flash-attn-4' cannot run this call: no CUDA GPU"):
            attention(q, k, v, AttentionSpec(kernel="flash-attn-4"))
    with pytest.raises(ValueError, match="known for 'exact' are auto, sdpa"):
        attention(q, k, v, AttentionSpec(kernel="fast"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sdpa-flash", {}, ""),
        ("sdpa-flash", {"dtype": torch.float32}, "takes float16 and bfloat16"),
        ("sdpa-flash", {"mask": "bool"}, "no mask on a GPU"),
        ("sdpa-flash", {"head_dim": 264}, "up to 256"),
        ("sdpa-flash", {"blind": True, "causal": True}, "without a key"),
        ("sdpa-flash", {"capability": (7, 5)}, "needs compute capability 8.0; this GPU has 7.5"),
        ("sdpa-flash", {"packed": True, "lse": True, "grad": True}, ""),
        ("sdpa-cudnn", {"mask": "bool"}, ""),
        ("sdpa-cudnn", {"mask": "learned"}, "no gradient"),
        ("sdpa-cudnn", {"head_dim": 256}, ""),
        ("sdpa-cudnn", {"head_dim": 256, "grad": True}, "up to 128"),
        ("sdpa-cudnn", {"head_dim": 72, "device": "cpu", "capability": None}, "the tensors are on cpu"),
        ("sdpa-cudnn", {"head_dim": 100}, "multiples of 8"),
        ("sdpa-cudnn", {"lse": True}, "log-sum-exp"),
        ("flash-attn-4", {"lse": True, "packed": True, "grad": True}, ""),
        ("flash-attn-4", {"capability": (12, 0)}, "9.0 and 10.x; this GPU has 12.0"),
        ("flash-attn-4", {"mask": "float"}, "takes no mask"),
        ("flash-attn-4", {"dtype": torch.float64}, "takes float16"),
        ("flash-attn-4", {"grad": True, "tracing": True}, "cannot be traced"),
        ("flash-attn-4", {"head_dim": 256, "capability": (10, 0)}, "up to 128"),
        ("flash-attn-4", {"empty": True}, "no keys"),
    ],
)
def test_refusals_of_gpu_kernels(name, change, message):
    reason = kernel(name).refuses(PLAIN._replace(**change), AttentionSpec())
    assert message in reason and bool(message) == bool(reason)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), "q: shape"),
        (lambda q, k, v: (q, k, v[:, 1:]), "v: shape"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), "k: shape"),
        (lambda q, k, v: (q[:, :, :3], k, v), "do not divide"),
        (lambda q, k, v: (q.half(), k, v), "dtypes"),
        (lambda q, k, v: tuple(x.to(torch.float8_e4m3fn) for x in (q, k, v)), "dtypes"),
        (lambda q, k, v: (q, k.to("meta"), v), "move all three to one device"),
        (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), "must not be 0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*tensors()))


def test_bad_mask_and_spec():
    q, k, v = tensors(4, 4)
    with pytest.raises(ValueError, match="does not broadcast"):
        attention(q, k, v, mask=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not broadcast"):
        attention(q, k, v, mask=torch.ones(1, 2, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="dtype"):
        attention(q, k, v, mask=torch.ones(4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="move the mask"):
        attention(q, k, v, mask=torch.ones(4, 4, device="meta"))
    with pytest.raises(ValueError, match="scale"):
        AttentionSpec(scale=0.0)
    with pytest.raises(ValueError, match="numerics: 'int4'"):
        AttentionSpec(numerics="int4")


@pytest.fixture
def lowbit(monkeypatch):
    """A low-bit family of two kernels: one without a backward, and one that halves the output."""
    seen = {}

    def forward_only(q, k, v, *, causal, scale, options, return_lse):
        seen.update(causal=causal, scale=scale, options=options, return_lse=return_lse)
        return attention(q, k, v, AttentionSpec(causal=causal, scale=scale), return_lse=return_lse)

    def halved(q, k, v, *, causal, scale, options, return_lse, mask=None):
        return 0.5 * attention(q, k, v, AttentionSpec(causal=causal, scale=scale), mask=mask)

    def no_mask(facts, spec):
        return "takes no mask" if facts.mask != "none" else ""

    module = ModuleType("allears.ops.attention.lowbit.backends")
    module.BACKENDS = {
        "int8_fp8": (
            Backend("quick", forward_only, no_mask, trains=lambda spec: spec.lowbit.backward != "none"),
            Backend("half", halved, lambda facts, spec: ""),
        )
    }
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys.modules["allears.ops.attention.lowbit"], "backends", module, raising=False)
    for kept in ("_decisions", "_lowbit"):
        monkeypatch.setattr(f"allears.ops.attention.dispatch.{kept}", {})
    return seen


def test_a_lowbit_family_is_one_import(lowbit):
    q, k, v = tensors()
    options = LowBit(smooth_k=False)
    spec = AttentionSpec(numerics="int8_fp8", causal=True, lowbit=options)
    torch.testing.assert_close(attention(q, k, v, spec), attention(q, k, v, AttentionSpec(causal=True)))
    assert lowbit == {"causal": True, "scale": 1 / math.sqrt(8), "options": options, "return_lse": False}
    choice = explain(q, k, v, spec, mask=torch.ones(6, 6, dtype=torch.bool))
    assert choice.kernel == "half" and choice.refused == {"quick": "takes no mask"}
    with pytest.raises(ValueError, match="'quick' cannot run this call: takes no mask"):
        attention(q, k, v, AttentionSpec("quick", numerics="int8_fp8"), mask=torch.ones(6, 6))
    with pytest.raises(ValueError, match="known for 'int8_fp8' are auto, quick, half"):
        attention(q, k, v, AttentionSpec("sdpa", numerics="int8_fp8"))
    with pytest.raises(ValueError, match="'sagebwd' has no kernels; there are some for exact, int8_fp8"):
        attention(q, k, v, AttentionSpec(numerics="sagebwd"))


def test_a_lowbit_family_compiles_whole(lowbit):
    q, k, v = tensors()
    spec = AttentionSpec(numerics="int8_fp8", lowbit=LowBit(smooth_k=False))
    compiled = torch.compile(lambda *x: attention(*x, spec), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert lowbit["options"] == spec.lowbit


def test_gradients_asked_of_a_kernel_without_any(lowbit):
    q, k, v = tensors()
    spec = AttentionSpec("quick", numerics="int8_fp8")
    q.requires_grad_()
    with pytest.raises(ValueError, match="it has no backward and gradients are asked for"):
        attention(q, k, v, spec)
    with torch.no_grad():
        attention(q, k, v, spec)
    attention(q.detach(), k, v, spec)
    attention(q, k, v, AttentionSpec("quick", numerics="int8_fp8", lowbit=LowBit(backward="drop_in")))
    assert explain(q, k, v, AttentionSpec(numerics="int8_fp8")).kernel == "half"


def test_an_absent_family_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "allears.ops.attention.lowbit.backends", None)
    for kept in ("_decisions", "_lowbit"):
        monkeypatch.setattr(f"allears.ops.attention.dispatch.{kept}", {})
    with pytest.raises(ValueError, match="numerics: 'nvfp4' has no kernels in this installation"):
        attention(*tensors(), AttentionSpec(numerics="nvfp4"))


@pytest.mark.parametrize(("name", "dynamic"), [("auto", True), ("sdpa-math", False), ("reference", False)])
def test_compiles_whole(name, dynamic):
    def run(q, k, v, mask):
        out = attention(q, k, v, AttentionSpec(kernel=name, causal=True, scale=0.4), mask=mask)
        return out.square().sum()

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)):
        leaves = [x.requires_grad_() for x in tensors(5, 9)]
        function(*leaves, torch.ones(5, 9, dtype=torch.bool).tril(6)).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_lse_and_its_gradient():
    def run(q, k, v):
        out, lse = attention(q, k, v, return_lse=True)
        return out.square().sum() + lse.sin().sum()

    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.requires_grad_() for x in tensors(5, 9)]
        function(*leaves).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_operators_keep_their_contract(masked):
    q, k, v = tensors(5, 7, groups=4)
    mask = torch.randn(2, 4, 5, 7) if masked else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(flash_cpu, (*leaves, mask, False, 0.3))
    out, lse = (x.detach() for x in flash_cpu(*leaves, mask, False, 0.3))
    inputs = (out, *(x.detach() for x in leaves), mask, out, lse, False, 0.3)
    torch.library.opcheck(flash_cpu_backward, inputs)


@pytest.mark.parametrize("name", ["sdpa", "sdpa-flash", "reference"])
def test_autocast_narrows_as_torch_does(name):
    q, k, v = tensors()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.bfloat16().transpose(1, 2) for x in (q, k, v)), enable_gqa=True
    ).transpose(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k.bfloat16(), v, AttentionSpec(kernel=name))
        wide = attention(*(x.double() for x in (q, k, v)), AttentionSpec(kernel=name))
    assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
    torch.testing.assert_close(out, wanted, atol=0.01, rtol=0.01)
    torch.testing.assert_close(wide.float(), attention(q, k, v), atol=2e-6, rtol=1e-5)


def test_checkpointing_recomputes_the_same():
    grads = []
    for kept in (True, False):
        leaves = [x.requires_grad_() for x in tensors(5, 9)]

        def run(*x):
            out, lse = attention(*x, return_lse=True)
            return out.square().sum() + lse.sum()

        (run(*leaves) if kept else checkpoint(run, *leaves, use_reentrant=False)).backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch runs its CPU flash kernel one by one
@pytest.mark.parametrize("name", ["sdpa", "sdpa-math", "reference"])
def test_vmap_and_grad_transforms(name):
    q, k, v = (torch.stack([x, x + 1, x * 2]) for x in tensors(4, 5))
    spec = AttentionSpec(kernel=name, causal=True)
    batched = torch.func.vmap(lambda *x: attention(*x, spec))(q, k, v)
    for i in range(3):
        torch.testing.assert_close(batched[i], attention(q[i], k[i], v[i], spec))
    grad = torch.func.grad(lambda x: attention(x, k[0], v[0], spec).square().sum())(q[0])
    leaf = q[0].clone().requires_grad_()
    attention(leaf, k[0], v[0], spec).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("name", ["sdpa-math", "reference"])
def test_forward_mode_derivative(name):
    primals = tensors(4, 5, dtype=torch.float64)
    tangents = tuple(torch.randn_like(x) for x in primals)
    spec = AttentionSpec(kernel=name)
    _, moved = torch.func.jvp(lambda *x: attention(*x, spec), primals, tangents)
    step = 1e-6
    ahead, behind = (
        attention(*(x + sign * step * t for x, t in zip(primals, tangents, strict=True)), spec) for sign in (1, -1)
    )
    torch.testing.assert_close(moved, (ahead - behind) / (2 * step), atol=1e-7, rtol=1e-6)


def test_decisions_are_kept_for_equal_facts_only():
    q, k, v = tensors()
    lookups = []
    first = explain(q, k, v, return_lse=True).kernel
    for _ in range(3):
        lookups.append(explain(q, k, v).kernel)
    lookups.append(explain(q, k, v, return_lse=True).kernel)
    lookups.append(explain(q, k[:, :0], v[:, :0]).kernel)
    assert (first, lookups) == ("sdpa-flash", ["sdpa", "sdpa", "sdpa", "sdpa-flash", "reference"])


def test_a_trace_leaves_no_decision_behind():
    q = torch.randn(1, 5, 2, 8)
    kept = dict(dispatch._decisions)
    traced = torch.jit.trace(lambda x: attention(x, x, x), (q,), check_trace=False)
    assert dispatch._decisions == kept
    torch.testing.assert_close(traced(q), attention(q, q, q))
