"""Linear attention over both directions by the Triton kernels, interpreted where there is no GPU, against the reference
in float64. The interpreter multiplies bfloat16 by its bits, so that 16 bits are float16 here.

Shapes as in ``plain.py``.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from tests.ops.linear.plain import DEVICE, call, check, poisoned, problem, rel

from allears.ops.attention.linear.call import linear_attention
from allears.ops.attention.linear.one_call import Call
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.reference import linear_attention_reference
from allears.ops.attention.linear.triton_host import plan, tile_for
from allears.ops.attention.linear.triton_run import linear_attention_triton


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is full of NaN."""
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "size", "taps", "options"),
    [
        (37, 37, 2, 8, 5, LinearOptions()),
        (17, 40, 3, 8, 0, LinearOptions(power=4)),
        (9, 9, 9, 64, 3, LinearOptions(power=2)),  # two groups of heads, whose norms are joint
        (9, 9, 2, 128, 1, LinearOptions(power=5)),
        (21, 17, 2, 24, 0, LinearOptions(norm="head")),
        (18, 18, 1, 16, 3, LinearOptions(power=1)),
        (1, 1, 2, 16, 5, LinearOptions(eps=0.5)),
    ],
)
def test_focused_equals_the_reference(queries, keys, heads, size, taps, options):
    """Odd lengths, L_q below and above L_k, padded heads and head sizes, any power, outputs and all gradients."""
    check(problem(queries, keys, heads, size, taps=taps), options)


@pytest.mark.parametrize("kind", ["elu", "relu", "softmax"])
def test_other_feature_maps(kind):
    check(problem(17, 17, 3, 24, taps=3, scale=False), LinearOptions(kind))


def test_float16():
    check(problem(20, 20, 2, 32, taps=3, dtype=torch.float16), LinearOptions())


def test_strides_and_shared_taps():
    tensors = problem(18, 18, 2, 16, batch=2, taps=3)
    tensors["conv_weight"], tensors["conv_bias"] = tensors["conv_weight"][0], tensors["conv_bias"][0]
    plain = call(linear_attention_triton, tensors, LinearOptions())[0]
    for name in "qkv":
        tensors[name] = tensors[name].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert torch.equal(call(linear_attention_triton, tensors, LinearOptions())[0], plain)
    check(tensors, LinearOptions())


def test_lengths():
    """Keys behind a length are not read, be they NaN, and an entry without keys gives the bias of the convolution."""
    tensors = problem(20, 20, 2, 16, batch=3, taps=3)
    lengths = torch.tensor([7, 20, 0], device=DEVICE)
    check(tensors, LinearOptions(), lengths=lengths)
    before = call(linear_attention_triton, tensors, LinearOptions(), lengths=lengths)[0]
    hidden = torch.arange(20, device=DEVICE)[None] >= lengths[:, None]
    for name in "kv":
        tensors[name] = tensors[name].masked_fill(hidden[..., None, None], torch.nan)
    assert torch.equal(call(linear_attention_triton, tensors, LinearOptions(), lengths=lengths)[0], before)
    assert torch.equal(before[2], tensors["conv_bias"].expand(20, 2, 16))


def test_packed_sequences():
    """Among them an empty one and one of a single row."""
    tensors = problem(40, 40, 2, 16, taps=5)
    tensors |= {name: tensors[name][0] for name in "qkv"}
    cu = torch.tensor([0, 20, 20, 21, 40], dtype=torch.int32, device=DEVICE)
    check(tensors, LinearOptions(), cu_seqlens=cu)
    assert torch.equal(
        *(call(linear_attention_triton, tensors, LinearOptions(), cu_seqlens=x)[0] for x in (cu, cu.long()))
    )


def test_without_queries_or_keys():
    tensors = problem(0, 5, 2, 16)
    got = check(tensors, LinearOptions())
    assert got["d_k"].eq(0).all() and got["d_scale"].eq(0).all()
    tensors = problem(5, 0, 2, 16)
    got = check(tensors, LinearOptions())
    assert not got["out"].any() and not got["d_q"].any()


def test_tiny_and_large_features():
    """Rows without a positive channel, and rows near the largest that the third power holds."""
    tensors = problem(20, 20, 2, 16)
    for name in "qk":
        tensors[name][:, 3] = -1.0
        tensors[name][:, 4] *= 8000.0
    check(tensors, LinearOptions(), tolerance=1e-4)


def test_a_bad_row_of_keys_reaches_all_and_one_of_queries_itself():
    tensors = problem(20, 20, 2, 16)
    tensors["q"][0, 3, 0, 2] = torch.nan
    out = call(linear_attention_triton, tensors, LinearOptions())[0]
    assert torch.equal(out.isnan().any(-1).any(-1)[0], torch.arange(20, device=DEVICE) == 3)
    tensors["v"][0, 7, 0, 2] = torch.nan
    out = call(linear_attention_triton, tensors, LinearOptions())[0]
    assert out[0, :, 0, 2].isnan().all() and not out[0, 5, 1].isnan().any()


def test_parts_cover_every_row_once_whatever_their_number(monkeypatch):
    tensors = problem(70, 70, 8, 8, taps=5)
    made = []
    for processors in (1, 3):
        monkeypatch.setattr("allears.ops.attention.linear.triton_host.processors", lambda device, n=processors: n)
        made.append(call(linear_attention_triton, tensors, LinearOptions())[0])
    wanted = call(linear_attention_reference, {n: x.double() for n, x in tensors.items()}, LinearOptions())[0]
    assert all(rel(out, wanted) < 1e-5 for out in made)
    run = plan(tensors["q"], Call("focused", 3, "channels", 1e-6))
    assert run.grid[0] > 1 and run.tile == tile_for(tensors["q"])


def test_the_door_runs_it():
    tensors = problem(20, 20, 2, 16)
    q, k, v, scale = tensors.values()
    out = linear_attention(q, k, v, scale=scale, kernel="triton")
    assert torch.equal(out, call(linear_attention_triton, tensors, LinearOptions())[0])
