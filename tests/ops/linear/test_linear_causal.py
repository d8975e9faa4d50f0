from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.ops.attention.linear.call import linear_attention
from allears.ops.attention.linear.chunked import causal_chunked
from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.recurrent import causal_recurrent
from allears.ops.attention.linear.reference import explicit_attention, normalise
from allears.ops.attention.linear.state import LinearState, new_state

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def sample(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def three(length, heads=2, size=3, batch=2):
    return tuple(sample(batch, length, heads, size, seed=i) for i in range(3))


@pytest.mark.parametrize("kind", ["focused", "elu", "relu", "softmax"])
@pytest.mark.parametrize("length", [1, 7, 64, 101])
def test_explicit_chunked_and_recurrent_forms_agree(kind, length):
    q, k, v = three(length)
    phi_q, phi_k, eps = feature_map(q, kind), feature_map(k, kind), 1e-2
    wanted = explicit_attention(phi_q, phi_k, v, eps, causal=True)
    start, count = new_state(v, 2), torch.arange(1, length + 1).expand(2, -1)
    *sums, kv, k_sum = causal_recurrent(phi_q, phi_k, v, start.kv, start.k_sum)
    torch.testing.assert_close(normalise(*sums, count, eps), wanted, **CLOSE)
    torch.testing.assert_close(kv, torch.einsum("blhd,blhe->bhde", phi_k, v), **CLOSE)
    for chunk in (1, 2, 5, 64, None):
        made = causal_chunked(phi_q, phi_k, v, start.kv, start.k_sum, chunk)
        torch.testing.assert_close(normalise(made[0], made[1], count, eps), wanted, **CLOSE)
        torch.testing.assert_close(made[2:], (kv, k_sum), **CLOSE)


def test_chunked_form_goes_on_from_any_sums():
    q, k, v = (x.abs() for x in three(23))
    kv, k_sum = sample(2, 2, 3, 3, seed=7), sample(2, 2, 3, seed=8)
    for made, wanted in zip(causal_chunked(q, k, v, kv, k_sum, 4), causal_recurrent(q, k, v, kv, k_sum), strict=True):
        torch.testing.assert_close(made, wanted, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 45), max_size=8),
    taps=st.integers(0, 7),
    kind=st.sampled_from(["focused", "elu"]),
    lengths=st.lists(st.integers(0, 45), min_size=2, max_size=2),
)
def test_a_stream_in_any_parts_equals_the_whole(cuts, taps, kind, lengths):
    q, k, v = three(45)
    conv = {"conv_weight": sample(3, taps, seed=4), "conv_bias": sample(3, seed=5)} if taps else {}
    scale = sample(2, 3, seed=3).abs() + 0.5 if kind == "focused" else None
    ends, options = torch.tensor(lengths), LinearOptions(kind, norm="head")
    more = {"scale": scale, "causal": True, "return_state": True, **conv}
    whole, last = linear_attention(q, k, v, options, lengths=ends, **more)
    state, parts = None, []
    for a, b in pairwise([0, *sorted(cuts), 45]):
        left = (ends - a).clamp(0, b - a)
        y, state = linear_attention(
            q[:, a:b],
            k[:, a:b],
            v[:, a:b],
            options,
            state=state,
            lengths=None if (left == b - a).all() else left,
            **more,
        )
        parts.append(y)
    made = torch.cat(parts, dim=1)
    for row, end in enumerate(lengths):
        torch.testing.assert_close(made[row, :end], whole[row, :end], **CLOSE)
    torch.testing.assert_close(tuple(state), tuple(last), **CLOSE)
    assert state.count.tolist() == lengths
    if taps > 1:
        for row, end in enumerate(lengths):
            kept = torch.cat([v.new_zeros(taps - 1, 2, 3), v[row, :end]])[-(taps - 1) :]
            assert torch.equal(state.v_rows[row], kept)


def test_row_by_row_equals_the_matrix_with_convolution():
    q, k, v = three(33)
    weight, scale = sample(2, 3, 4, seed=4), sample(2, 3, seed=3).abs() + 0.5
    phi_q, phi_k = (feature_map(x, "focused", scale=scale) for x in (q, k))
    wanted = explicit_attention(phi_q, phi_k, v, 1e-6, causal=True)
    for t in range(4):
        wanted[:, 3 - t :] += v[:, : 33 - 3 + t] * weight[..., t]
    state = None
    for i in range(33):
        row = (x[:, i : i + 1] for x in (q, k, v))
        y, state = linear_attention(*row, scale=scale, conv_weight=weight, causal=True, state=state, return_state=True)
        torch.testing.assert_close(y[:, 0], wanted[:, i], **CLOSE)


def test_a_step_changes_neither_its_state_nor_its_inputs():
    q, k, v = three(9)
    more = {"conv_weight": sample(3, 5), "causal": True, "return_state": True}
    _, state = linear_attention(q, k, v, **more)
    before = [x.clone() for x in (q, k, v, *state)]
    _, after = linear_attention(q, k, v, state=state, **more)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, *state), strict=True))
    assert after.count.tolist() == [18, 18]


def test_gradients_flow_through_the_state():
    leaves = [x.requires_grad_() for x in three(20)]
    more = {"conv_weight": sample(3, 4, seed=4), "causal": True, "return_state": True}
    first, state = linear_attention(*(x[:, :13] for x in leaves), **more)
    second, _ = linear_attention(*(x[:, 13:] for x in leaves), state=state, **more)
    factor = sample(2, 20, 2, 3, seed=6)
    made = torch.autograd.grad((torch.cat([first, second], dim=1) * factor).sum(), leaves)
    wanted = torch.autograd.grad((linear_attention(*leaves, **more)[0] * factor).sum(), leaves)
    torch.testing.assert_close(made, wanted, **CLOSE)
    start = [x.detach().requires_grad_() for x in (state.kv, state.k_sum, state.v_rows)]

    def run(kv, k_sum, rows):
        past = LinearState(kv, k_sum, state.count, rows)
        out, new = linear_attention(*(x[:, :2].detach() for x in leaves), state=past, **more)
        return out, new.kv, new.k_sum, new.v_rows

    assert torch.autograd.gradcheck(run, start)


def test_packed_streams_have_a_state_each():
    q, k, v = (x[0] for x in three(20))
    offsets, more = torch.tensor([0, 6, 6, 20]), {"conv_weight": sample(3, 3, seed=4), "causal": True}
    first, state = linear_attention(q, k, v, cu_seqlens=offsets, return_state=True, **more)
    assert state.count.tolist() == [6, 0, 14]
    second = linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 1, 9, 20]), state=state, **more)
    for old, new in (((0, 6), (0, 1)), ((6, 6), (1, 9)), ((6, 20), (9, 20))):
        joined = [torch.cat([x[slice(*old)], x[slice(*new)]])[None] for x in (q, k, v)]
        wanted = linear_attention(*joined, **more)[0]
        torch.testing.assert_close(torch.cat([first[slice(*old)], second[slice(*new)]]), wanted, **CLOSE)


def test_sums_of_narrow_streams_stay_wide():
    q, k, v = (x.to(torch.bfloat16) for x in three(50))
    _, state = linear_attention(q, k, v, causal=True, return_state=True, conv_weight=sample(3, 3))
    assert (state.kv.dtype, state.k_sum.dtype, state.v_rows.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    phi_k = feature_map(k, "focused")
    torch.testing.assert_close(state.k_sum, phi_k.sum(1))
