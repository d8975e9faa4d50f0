"""Linear attention 64 channels at a time, by the Triton kernels for adjoining channels, interpreted where there is no
GPU, against the reference in float64. 16 bits are float16 here; see ``test_triton_both_ways.py``.

Shapes as in ``plain.py``.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from tests.ops.linear.plain import DEVICE, call, check, poisoned, problem, rel

from allears.ops.attention.linear import triton_groups_host as host
from allears.ops.attention.linear.one_call import Call
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.reference import linear_attention_reference
from allears.ops.attention.linear.triton_run import linear_attention_triton


def half(*shape, **how):
    return problem(*shape, dtype=torch.float16, **how)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Fresh memory is full of NaN; how often the kernels of this file ran, and not those of CUDA C++."""
    monkeypatch.setattr(host, "HOPPER_STATES", False)
    monkeypatch.setattr(host, "HOPPER_OUTPUT", False)
    monkeypatch.setattr(torch, "empty", poisoned)
    ran = []
    forward = host.group_forward
    monkeypatch.setattr(host, "group_forward", lambda *given: ran.append(given) or forward(*given))
    return ran


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "size", "taps", "options"),
    [
        (35, 35, 2, 64, 5, LinearOptions()),
        (65, 17, 8, 16, 0, LinearOptions(power=2)),
        (66, 7, 4, 32, 0, LinearOptions(norm="head")),
        (3, 3, 1, 64, 7, LinearOptions(power=1)),
        (35, 35, 4, 16, 3, LinearOptions("elu")),
        (35, 35, 2, 32, 3, LinearOptions("softmax")),
        (35, 35, 4, 16, 1, LinearOptions("relu")),
    ],
)
def test_equals_the_reference_with_gradients(counted, queries, keys, heads, size, taps, options):
    """Odd lengths, one group and more, one head a group and more, lengths below the taps; the backward reads what this
    forward left."""
    tensors = half(queries, keys, heads, size, taps=taps, scale=options.feature_map == "focused")
    check(tensors, options)
    assert len(counted) == 1


def forward(tensors, **how):
    """The output, held to that of the reference."""
    out = call(linear_attention_triton, tensors, LinearOptions(), **how)[0]
    exact = {name: x.double() for name, x in tensors.items()}
    assert rel(out, call(linear_attention_reference, exact, LinearOptions(), **how)[0]) < 2e-3
    return out


def test_lengths_and_packed_sequences(counted):
    tensors = half(75, 75, 4, 16, batch=3, taps=5)
    lengths = torch.tensor([37, 75, 0], device=DEVICE)
    before = forward(tensors, lengths=lengths)
    hidden = torch.arange(75, device=DEVICE)[None] >= lengths[:, None]
    for name in "kv":
        tensors[name] = tensors[name].masked_fill(hidden[..., None, None], torch.nan)
    assert torch.equal(call(linear_attention_triton, tensors, LinearOptions(), lengths=lengths)[0], before)
    tensors = half(110, 110, 4, 16, taps=5)
    tensors |= {name: tensors[name][0] for name in "qkv"}
    forward(tensors, cu_seqlens=torch.tensor([0, 45, 45, 46, 110], dtype=torch.int32, device=DEVICE))
    assert len(counted) == 3


def test_projections_that_lie_beside_one_another_and_shared_taps(counted):
    """As modules call it: q, k and v are views of one tensor, and all heads have the same taps."""
    tensors = half(35, 35, 2, 32, batch=2, taps=3)
    weight, bias = tensors["conv_weight"][0], tensors["conv_bias"][0]
    shared = tensors | {"conv_weight": weight.expand(2, 32, 3), "conv_bias": bias.expand(2, 32)}
    wanted = call(linear_attention_triton, shared, LinearOptions())[0]
    beside = torch.stack([tensors[name] for name in "qkv"], 2)
    tensors |= {"conv_weight": weight, "conv_bias": bias}
    tensors |= dict(zip("qkv", beside.unbind(2), strict=True))
    assert torch.equal(call(linear_attention_triton, tensors, LinearOptions())[0], wanted)
    assert len(counted) == 2
    forward(tensors)


def test_parts_and_bad_rows(monkeypatch):
    """Any number of parts covers every row once; a NaN in q stays in its row, one in k reaches all."""
    tensors = half(150, 150, 4, 16, taps=5)
    for count in (1, 3):
        monkeypatch.setattr(host, "processors", lambda device, n=count: n)
        forward(tensors)
    tensors["q"][0, 70, 0, 2] = torch.nan
    out = call(linear_attention_triton, tensors, LinearOptions())[0]
    assert torch.equal(out.isnan().any(-1).any(-1)[0], torch.arange(150, device=DEVICE) == 70)
    tensors["k"][0, 7, 0, 2] = torch.nan
    assert call(linear_attention_triton, tensors, LinearOptions())[0].isnan().any(-1).all()


def test_which_calls_it_takes(monkeypatch):
    plain = Call("focused", 3, "channels", 1e-6)

    def taken(heads, size, how=plain, dtype=torch.float16, turned=False):
        x = torch.zeros(1, 8, heads, size, dtype=dtype, device=DEVICE)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x
        return host.takes(x, x, x, how)

    assert taken(8, 64) and taken(8, 16) and taken(32, 16) and taken(2, 32)
    assert not taken(9, 64) and not taken(3, 16) and not taken(8, 24) and not taken(4, 128)
    assert not taken(8, 64, dtype=torch.float32) and not taken(8, 64, turned=True)
    assert not taken(8, 64, Call("focused", 4, "channels", 1e-6)) and taken(8, 64, Call("focused", 4, "head", 1e-6))
    monkeypatch.setattr(host, "capability", lambda device: 12)
    assert not taken(8, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "size"), [(8, 64), (8, 16), (4, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_rows(counted, heads, size, dtype):
    check(problem(20_011, 20_011, heads, size, taps=5, dtype=dtype), LinearOptions())
    assert len(counted) == 1
