"""Causal linear attention by the Triton kernels, interpreted where there is no GPU, against the reference in float64;
and streams.

Shapes as in ``plain.py``.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from tests.ops.linear.plain import DEVICE, call, check, poisoned, problem, rel

from allears.ops.attention.linear import ops
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.triton_run import linear_attention_triton


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is full of NaN."""
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(
    ("rows", "heads", "size", "taps", "options"),
    [
        (75, 2, 16, 4, LinearOptions()),
        (33, 3, 8, 0, LinearOptions(power=4)),  # joint norms of heads that no program sees together
        (40, 2, 24, 1, LinearOptions(norm="head")),
        (70, 1, 64, 2, LinearOptions("elu")),
        (17, 1, 128, 0, LinearOptions()),
        (1, 2, 16, 5, LinearOptions(eps=0.5)),
    ],
)
def test_equals_the_reference(rows, heads, size, taps, options):
    """Odd lengths over several parts and tiles, outputs, the state after them, and all gradients."""
    tensors = problem(rows, rows, heads, size, taps=taps, scale=options.feature_map == "focused")
    check(tensors, options, causal=True)


@pytest.mark.parametrize("rows", [2, 40])
def test_goes_on_from_a_state_with_gradients_into_it(rows):
    """Fewer rows than the convolution looks back, and more."""
    tensors = problem(rows, rows, 2, 16, batch=2, taps=4, past=True)
    check(tensors, LinearOptions(), causal=True, count=torch.tensor([7, 50], device=DEVICE))


def test_float16_far_into_a_stream():
    """Sums over a million keys do not leave the range of 16 bits."""
    tensors = problem(40, 40, 1, 16, taps=3, past=True, dtype=torch.float16)
    tensors["kv"], tensors["k_sum"] = 3e5 * tensors["kv"], 3e5 * tensors["k_sum"]
    check(tensors, LinearOptions(), causal=True, count=torch.tensor([1_000_000], device=DEVICE))


def test_lengths():
    tensors = problem(40, 40, 2, 16, batch=3, taps=3)
    check(tensors, LinearOptions(), causal=True, lengths=torch.tensor([7, 40, 0], device=DEVICE))


def test_packed_sequences_with_states():
    """Among them an empty one and one shorter than the convolution."""
    tensors = problem(70, 70, 2, 16, taps=4)
    tensors |= {name: tensors[name][0] for name in "qkv"}
    past = problem(1, 1, 2, 16, batch=4, taps=4, past=True)
    tensors |= {name: past[name] for name in ("kv", "k_sum", "v_rows")}
    cu = torch.tensor([0, 33, 33, 35, 70], device=DEVICE)
    check(tensors, LinearOptions(), causal=True, cu_seqlens=cu, count=torch.tensor([9, 1, 4, 8], device=DEVICE))


def test_parts_of_a_stream_give_the_whole():
    tensors = problem(75, 75, 2, 16, taps=4)
    options = LinearOptions()
    whole, last = call(linear_attention_triton, tensors, options, causal=True)
    outs, state, start = [], None, 0
    for rows in (1, 2, 40, 0, 32):
        part = tensors | {name: tensors[name][:, start : start + rows] for name in "qkv"}
        out, state = call(linear_attention_triton, part, options, causal=True, state=state)
        outs.append(out)
        start += rows
    assert rel(torch.cat(outs, dim=1), whole) < 1e-5
    assert rel(state.kv, last.kv) < 1e-5 and rel(state.k_sum, last.k_sum) < 1e-5
    assert torch.equal(state.count, last.count) and torch.equal(state.v_rows, last.v_rows)


def test_later_rows_are_not_seen():
    tensors = problem(70, 70, 2, 16, taps=3)
    before = call(linear_attention_triton, tensors, LinearOptions(), causal=True)[0]
    for name in "qkv":
        tensors[name][:, 41:] = 1e3
    after = call(linear_attention_triton, tensors, LinearOptions(), causal=True)[0]
    assert torch.equal(after[:, :41], before[:, :41])
    tensors["k"][:, 64:] = torch.nan  # in a later tile
    assert torch.equal(call(linear_attention_triton, tensors, LinearOptions(), causal=True)[0][:, :41], before[:, :41])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_operators_describe_what_they_return(causal, packed):
    """Without data, as torch.compile runs them: the shapes, dtypes and strides of all results and gradients."""
    q, k, v, scale, weight, bias = problem(6, 6, 2, 8, taps=2 if causal else 3, dtype=torch.float16).values()
    cu = torch.tensor([0, 2, 6], device=DEVICE) if packed else None
    count = torch.zeros(2 if packed else 1, dtype=torch.int64, device=DEVICE)
    rest = (cu, None, "focused", 3, "channels", 1e-6)
    tests = ("test_schema", "test_faketensor")
    parameters = (scale, weight, True)
    if causal:
        given = (q, k, v, scale, weight, bias, None, None, count, *rest)
        torch.library.opcheck(ops.causal_triton, given, test_utils=tests)
        _, kv, k_sum = ops.causal_triton(*given)
        given = (q, kv, k_sum, q, k, v, *parameters, kv, k_sum, count, *rest)
        torch.library.opcheck(ops.causal_triton_backward, given, test_utils=tests)
    else:
        torch.library.opcheck(ops.linear_triton, (q, k, v, scale, weight, bias, *rest), test_utils=tests)
        _, matrix, sums = ops.linear_triton(q, k, v, scale, weight, bias, *rest)
        given = (q, q, k, v, *parameters, cu, None, matrix, sums, *rest[2:])
        torch.library.opcheck(ops.linear_triton_backward, given, test_utils=tests)
