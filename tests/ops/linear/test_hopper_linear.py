"""Linear attention's CUDA C++ kernels on a Hopper GPU, against the reference in float64 and the Triton kernels.

Shapes as in ``plain.py``.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the pass between the kernels needs Triton: pip install 'allears[gpu]'")

from tests.ops.linear.plain import call, check, poisoned, problem, rel

from allears.ops import nvrtc
from allears.ops.attention.linear import triton_groups_host as groups
from allears.ops.attention.linear.hopper import host
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.reference import linear_attention_reference
from allears.ops.attention.linear.triton_run import linear_attention_triton

pytestmark = pytest.mark.gpu
PLAIN = LinearOptions()
TOLERANCES = {torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """Fresh memory is full of NaN; which kernels ran."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these kernels are for compute capability 9.0")
    if nvrtc.available():
        pytest.skip(nvrtc.available())
    monkeypatch.setattr(torch, "empty", poisoned)
    names = []
    for module, name in ((host, "part_states"), (host, "output"), (groups, "_part_states"), (groups, "_output")):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, n=name, r=run: names.append(n) or r(*given))
    return names


def forward(tensors, options=PLAIN, **how):
    """The output, held to that of the reference, the difference of any row to the norm of all."""
    out = call(linear_attention_triton, tensors, options, **how)[0]
    exact = {name: x.double() for name, x in tensors.items()}
    wanted = call(linear_attention_reference, exact, options, **how)[0]
    assert out.shape == wanted.shape and out.dtype == tensors["q"].dtype
    assert rel(out, wanted) < TOLERANCES[out.dtype]
    rows = (out.double() - wanted).flatten(-2).norm(dim=-1) / wanted.flatten(-2).norm(dim=-1).mean()
    assert rows.max() < 20 * TOLERANCES[out.dtype]
    return out


FORMS = [(1, 64), (2, 64), (3, 64), (6, 64), (8, 64), (4, 16), (8, 16), (32, 16), (2, 32), (16, 32)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), FORMS)
def test_equals_the_reference(ran, heads, size, dtype):
    forward(problem(1003, 1003, heads, size, batch=2, taps=5, dtype=dtype))
    forward(problem(37, 37, heads, size, batch=3, taps=5, scale=False, dtype=dtype))
    assert ran == ["part_states", "output"] * 2


@pytest.mark.parametrize("taps", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("power", [2, 3])
@pytest.mark.parametrize(("heads", "size"), [(8, 64), (8, 16)])
def test_taps_powers_and_lengths_around_a_tile(ran, heads, size, power, taps):
    options = LinearOptions(power=power)
    for rows in (1, 2, 31, 32, 33, 127, 128, 129, 4999):
        forward(problem(rows, rows, heads, size, taps=taps, dtype=torch.float16), options)
    tensors = problem(130, 130, heads, size, taps=taps, dtype=torch.float16)
    tensors.pop("conv_bias", None)
    forward(tensors, options)
    assert set(ran) == {"part_states", "output"}


@pytest.mark.parametrize(("queries", "keys"), [(1, 1000), (1000, 1), (777, 3001), (3001, 777)])
def test_a_context(ran, queries, keys):
    forward(problem(queries, keys, 8, 64, batch=3, dtype=torch.float16))
    forward(problem(queries, keys, 8, 16, batch=3, dtype=torch.bfloat16))
    assert ran == ["part_states", "output"] * 2


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_lengths_and_packed_sequences(ran, size, wide):
    """What stands behind a length, NaN too, changes nothing; nothing leaks between sequences."""
    tensors = problem(300, 300, 8, size, batch=5, taps=5, dtype=torch.float16)
    lengths = torch.tensor([137, 300, 0, 1, 297], device="cuda", dtype=wide)
    before = forward(tensors, lengths=lengths)
    hidden = (torch.arange(300, device="cuda")[None] >= lengths[:, None])[..., None, None]
    for name in "kv":
        tensors[name] = tensors[name].masked_fill(hidden, torch.nan)
    assert torch.equal(call(linear_attention_triton, tensors, PLAIN, lengths=lengths)[0], before)
    tensors = problem(1100, 1100, 8, size, taps=5, dtype=torch.float16)
    tensors |= {name: tensors[name][0] for name in "qkv"}
    offsets = [0, 45, 45, 46, 110, 1100]
    cu = torch.tensor(offsets, device="cuda", dtype=wide)
    before = forward(tensors, cu_seqlens=cu)
    for name in "qkv":
        tensors[name][46:110] = torch.nan
    after = call(linear_attention_triton, tensors, PLAIN, cu_seqlens=cu)[0]
    assert after[46:110].isnan().all()
    assert torch.equal(after[:46], before[:46]) and torch.equal(after[110:], before[110:])
    assert set(ran) == {"part_states", "output"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("heads", "size"), [(8, 64), (8, 16)])
def test_bad_rows_stay_where_they_are(heads, size, bad):
    """One of q in its row; one of k reaches all; one of v behind the length none."""
    tensors = problem(450, 450, heads, size, taps=5, dtype=torch.bfloat16)
    row = torch.arange(450, device="cuda")
    hidden = tensors | {"v": tensors["v"].clone()}
    hidden["v"][0, 190:] = bad
    out = call(linear_attention_triton, hidden, PLAIN, lengths=torch.tensor([190], device="cuda"))[0]
    assert out.isfinite().all()
    tensors["q"][0, 170, heads - 1, 2] = bad
    out = call(linear_attention_triton, tensors, PLAIN)[0]
    assert torch.equal(~out.isfinite().all(-1).all(-1)[0], row == 170)
    tensors["k"][0, 7, 0, 2] = torch.nan
    assert call(linear_attention_triton, tensors, PLAIN)[0].isnan().any(-1).all()


def test_parameters_as_modules_have_them(ran):
    """Views of one projection, taps that all heads share, weights in 16 bits."""
    tensors = problem(335, 335, 4, 32, batch=2, taps=3, dtype=torch.bfloat16)
    weight, bias = tensors["conv_weight"][0].bfloat16(), tensors["conv_bias"][0].bfloat16()
    shared = {"conv_weight": weight.float().expand(4, 32, 3), "conv_bias": bias.float().expand(4, 32)}
    wanted = call(linear_attention_triton, tensors | shared, PLAIN)[0]
    beside = torch.stack([tensors[name] for name in "qkv"], 2)
    tensors |= {"conv_weight": weight, "conv_bias": bias} | dict(zip("qkv", beside.unbind(2), strict=True))
    assert torch.equal(call(linear_attention_triton, tensors, PLAIN)[0], wanted)
    assert ran == ["part_states", "output"] * 2


def test_what_they_do_not_take_goes_to_triton(ran):
    tensors = problem(65, 65, 8, 64, taps=5, dtype=torch.float16)
    forward(tensors, LinearOptions(norm="head"))
    flat = torch.zeros(65 * 516, dtype=torch.float16, device="cuda").as_strided((1, 65, 8, 64), (65 * 516, 516, 64, 1))
    forward(tensors | {"q": flat.copy_(tensors["q"])})
    assert ran == ["_part_states", "_output", "part_states", "_output"]


@pytest.mark.parametrize(("heads", "size"), [(8, 64), (8, 16)])
def test_gradients_and_a_long_sequence(ran, heads, size):
    check(problem(20_011, 20_011, heads, size, taps=5, dtype=torch.bfloat16), PLAIN)
    tensors = problem(100_003, 100_003, heads, size, taps=5, dtype=torch.bfloat16)
    first, second = (call(linear_attention_triton, tensors, PLAIN)[0] for _ in range(2))
    assert torch.equal(first, second)
    forward(tensors)
    assert set(ran) == {"part_states", "output"}


def test_rows_beyond_two_billion_numbers(ran):
    """Offsets of 64 bits: the last 64 rows of more than 2^31 numbers are as those rows alone."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    tensors = problem(64, 64, 8, 64, taps=5, dtype=torch.bfloat16)
    long = {}
    for name in "qkv":
        long[name] = torch.zeros(1, 2**22 + 69, 8, 64, dtype=torch.bfloat16, device="cuda")
        long[name][:, -64:] = tensors[name]
    context = {"k": tensors["k"], "v": tensors["v"], "scale": tensors["scale"]}
    out = call(linear_attention_triton, {"q": long["q"], **context}, PLAIN)[0]
    wanted = call(linear_attention_triton, {"q": tensors["q"], **context}, PLAIN)[0]
    assert torch.equal(out[:, -64:], wanted)
    del out
    assert rel(sums_of(long["k"], long["v"]), sums_of(tensors["k"], tensors["v"])) < 1e-2  # zeros of v add nothing
    assert set(ran) == {"part_states", "output"}


def sums_of(k, v):
    """The sum of phi(k)^T v over all rows."""
    how = groups.Call("focused", 3, "channels", 1e-6)
    return groups.group_forward(k, k, v, None, None, None, how)[1].float() * k.shape[1]
