import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allears.ops.attention.lowbit.nvfp4 import (
    dequantise_groups,
    from_e2m1,
    pack_pairs,
    quantise_mxfp4,
    quantise_nvfp4,
    round_to_mxfp4,
    round_to_nvfp4,
    to_e2m1,
    unpack_pairs,
)

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def textbook_e2m1(x):
    """The code whose value is nearest; of two the even one."""
    code = min(range(8), key=lambda c: (abs(min(abs(x), 6.0) - GRID[c]), c % 2))
    return code + 8 * (x < 0)


def textbook_e4m3(x):
    """Nearest E4M3 value of x >= 0, half to even: 3 fraction bits, least exponent -6, at most 448."""
    if x == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(x)), -6) - 3)
    return min(round(x / step) * step, 448.0)


def test_every_code_and_every_tie():
    assert from_e2m1(torch.arange(16, dtype=torch.uint8)).tolist() == GRID + [-x for x in GRID]
    assert torch.equal(
        to_e2m1(torch.tensor(GRID[1:] + [-x for x in GRID[1:]])).long(), torch.tensor([*range(1, 8), *range(9, 16)])
    )
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert from_e2m1(to_e2m1(torch.tensor(ties))).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert from_e2m1(to_e2m1(torch.tensor([7.0, -1e30, math.inf, -math.inf]))).tolist() == [6.0, -6.0, 6.0, -6.0]
    assert to_e2m1(torch.tensor([math.nan, 0.0, -0.0])).tolist() == [0, 0, 0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.floats(-8, 8, width=32), st.sampled_from([k / 8 for k in range(-60, 60)])), min_size=1))
def test_e2m1_equals_the_textbook(numbers):
    assert to_e2m1(torch.tensor(numbers)).tolist() == [textbook_e2m1(x) for x in numbers]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.integers(-9, 9), st.integers(0, 10_000))
def test_nvfp4_equals_the_textbook(length, exponent, seed):
    x = torch.randn(length, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scales = quantise_nvfp4(x)
    assert scales.dtype == torch.float8_e4m3fn and scales.shape == (math.ceil(length / 16),)
    for g in range(math.ceil(length / 16)):
        group = x[16 * g : 16 * g + 16]
        scale = textbook_e4m3((group.abs().max() / 6).item())
        assert scales[g].float().item() == scale
        wanted = [textbook_e2m1((y / scale).item()) if scale else 0 for y in group]
        assert codes[16 * g : 16 * g + 16].tolist() == wanted


def test_limits_of_the_scale():
    x = torch.zeros(5, 16)
    x[0, 0] = 6 * 2.0**-11  # the scale rounds to 0
    x[1, 0] = 6 * 2.0**-9  # the least scale
    x[2, :2] = torch.tensor([1e6, 300.0])  # above 448 * 6: saturates
    x[3, 0], x[4, 1] = math.nan, -math.inf
    codes, scales = quantise_nvfp4(x)
    assert scales.float()[:3, 0].tolist() == [0.0, 2.0**-9, 448.0] and scales.float()[3:].isnan().all()
    assert codes[3:].eq(0).all()
    rounded = round_to_nvfp4(x)
    assert rounded[0].eq(0).all() and rounded[1, 0] == 6 * 2.0**-9
    assert rounded[2, :3].tolist() == [2688.0, 224.0, 0.0] and rounded[3:].isnan().all()


@pytest.mark.parametrize("length", [1, 32, 70])
def test_mxfp4_scales_are_powers_of_two(length):
    torch.manual_seed(length)
    x = torch.randn(20, length) * torch.logspace(-30, 30, 20, base=2).unsqueeze(1)
    codes, scales = quantise_mxfp4(x)
    for row, row_codes, row_scales in zip(x, codes, scales, strict=True):
        for g in range(math.ceil(length / 32)):
            group = row[32 * g : 32 * g + 32]
            scale = 2.0 ** (math.floor(math.log2(group.abs().max().item())) - 2)
            assert row_scales[g].item() == scale
            assert row_codes[32 * g : 32 * g + 32].tolist() == [textbook_e2m1((y / scale).item()) for y in group]
    assert round_to_mxfp4(torch.zeros(3, 40)).eq(0).all()
    bad = torch.zeros(2, 40)
    bad[0, 35], bad[1, 0] = math.nan, math.inf
    assert round_to_mxfp4(bad).isnan().tolist() == [[False] * 32 + [True] * 8, [True] * 32 + [False] * 8]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1, max_size=40))
def test_packing(pairs):
    codes = torch.tensor(pairs, dtype=torch.uint8).flatten()
    packed = pack_pairs(codes)
    assert packed.tolist() == [low + 16 * high for low, high in pairs]
    assert torch.equal(unpack_pairs(packed), codes)


def test_odd_codes_cannot_be_packed():
    with pytest.raises(ValueError, match="codes"):
        pack_pairs(torch.zeros(2, 3, dtype=torch.uint8))


def test_nvfp4_is_finer_than_mxfp4():
    torch.manual_seed(0)
    x = torch.randn(100, 64)
    fine, coarse = ((rounded(x) - x).norm() / x.norm() for rounded in (round_to_nvfp4, round_to_mxfp4))
    assert 0.08 < fine < 0.10 and fine < 0.85 * coarse
    assert torch.equal(round_to_nvfp4(x), dequantise_groups(*quantise_nvfp4(x)))
    assert torch.equal(round_to_nvfp4(x[:, :21]), round_to_nvfp4(torch.nn.functional.pad(x[:, :21], (0, 11)))[:, :21])
