"""What the tests of the Triton kernels of linear attention share: calls, and the reference in float64.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, K taps; packed T rows of S sequences; E entries.
"""

import math

import torch

from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.reference import linear_attention_reference
from allears.ops.attention.linear.state import LinearState
from allears.ops.attention.linear.triton_run import linear_attention_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
empty = torch.empty


def poisoned(*shape, **how):
    """torch.empty, full of what a kernel must overwrite."""
    tensor = empty(*shape, **how)
    return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor


def rel(got, wanted):
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def problem(queries, keys, heads, size, *, batch=1, taps=0, scale=True, past=False, dtype=torch.float32, seed=0):
    """Tensors of a call by their names; those that are None are left out."""
    generator = torch.Generator().manual_seed(seed + 31 * queries + keys)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    made = {"q": normal(batch, queries, heads, size), "k": normal(batch, keys, heads, size)}
    made = {name: x.to(dtype) for name, x in (made | {"v": normal(batch, keys, heads, size)}).items()}
    if scale:
        made["scale"] = normal(heads, size).sigmoid() + 0.3
    if taps:
        made |= {"conv_weight": normal(heads, size, taps), "conv_bias": normal(heads, size)}
    if past:
        made |= {"kv": normal(batch, heads, size, size).abs(), "k_sum": 5 * normal(batch, heads, size).abs()}
        made["v_rows"] = normal(batch, max(taps - 1, 0), heads, size).to(dtype)
    return {name: x.to(DEVICE) for name, x in made.items()}


def call(run, tensors, options, count=None, **how):
    """(out, state) of ``run``; the state of ``count`` keys before, if the tensors have one."""
    given = dict(tensors)
    if "kv" in given:
        kv, k_sum, v_rows = (given.pop(name) for name in ("kv", "k_sum", "v_rows"))
        how["state"] = LinearState(kv, k_sum, count, v_rows)
    q, k, v = (given.pop(name) for name in "qkv")
    return run(q, k, v, options, **given, **how)


def outputs_and_gradients(run, tensors, options, **how):
    """Outputs (out, and new_kv, new_k_sum, new_v_rows of the state), and gradients d_NAME of all tensors."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out, state = call(run, leaves, options, **how)
    made = {"out": out}
    if state is not None:
        made |= {"new_kv": state.kv, "new_k_sum": state.k_sum, "new_v_rows": state.v_rows}
    generator = torch.Generator().manual_seed(1)
    errors = {name: torch.randn(x.shape, generator=generator).half().to(x) for name, x in made.items()}
    reached = [name for name, x in made.items() if x.requires_grad]
    gradients = torch.autograd.grad(
        [made[name] for name in reached], list(leaves.values()), [errors[name] for name in reached], allow_unused=True
    )
    return made | {f"d_{name}": x for name, x in zip(leaves, gradients, strict=True)}


def check(tensors, options, tolerance=None, **how):
    """Outputs and gradients of the kernels against those of the reference in float64, and inputs that stay."""
    before = {name: x.clone() for name, x in tensors.items()}
    dtype = tensors["q"].dtype
    got = outputs_and_gradients(linear_attention_triton, tensors, options, **how)
    assert all(torch.equal(x, before[name]) for name, x in tensors.items())
    doubles = {name: x.double() for name, x in tensors.items()}
    wanted = outputs_and_gradients(linear_attention_reference, doubles, options, **how)
    assert set(got) == set(wanted)
    for name, want in wanted.items():
        if want is None or not want.numel():
            assert got[name] is None or not got[name].numel(), name
            continue
        like = tensors.get(name.removeprefix("d_"), tensors["q"] if name in ("out", "new_v_rows") else None)
        assert got[name].shape == want.shape and got[name].dtype == (torch.float32 if like is None else like.dtype), (
            name
        )
        assert rel(got[name], want) < (tolerance or TOLERANCES[dtype]), (name, rel(got[name], want))
    return got


__all__ = ["DEVICE", "LinearOptions", "call", "check", "outputs_and_gradients", "poisoned", "problem", "rel"]
