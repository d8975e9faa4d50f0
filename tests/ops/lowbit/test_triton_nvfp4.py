"""The NVFP4 kernels in Triton's interpreter against the reference. Triton's own interpreter reads every scale of a
block-scaled dot as a power of two (that of 3.6 has no such dot), so the dot is a few lines of numpy here, from the
formats' definitions. The interpreter multiplies bfloat16 by its bits, so that whole calls use float16.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size.
"""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from allears.ops.attention.lowbit import nvfp4, nvfp4_reference, triton_nvfp4, triton_nvfp4_quant  # noqa: E402
from allears.ops.attention.lowbit.options import LowBit  # noqa: E402
from allears.ops.attention.lowbit.smooth import smooth_queries  # noqa: E402
from allears.ops.attention.lowbit.triton_nvfp4 import Nvfp4Tiling, nvfp4_forward_triton  # noqa: E402
from allears.ops.attention.lowbit.triton_nvfp4_quant import quantise_columns, quantise_rows  # noqa: E402

INTERPRETED = isinstance(triton_nvfp4.nvfp4_forward_kernel, interpreter.InterpretedFunction)
needs_dot = pytest.mark.skipif(
    not (INTERPRETED and hasattr(interpreter.InterpreterBuilder, "create_dot_scaled")),
    reason="this needs Triton's interpreter, and a version of it that knows the block-scaled dot",
)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def e4m3(bits: np.ndarray) -> np.ndarray:
    exponent, mantissa = (bits >> 3 & 15).astype(np.int32), (bits & 7).astype(np.float32)
    value = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    return np.where(bits & 127 == 127, np.nan, value).astype(np.float32)


def operand(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(R, N / 2) bytes and (R, N / 16) E4M3 bits -> (R, N) values."""
    pairs = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1)
    return pairs.reshape(len(codes), -1) * np.repeat(e4m3(scales), 16, axis=1)


def block_scaled_dot(builder, left, left_scales, _, right, right_scales, __, fast, left_pack, right_pack, acc):
    product = operand(left.data, left_scales.data) @ operand(right.data.T, right_scales.data).T
    return interpreter.TensorHandle(product + acc.data, tl.float32)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.fail("Triton was imported for a GPU before this file: set TRITON_INTERPRET=1 for the whole test run")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot_scaled", block_scaled_dot, raising=False)
    torch.manual_seed(0)


@triton.jit
def encode_kernel(x, e4m3_bits, e4m3_values, e2m1_bits, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    code = triton_nvfp4_quant.e4m3_code(tl.abs(value))
    tl.store(e4m3_bits + at, code)
    tl.store(e4m3_values + at, triton_nvfp4_quant.e4m3_value(code))
    tl.store(e2m1_bits + at, triton_nvfp4_quant.e2m1_code(value, 1.0))


def device() -> str:
    return "cpu" if INTERPRETED else "cuda"


def inputs(queries, keys, heads, groups, size, batch=1):
    """float16 with an offset of each channel in q and k, as smoothing is for."""
    q = torch.randn(batch, queries, heads, size) + torch.randn(size)
    k = torch.randn(batch, keys, groups, size) + 3 * torch.randn(size)
    return q.half(), k.half(), torch.randn(batch, keys, groups, size).half()


def test_rounding_to_both_formats_is_that_of_torch_and_of_the_reference() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (every[1:] + every[:-1]) / 2
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.0])
    plain = torch.cat([every, halves, ties, torch.tensor([1e-12, 447.9, 449.0, 1e30])])
    x = torch.cat([plain, -plain, plain.nextafter(torch.tensor(0.0)), plain.nextafter(torch.tensor(9e9))])
    x = torch.cat([x, torch.randn(4096 - len(x)).exp()])
    outs = [torch.empty(4096, dtype=torch.int32), torch.empty(4096), torch.empty(4096, dtype=torch.int32)]
    outs = [out.to(device()) for out in outs]
    encode_kernel[(1,)](x.to(device()), *outs, N=4096)
    bits, values, codes = (out.cpu() for out in outs)
    wanted = x.abs().clamp(max=448).to(torch.float8_e4m3fn)
    assert torch.equal(bits, wanted.view(torch.uint8).int())
    assert torch.equal(values, wanted.float())
    assert torch.equal(codes, nvfp4.to_e2m1(x).int())


def test_what_is_not_finite_becomes_the_scale_nan() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).to(device())
    outs = [torch.empty(4, dtype=torch.int32), torch.empty(4), torch.empty(4, dtype=torch.int32)]
    outs = [out.to(device()) for out in outs]
    encode_kernel[(1,)](x, *outs, N=4)
    assert outs[0].tolist() == [127, 127, 127, 56]
    assert outs[1].isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize(("length", "size", "dtype"), [(1, 64, torch.float16), (63, 100, torch.bfloat16)])
def test_rows_and_columns_are_quantised_bit_for_bit_as_the_reference(length, size, dtype) -> None:
    x = torch.randn(2, size, length, 3).permute(0, 2, 3, 1).mul(torch.randn(size).exp()).to(dtype).to(device())
    assert not x.is_contiguous() or length == 1
    x[0, 0, 0, :20] = 0
    x[1, -1, 2, 5] = float("nan")
    mean = torch.randn(2, 3, size, device=x.device)
    for rows, given in ((quantise_rows(x), x.float()), (quantise_rows(x, mean), x.float() - mean[:, None])):
        padded = torch.nn.functional.pad(given.transpose(1, 2), (0, 2 * rows.codes.shape[-1] - size))
        codes, scales = nvfp4.quantise_nvfp4(padded)
        assert torch.equal(rows.codes[:, :, :length], nvfp4.pack_pairs(codes))
        assert torch.equal(rows.scales[:, :, :length].view(torch.uint8), scales.view(torch.uint8))
        assert not rows.codes[:, :, length:].any()
        assert not rows.scales[:, :, length:].float().any()
    codes, scales = quantise_columns(x)
    padded = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, codes.shape[-1] * 2 - length))
    wanted, wanted_scales = nvfp4.quantise_nvfp4(padded)
    assert torch.equal(codes[:, :, :size], nvfp4.pack_pairs(wanted))
    assert torch.equal(scales[:, :, :size].view(torch.uint8), wanted_scales.view(torch.uint8))
    assert not codes[:, :, size:].any()


def test_block_means_are_those_of_the_tokens_that_are_there() -> None:
    x = (torch.randn(1, 150, 2, 64) + 3).to(device())
    direction = torch.randn(1, 1, 64, device=x.device)
    rows = quantise_rows(x, direction, subtract_block_mean=True, with_shift=True)
    rest, mean = smooth_queries(x)
    assert torch.allclose(rows.block_mean.transpose(1, 2), mean, atol=2e-6)
    assert torch.allclose(rows.shift, torch.einsum("blhd,d->bhl", x, direction[0, 0]), atol=1e-4)
    exact = (x - rows.block_mean.transpose(1, 2).repeat_interleave(128, 1)[:, :150]).transpose(1, 2)
    codes, _ = nvfp4.quantise_nvfp4(exact)
    assert torch.equal(rows.codes[:, :, :150], nvfp4.pack_pairs(codes))
    assert torch.allclose(exact, rest.transpose(1, 2), atol=4e-6)


SHAPES = {  # L_q, L_k, H, G, D, causal
    "odd lengths": (63, 100, 1, 1, 64, False),
    "grouped heads, causal, padded head": (130, 200, 2, 1, 80, True),
    "queries without keys": (140, 30, 2, 2, 24, True),
    "one key": (1, 1, 1, 1, 128, False),
    "no keys": (3, 0, 1, 1, 64, False),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("permuted", [False, True])
@needs_dot
def test_the_forward_is_the_reference(shape, permuted) -> None:
    *sizes, causal = shape
    q, k, v = inputs(*sizes)
    copies = q.clone(), k.clone(), v.clone()
    tiling = Nvfp4Tiling(hardware=False, permuted=permuted)
    out, lse = nvfp4_forward_triton(q, k, v, causal=causal, tiling=tiling)
    wanted, wanted_lse = nvfp4_reference.nvfp4_forward(q, k, v, causal=causal)
    assert out.dtype == q.dtype
    assert (out - wanted).float().norm() <= 3e-3 * wanted.float().norm()
    assert torch.allclose(lse, wanted_lse, atol=1e-4, rtol=1e-5)
    assert all(map(torch.equal, (q, k, v), copies))


@pytest.mark.parametrize(
    "options", [LowBit(smooth_q=False), LowBit(smooth_k=False), LowBit(two_level_p=False)], ids=str
)
@needs_dot
def test_options_and_scale_are_those_of_the_reference(options) -> None:
    q, k, v = inputs(70, 140, 1, 1, 64)
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    tiling = Nvfp4Tiling(hardware=False, permuted=True)
    out, lse = nvfp4_forward_triton(q, k, v, scale=0.05, options=options, tiling=tiling)
    wanted, wanted_lse = nvfp4_reference.nvfp4_forward(q, k, v, scale=0.05, options=options)
    assert (out - wanted).float().norm() <= 3e-3 * wanted.float().norm()
    assert torch.allclose(lse, wanted_lse, atol=1e-4, rtol=1e-5)


@needs_dot
def test_tiles_of_64_keys_are_as_accurate() -> None:
    q, k, v = inputs(64, 200, 1, 1, 64)
    exact = torch.softmax(q[0, :, 0].float() @ k[0, :, 0].float().T / 8, -1) @ v[0, :, 0].float()
    wide, _ = nvfp4_forward_triton(q, k, v, tiling=Nvfp4Tiling(hardware=False))
    narrow, _ = nvfp4_forward_triton(q, k, v, tiling=Nvfp4Tiling(hardware=False, keys=64, permuted=True))
    errors = [(out[0, :, 0].float() - exact).norm() / exact.norm() for out in (wide, narrow)]
    assert errors[1] < 1.1 * errors[0]
    assert errors[1] < 0.25


@needs_dot
def test_a_query_that_is_nan_gives_nan_and_disturbs_no_other_block() -> None:
    q, k, v = inputs(130, 40, 1, 1, 64)
    q[0, 129, 0, 3] = float("nan")
    out, lse = nvfp4_forward_triton(q, k, v, tiling=Nvfp4Tiling(hardware=False))
    assert out[0, 129].isnan().all()
    assert lse[0, 0, 129].isnan()
    assert out[0, :128].isfinite().all()


def test_what_the_kernel_cannot_run_is_refused_with_a_reason() -> None:
    q, k, v = inputs(4, 4, 1, 1, 64)
    with pytest.raises(ValueError, match="runs on CUDA devices, and cpu is none"):
        nvfp4_forward_triton(q, k, v)
    tiling = Nvfp4Tiling(hardware=False)
    with pytest.raises(ValueError, match="takes bfloat16 and float16, and q is torch"):
        nvfp4_forward_triton(q.float(), k.float(), v.float(), tiling=tiling)
    wide = torch.zeros(1, 4, 1, 136, dtype=torch.float16)
    with pytest.raises(ValueError, match="head sizes up to 128, and q has 136"):
        nvfp4_forward_triton(wide, wide, wide, tiling=tiling)


def test_a_chip_without_fp4_is_named_in_the_refusal(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some Hopper")
    assert "Some Hopper has compute capability 9.0" in triton_nvfp4.device_refusal(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    assert triton_nvfp4.device_refusal(torch.device("cuda", 0)) == ""
