"""The quantisers' kernels in Triton's interpreter against ``quantise.py``, bit for bit.

Shapes: B batch, L tokens, H query heads, G key heads, D head size, DP = D padded.
"""

import math
import os
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from allears.ops.attention.lowbit import quantise, triton_host  # noqa: E402
from allears.ops.attention.lowbit.options import LowBit  # noqa: E402
from allears.ops.attention.lowbit.sagebwd_reference import sagebwd_forward as reference_forward  # noqa: E402
from allears.ops.attention.lowbit.triton_quant import quantise_keys_values, quantise_queries, sizes_of  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDER = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
pytestmark = pytest.mark.usefixtures("poison")


def in_order(x):
    """Tokens, the last axis, as the kernels store them."""
    return x.unflatten(-1, (-1, 16))[..., ORDER].flatten(-2)


def strided(batch, length, heads, size, dtype=torch.float16):
    """Random numbers (B, L, H, D) whose memory is (B, H, D, L)."""
    return torch.randn(batch, heads, size, length, device=DEVICE).to(dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("length", "size", "dtype"), [(200, 24, torch.float16), (128, 64, torch.float32), (1, 7, torch.bfloat16)]
)
@pytest.mark.parametrize("values", ["int8", "fp8"])
def test_keys_and_values_equal_the_quantisers(length, size, dtype, values):
    k, v = strided(2, length, 2, size, dtype) + 1, strided(2, length, 2, size, dtype) * 3
    sizes = sizes_of(k, k, None)
    got = quantise_keys_values(k, v, None, sizes, True, values)
    torch.testing.assert_close(got.k_mean[..., :size], k.float().mean(1), rtol=1e-5, atol=1e-6)
    assert not got.k_mean[..., size:].any()
    wanted, scale = quantise.quantise_int8_blocks(k.float() - got.k_mean[:, None, :, :size])
    assert torch.equal(got.k_scale, scale)
    assert torch.equal(got.k8[:, :, :length, :size], wanted.transpose(1, 2))
    assert not got.k8[:, :, length:].any() and not got.k8[..., size:].any()

    of_blocks = quantise.quantise_int8_blocks if values == "int8" else quantise.quantise_e4m3_blocks
    wanted, scale = of_blocks(v)
    assert torch.equal(got.v_scale, scale)
    columns = torch.nn.functional.pad(wanted.float().permute(0, 2, 3, 1), (0, -length % 128))
    assert torch.equal(got.v8[:, :, :size].float(), in_order(columns))
    assert not got.v8[:, :, size:].float().any()


def test_without_smoothing_keys_are_quantised_as_they_are():
    k = strided(1, 130, 1, 32) + 2
    got = quantise_keys_values(k, k, None, sizes_of(k, k, None), False, "none")
    wanted, scale = quantise.quantise_int8_blocks(k)
    assert got.k_mean is None and got.v8 is None
    assert torch.equal(got.k8[:, :, :130], wanted.transpose(1, 2)) and torch.equal(got.k_scale, scale)


@pytest.mark.parametrize("per_tile", [False, True])
def test_queries_equal_the_quantisers(per_tile):
    q = strided(2, 100, 4, 24)
    sizes = sizes_of(q, q[:, :, :2], None)
    mean = torch.randn(2, 2, 32, device=DEVICE)
    q8, scale, shift = quantise_queries(q, None, sizes, mean, per_tile)
    if per_tile:
        wanted, of_tiles = quantise.quantise_int8_blocks(q, 64)
        of_rows = quantise.rows_of_blocks(of_tiles, 100, 64)
    else:
        wanted, of_rows = quantise.quantise_int8_rows(q)
    assert torch.equal(scale, of_rows)
    assert torch.equal(q8[..., :24], wanted.transpose(1, 2)) and not q8[..., 24:].any()
    expected = torch.einsum("blhd,bhd->bhl", q.float(), mean[..., :24].repeat_interleave(2, 1))
    torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_quantised_one_by_one():
    starts = [0, 130, 130, 131, 259, 300]
    cu = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    k, v = (strided(1, 300, 2, 16) for _ in range(2))
    sizes = sizes_of(k, k, cu)
    got = quantise_keys_values(k, v, cu, sizes, True, "int8")
    q8, q_scale, _ = quantise_queries(k, cu, sizes, None, True)
    for s, (start, end) in enumerate(pairwise(starts)):
        first, count = start // 128 + s, -(-(end - start) // 128)
        if start == end:
            assert not got.k_mean[s].any()
            continue
        part, of_v = k[:, start:end], v[:, start:end]
        alone = quantise_keys_values(part, of_v, None, sizes_of(part, part, None), True, "int8")
        rows = slice(128 * first, 128 * (first + count))
        assert torch.equal(got.k_mean[s], alone.k_mean[0])
        assert torch.equal(got.k8[:, :, rows], alone.k8) and torch.equal(
            got.k_scale[:, :, first : first + count], alone.k_scale
        )
        assert torch.equal(got.v8[..., rows], alone.v8) and torch.equal(
            got.v_scale[:, :, first : first + count], alone.v_scale
        )
        wanted, of_tiles = quantise.quantise_int8_blocks(k[:, start:end], 64)
        assert torch.equal(q8[:, :, start:end, :16], wanted.transpose(1, 2))
        assert torch.equal(q_scale[:, :, start:end], quantise.rows_of_blocks(of_tiles, end - start, 64))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_numbers_and_zeros_take_the_scales_of_the_quantisers():
    k = torch.randn(1, 512, 1, 32, device=DEVICE)
    k[0, 5, 0, 3], k[0, 130, 0, 0], k[0, 256:384] = math.nan, math.inf, 0.0
    k[0, 384:] *= 1e-38
    got = quantise_keys_values(k, k, None, sizes_of(k, k, None), False, "fp8")
    wanted, scale = quantise.quantise_int8_blocks(k)
    assert torch.equal(got.k8, wanted.transpose(1, 2))
    torch.testing.assert_close(got.k_scale, scale, rtol=0, atol=0, equal_nan=True)
    assert got.k_scale[0, 0, :2].isnan().all() and not got.k_scale[0, 0, 2:].any()
    assert got.v_scale[0, 0, :2].isnan().all() and not got.v8.float().any()
    _, q_scale, _ = quantise_queries(k, None, sizes_of(k, k, None), None, False)
    torch.testing.assert_close(q_scale, quantise.quantise_int8_rows(k)[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("per_tile", [False, True])
def test_operands_of_the_backward(per_tile):
    length, size = 100, 24
    q, k = strided(1, length, 2, size), strided(1, 40, 1, size)
    d_out, d_lse = strided(1, length, 2, size), torch.randn(1, 2, length, device=DEVICE)
    d_out[0, 3] = 0
    options = LowBit(grad_scales="tile" if per_tile else "row")
    # Bottom-right alignment leaves the first 60 queries without keys.
    out, _, saved = triton_host.sagebwd_forward(q, k, k, causal=True, options=options)
    _, _, reference = reference_forward(q, k, k, causal=True, options=options)
    got = triton_host._query_operands(d_out, out, saved, d_lse, sizes_of(q, k, None), per_tile)

    def rows(x):
        return x[..., :length]

    do8, do_scale = quantise.quantise_int8_rows(d_out)
    if per_tile:
        do8, of_tiles = quantise.quantise_int8_blocks(d_out, 64)
        do_scale = quantise.rows_of_blocks(of_tiles, length, 64)
    eight = torch.nn.functional.pad(do8.permute(0, 2, 3, 1), (0, 28))
    assert torch.equal(got.do8t[:, :, :size], in_order(eight)) and not got.do8t[:, :, size:].any()
    eight = torch.nn.functional.pad(reference.q8.permute(0, 2, 3, 1), (0, 28))
    assert torch.equal(got.q8t[:, :, :size], in_order(eight))
    given = torch.where(reference.lse == -math.inf, 0.0, d_lse)
    shift = (d_out.float() * out.float()).sum(-1).transpose(1, 2) - given
    lse = torch.where(reference.lse == -math.inf, 0.0, reference.lse / math.log(2))
    torch.testing.assert_close(rows(got.row_d_lse), given)
    torch.testing.assert_close(rows(got.row_shift), shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows(got.row_lse), lse, rtol=1e-5, atol=1e-5)
    assert got.row_lse[..., length:].eq(math.inf).all() and not got.q_scale[..., length:].any()
    assert torch.equal(rows(got.q_scale), reference.q_scale)
    if per_tile:
        assert torch.equal(rows(got.do_scale), do_scale)
        return
    some = do_scale > 0
    assert some.sum() == 2 * length - 2
    ratio = reference.q_scale[some] / do_scale[some]
    torch.testing.assert_close(rows(got.do_scale)[some], ratio)
    torch.testing.assert_close(rows(got.folded_lse)[some], lse[some] - do_scale[some].log2(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows(got.folded_shift)[some], shift[some] * ratio, rtol=1e-4, atol=1e-4)
    assert got.folded_lse[..., :length].isfinite().all() and got.folded_shift.isfinite().all()
