"""States of key blocks, weights of query blocks and 8-bit copies against torch, in Triton's interpreter or on a GPU.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size, N_q and N_k blocks, N_P = N_k padded.
"""

import pytest
import torch
from tests.ops.sparse_linear.triton_calls import DEVICE, offsets, random_map, rel

from allears.ops.attention.linear.features import feature_map
from allears.ops.attention.lowbit.quantise import quantise_e4m3_blocks, quantise_int8_blocks
from allears.ops.attention.lowbit.triton_quant import token_order
from allears.ops.attention.sparse_linear.blocks import Geometry, blocks_from_map, linear_weights
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.triton_host import Groups, UnitBytes, gather_call, prepared, unit_bytes

pytestmark = pytest.mark.usefixtures("poison")
NONE = (None, None, None, None)


def call_of(queries, keys, heads, groups, size, options, causal=False, batch=1, dtype=torch.float32, linear=False):
    q = torch.randn(batch, queries, heads, size, device=DEVICE, dtype=dtype)
    k, v = (torch.randn(batch, keys, groups, size, device=DEVICE, dtype=dtype) + 1 for _ in range(2))
    geometry = Geometry.of(q, k, options, causal)
    picked = random_map(geometry, batch, heads, 0.3)
    rest = ~picked & geometry.full(q.device) & (torch.rand(picked.shape, device=DEVICE) < 0.5) if linear else None
    return gather_call(q, k, v, blocks_from_map(picked, rest), options, causal, None, None, None, None, None)


@pytest.mark.parametrize("kind", ["softmax", "elu", "relu"])
@pytest.mark.parametrize(("size", "causal", "dtype"), [(24, False, torch.float16), (32, True, torch.float32)])
def test_states_are_those_of_each_block_and_zero_beyond(kind, size, causal, dtype):
    call = call_of(64, 150, 2, 2, size, SparseLinear(feature_map=kind, block_q=64), causal, batch=2, dtype=dtype)
    states = torch.empty(call.units, call.key_blocks, (call.padded + 1) * call.padded, dtype=dtype, device=DEVICE)
    prepared(call, states, None, NONE)(call.units, 0)
    states = states.view(2, 2, call.key_blocks, call.padded + 1, call.padded)
    keys = call.k.float() if causal else call.k.float() - call.k.float().mean(1, keepdim=True)
    for block in range(call.key_blocks):
        phi = feature_map(keys[:, 64 * block : 64 * block + 64], kind)
        h = torch.einsum("blgd,blge->bgde", phi, call.v[:, 64 * block : 64 * block + 64].float()) / 64
        got = states[:, :, block].float()
        torch.testing.assert_close(got[:, :, :size, :size], h, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(got[:, :, call.padded, :size], phi.sum(1) / 64, atol=2e-3, rtol=2e-3)
        assert not got[:, :, size : call.padded].any() and not got[..., size:].any()


@pytest.mark.parametrize(("causal", "linear"), [(False, False), (True, False), (True, True), (False, True)])
def test_weights_are_equal_powers_of_two_on_the_linear_blocks(causal, linear):
    call = call_of(300, 500, 4, 2, 16, SparseLinear(smooth_k=False), causal, linear=linear)
    weights = torch.empty(2, 2 * call.geometry.n_q, call.key_blocks, device=DEVICE)
    prepared(call, None, weights, NONE)(2, 0)
    weights = weights.view(1, 4, call.geometry.n_q, call.key_blocks)
    wanted = linear_weights(call.blocks, call.geometry)
    assert torch.equal(weights[..., : call.geometry.n_k] > 0, wanted)
    assert not weights[..., call.geometry.n_k :].any()
    total, number = weights.sum(-1), wanted.sum(-1)
    assert bool(((total > 0.5) & (total <= 1) | (number == 0) & (total == 0)).all())
    exponent = weights[weights > 0].log2()
    assert torch.equal(exponent, exponent.round())


def test_rows_longer_than_a_step_of_the_weights():
    call = call_of(1, 64 * 260, 1, 1, 4, SparseLinear(block_q=64, smooth_k=False))
    weights = torch.empty(1, 1, call.key_blocks, device=DEVICE)
    prepared(call, None, weights, NONE)(1, 0)
    assert torch.equal(weights.view(-1)[:260] > 0, linear_weights(call.blocks, call.geometry).view(-1))
    assert not weights.view(-1)[260:].any()


def test_copies_are_the_library_quantisers():
    options = SparseLinear(precision="int8_fp8", form="sparse", block_q=64)
    call = call_of(64, 150, 2, 2, 24, options, dtype=torch.float16)
    blocks, padded = call.key_blocks, call.padded
    k8 = torch.empty(2, blocks, 64, padded, dtype=torch.int8, device=DEVICE)
    v8 = torch.empty(2, blocks, padded, 64, dtype=torch.uint8, device=DEVICE)
    scales = torch.empty(2, 2, blocks, device=DEVICE)
    prepared(call, None, None, (k8, scales[0], v8, scales[1]))(2, 0)
    centred = call.k.float() - call.k_mean[:, None]
    k_wanted, k_scale = quantise_int8_blocks(centred, 64)
    v_wanted, v_scale = quantise_e4m3_blocks(call.v, 64)
    assert torch.equal(scales[0, :, :3], k_scale[0]) and torch.equal(scales[1, :, :3], v_scale[0])
    assert torch.equal(k8.view(2, -1, padded)[:, :150, :24], k_wanted[0].transpose(0, 1))
    assert not k8.view(2, -1, padded)[:, 150:].any() and not k8[..., 24:].any() and not scales[:, :, 3:].any()
    order = torch.tensor([token_order.fn(i) for i in range(64)], device=DEVICE)
    given = torch.zeros(2, blocks * 64, padded, device=DEVICE)
    given[:, :150, :24] = v_wanted[0].float().transpose(0, 1)
    got = v8.view(torch.float8_e4m3fn).float().transpose(2, 3)
    assert torch.equal(got, given.view(2, blocks, 64, padded)[:, :, order])


def test_states_of_packed_sequences_in_groups():
    """A group of units ends inside an entry."""
    options = SparseLinear(block_q=64)
    cu = offsets(70, 0, 129)
    k, v = (torch.randn(199, 2, 32, device=DEVICE) for _ in range(2))
    geometry = Geometry(cu.diff(), cu.diff(), 64, 64, False, 129, 129)
    blocks = blocks_from_map(random_map(geometry, 3, 2, 0.3))
    call = gather_call(k, k, v, blocks, options, False, cu, cu, 129, 129, None)
    states = torch.empty(3, call.key_blocks, 33 * 32, device=DEVICE)
    weights = torch.empty(3, 3, call.key_blocks, device=DEVICE)
    run = prepared(call, states, weights, NONE)
    picked = linear_weights(blocks, geometry).flatten(0, 1)
    for first in (0, 3):
        run(3, first)
        assert torch.equal(weights[..., :3] > 0, picked[first : first + 3])
        for unit in range(3):
            s, g = (first + unit) // 2, (first + unit) % 2
            mine = slice(int(cu[s]), int(cu[s + 1]))
            phi = feature_map(k[mine, g] - k[mine, g].mean(0), "softmax")
            got = states[unit].view(call.key_blocks, 33, 32)
            assert rel(got[:, :32].sum(0) + 1, phi.T @ v[mine, g] / 64 + 1) < 1e-5
            assert not got[-(-phi.shape[0] // 64) :].any()


def test_groups_fit_the_budget_and_are_of_one_size():
    each = UnitBytes(states=100, others=50, copies=0)
    assert each.groups(12, 1000.0) == Groups(6, False)
    assert each.groups(12, 100.0) == Groups(1, False)
    assert each.groups(5, 1e9) == Groups(5, False)
    assert UnitBytes(100, 50, 40).groups(12, 400.0) == Groups(2, False)
    assert UnitBytes(100, 50, 40).groups(12, 180.0) == Groups(1, True)
    assert UnitBytes(0, 0, 40).groups(12, 10.0) == Groups(1, False)


def test_scratch_of_the_video_model_is_a_tenth_of_its_operands():
    q = torch.empty(1, 32760, 12, 128, dtype=torch.bfloat16, device="meta")
    for options in (SparseLinear(), SparseLinear(precision="int8_fp8")):
        nothing = torch.empty(1, 12, 256, 1, dtype=torch.int32, device="meta")
        mean = torch.empty(1, 12, 128, device="meta")
        call = gather_call(q, q, q, blocks_of(nothing), options, False, None, None, None, None, mean)
        each, budget = unit_bytes(call), 0.1 * 3 * 2 * q.numel()
        groups = each.groups(call.units, budget)
        room = each.others + (max(each.states, each.copies) if groups.overlaid else each.states + each.copies)
        assert groups.units * room <= budget
        assert groups.overlaid == (options.precision == "int8_fp8")


def blocks_of(rows):
    from allears.ops.attention.sparse_linear.blocks import Blocks

    return Blocks(rows, rows[..., 0])
