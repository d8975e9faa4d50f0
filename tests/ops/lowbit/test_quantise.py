import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import (
    dequantise_blocks,
    dequantise_rows,
    quantise_e4m3_blocks,
    quantise_int8_blocks,
    quantise_int8_rows,
    to_e4m3,
)
from allears.ops.attention.lowbit.smooth import key_mean_logits, query_correction, smooth_keys, smooth_queries


def float32(x):
    return torch.tensor(x, dtype=torch.float32).item()


def textbook_int8(group):
    """One group of numbers, one at a time; Python rounds half to even."""
    scale = float32(max(abs(x) for x in group) / 127)
    inverse = float32(1 / scale) if scale else 0.0
    return [max(-127, min(127, round(float32(x * inverse)))) for x in group], scale


@pytest.mark.parametrize("length", [1, 63, 130])
def test_int8_rows_and_blocks_equal_the_textbook(length):
    torch.manual_seed(length)
    x = torch.randn(2, length, 3, 5).to(torch.bfloat16)
    values, scales = quantise_int8_rows(x)
    assert values.dtype == torch.int8 and scales.shape == (2, 3, length) and scales.dtype == torch.float32
    blocks, block_scales = quantise_int8_blocks(x, 64)
    assert blocks.dtype == torch.int8 and block_scales.shape == (2, 3, math.ceil(length / 64))
    for b in range(2):
        for h in range(3):
            for i in range(length):
                wanted, scale = textbook_int8(x[b, i, h].tolist())
                assert values[b, i, h].tolist() == wanted and scales[b, h, i].item() == scale
            for m in range(math.ceil(length / 64)):
                rows = slice(64 * m, 64 * m + 64)
                wanted, scale = textbook_int8(x[b, rows, h].flatten().tolist())
                assert blocks[b, rows, h].flatten().tolist() == wanted and block_scales[b, h, m].item() == scale
    error = (dequantise_rows(values, scales) - x.float()).abs()
    assert (error <= 0.501 * scales.transpose(1, 2).unsqueeze(-1)).all()
    error = (dequantise_blocks(blocks, block_scales, 64) - x.float()).abs()
    assert (error <= 0.501 * block_scales.repeat_interleave(64, 2)[..., :length].transpose(1, 2).unsqueeze(-1)).all()


def test_halves_go_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999]).view(1, 1, 1, 8)
    values, scales = quantise_int8_rows(x)
    assert scales.item() == 1.0 and values.flatten().tolist() == [127, 0, 2, 2, 0, -2, -2, 3]


E4M3 = sorted({code.item() for code in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()} - {0.0})
E4M3 = torch.tensor([x for x in E4M3 if not math.isnan(x)] + [0.0]).sort().values


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=20))
def test_e4m3_is_the_nearest_and_saturates(numbers):
    x = torch.tensor(numbers)
    distance = (x.clamp(-448, 448).unsqueeze(-1).double() - E4M3.double()).abs()
    got = (to_e4m3(x).float().double() - x.clamp(-448, 448).double()).abs()
    assert torch.equal(got, distance.min(-1).values)


def test_e4m3_ties_go_to_even():
    x = torch.tensor([17.0, 19.0, 21.0, 23.0, 2.0**-10, 3 * 2.0**-10])
    assert to_e4m3(x).float().tolist() == [16.0, 20.0, 20.0, 24.0, 0.0, 2.0**-8]


@pytest.mark.parametrize("length", [1, 50, 130])
def test_e4m3_blocks(length):
    torch.manual_seed(0)
    x = torch.randn(2, length, 3, 4) * torch.tensor([0.01, 30.0, 0.0]).unsqueeze(-1)
    values, scales = quantise_e4m3_blocks(x)
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (2, 3, math.ceil(length / 128))
    for m in range(scales.shape[2]):
        rows = slice(128 * m, 128 * m + 128)
        assert torch.equal(scales[..., m], x[:, rows].abs().amax((1, 3)) / 448)
        assert values[:, rows, :2].float().abs().amax((1, 3)).eq(448).all() and values[:, rows, 2].float().eq(0).all()
    error = (dequantise_blocks(values, scales) - x).abs()
    step = scales.repeat_interleave(128, 2)[..., :length].transpose(1, 2).unsqueeze(-1)
    assert (error <= x.abs() / 16 * 1.001 + step * 2.0**-10 * 1.001).all()


def test_zeros_and_numbers_too_small_for_a_scale_become_zero():
    x = torch.zeros(1, 3, 1, 4)
    x[0, 1] = 1e-38  # 1e-38 / 127 is not a normal number, and its inverse would be infinite
    x[0, 2] = torch.tensor([3e-36, -3e-36, 1e-36, 0.0])
    values, scales = quantise_int8_rows(x)
    assert scales[0, 0, :2].tolist() == [0.0, 0.0] and scales[0, 0, 2] > 0
    assert values[0, :, 0].tolist() == [[0] * 4, [0] * 4, [127, -127, 42, 0]]
    values, scales = quantise_e4m3_blocks(x[:, :2])
    assert torch.equal(dequantise_blocks(values, scales), torch.zeros(1, 2, 1, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_nan_of_its_group_alone(bad):
    x = torch.ones(1, 130, 2, 4)
    x[0, 129, 1, 2] = bad
    for deq, group in (
        (dequantise_rows(*quantise_int8_rows(x)), (slice(129, 130), slice(None))),
        (dequantise_blocks(*quantise_int8_blocks(x)), (slice(128, 130), slice(None))),
        (dequantise_blocks(*quantise_e4m3_blocks(x)), (slice(128, 130), slice(None))),
    ):
        wanted = torch.ones_like(x)
        wanted[0, group[0], 1, group[1]] = math.nan
        torch.testing.assert_close(deq, wanted, equal_nan=True)


def test_strides_do_not_matter_and_inputs_stay():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 40, 3).permute(0, 2, 3, 1)
    kept = x.clone()
    for quantise in (quantise_int8_rows, quantise_int8_blocks, quantise_e4m3_blocks):
        for a, b in zip(quantise(x), quantise(kept.contiguous()), strict=True):
            assert torch.equal(a.float(), b.float())
    smooth_keys(x), smooth_queries(x)
    assert torch.equal(x, kept)


def test_no_tokens():
    x = torch.zeros(2, 0, 3, 8)
    assert quantise_int8_rows(x)[1].shape == (2, 3, 0) and quantise_int8_blocks(x)[1].shape == (2, 3, 0)
    assert quantise_e4m3_blocks(x)[1].shape == (2, 3, 0) and smooth_keys(x)[1].eq(0).all()
    assert smooth_queries(x)[1].shape == (2, 0, 3, 8)


def test_smoothing_takes_means_off():
    torch.manual_seed(0)
    k = torch.randn(2, 70, 3, 8).to(torch.bfloat16) + 5
    smoothed, mean = smooth_keys(k)
    torch.testing.assert_close(mean, k.double().mean(1).float())
    torch.testing.assert_close(smoothed, (k.double() - k.double().mean(1, keepdim=True)).float(), atol=1e-5, rtol=0)
    q = torch.randn(2, 300, 3, 8) + 2
    smoothed, mean = smooth_queries(q)
    assert mean.shape == (2, 3, 3, 8)
    for m, rows in enumerate((slice(0, 128), slice(128, 256), slice(256, 300))):
        torch.testing.assert_close(mean[:, m], q[:, rows].mean(1))
        torch.testing.assert_close(smoothed[:, rows], q[:, rows] - q[:, rows].mean(1, keepdim=True))


def test_correction_gives_back_what_smoothing_took():
    torch.manual_seed(0)
    q, k = torch.randn(2, 200, 4, 8) + 2, torch.randn(2, 90, 2, 8) - 1
    small_q, q_mean = smooth_queries(q)
    small_k, k_mean = smooth_keys(k)
    wanted = torch.einsum("blhd,bnhd->bhln", q, k.repeat_interleave(2, dim=2))
    got = torch.einsum("blhd,bnhd->bhln", small_q, small_k.repeat_interleave(2, dim=2))
    got += query_correction(q_mean, small_k).repeat_interleave(128, dim=2)[:, :, :200]
    got += key_mean_logits(q, k_mean).unsqueeze(-1)
    torch.testing.assert_close(got, wanted, atol=3e-5, rtol=1e-5)


def test_options_refuse_what_they_do_not_know():
    for field, value in (("smooth_k", 1), ("smooth_q", "yes"), ("grad_scales", "block"), ("backward", "exact")):
        with pytest.raises(ValueError, match=field):
            LowBit(**{field: value})
