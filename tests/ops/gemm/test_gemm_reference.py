"""W8A8 in plain PyTorch against textbook loops in float64, and the errors that 8 bits make.

Shapes: M rows, N columns, K summed.
"""

import math

import pytest
import torch

from allears.ops.gemm.call import explain, quantise, w8a8_linear
from allears.ops.gemm.reference import product_reference, quantise_reference
from allears.ops.gemm.schemes import SCHEMES, scheme_of

SIZES = [(1, 1, 1), (5, 7, 19), (130, 70, 300), (128, 128, 128), (257, 129, 1100)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def groups(x, scheme):
    """The parts of a matrix that share a scale: its index, rows and columns."""
    if not SCHEMES[scheme].tiled:
        return [((i,), slice(i, i + 1), slice(None)) for i in range(x.shape[0])]
    high, wide = (-(-size // 128) for size in x.shape)
    return [
        ((i, j), slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)) for i in range(high) for j in range(wide)
    ]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (129, 140)])
def test_quantiser_is_the_textbooks(scheme, rows, columns):
    x = draw(rows, columns) * torch.logspace(-3, 3, columns)
    kind, found = scheme_of(scheme), quantise_reference(x, scheme)
    assert found.values.dtype == kind.dtype and found.shape == (rows, columns)
    assert found.scale.dtype == torch.float32 and tuple(found.scale.shape) == kind.scale_shape(rows, columns)
    for index, down, across in groups(x, scheme):
        part = x[down, across]
        scale = part.abs().max() / kind.top
        assert found.scale[index] == scale
        numbers = part * (1 / scale)
        wanted = numbers.round() if not kind.fp8 else numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        assert torch.equal(found.values[down, :columns][:, across].float(), wanted)
        step = 0.5 * scale if not kind.fp8 else (part.abs() / 16).clamp_min(2.0**-10 * scale)
        assert ((found.dequantise()[down, across] - part).abs() <= step * 1.0001).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_rows_are_padded_with_zeros_to_16_bytes(scheme):
    found = quantise(draw(2, 3, 37), scheme)
    assert found.values.shape == (6, 48) and found.shape == (2, 3, 37)
    assert not found.values[:, 37:].float().any() and found.dequantise().shape == (2, 3, 37)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns", "inner"), SIZES)
def test_product_is_that_of_the_rounded_numbers(scheme, rows, columns, inner):
    a, b = quantise(draw(rows, inner), scheme), quantise(draw(columns, inner, seed=1), scheme)
    bias = draw(columns, seed=2)
    wanted = a.dequantise().double() @ b.dequantise().double().T + bias.double()
    found = product_reference(a, b, bias)
    assert found.dtype == torch.float32 and relative(found, wanted) < 3e-6
    assert relative(product_reference(a, b) + bias, wanted) < 3e-6


def test_sums_of_int8_are_exact_where_float32_would_round():
    ones = torch.full((2, 4099), 127.0)
    ones[:, 4098] = 1.0
    a = quantise(ones, "int8_row")
    assert a.scale.tolist() == [1.0, 1.0]
    assert product_reference(a._replace(dtype=torch.float64), a)[0, 1] == float(torch.tensor(127**2 * 4098 + 1.0))


@pytest.mark.parametrize(("scheme", "bound"), [("int8_tile", 0.016), ("int8_row", 0.015), ("fp8_row", 0.040)])
def test_error_on_gaussian_numbers(scheme, bound):
    x, weight = draw(200, 640), draw(150, 640, seed=1) / 25
    error = relative(w8a8_linear(x, quantise(weight, scheme)), x.double() @ weight.double().T)
    assert 0.3 * bound < error < bound


def test_an_outlier_spoils_its_own_group_alone():
    x, weight = draw(256, 256), draw(64, 256, seed=1)
    exact = x @ weight.T
    x[3, 5] = 3e4
    change = x @ weight.T
    for scheme, others in (("int8_row", 0.02), ("fp8_row", 0.05)):
        found = w8a8_linear(x, quantise(weight, scheme))
        rows = torch.arange(256) != 3
        assert relative(found[rows], exact[rows]) < others
        assert relative(found[3], change[3]) < 0.05
    found = w8a8_linear(x, quantise(weight, "int8_tile"))
    assert relative(found[128:], exact[128:]) < 0.02 and relative(found[:3], exact[:3]) > 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_tiny_numbers_and_what_is_not_finite(scheme):
    x = draw(300, 130)
    x[0], x[1] = 0.0, 1e-42
    weight = quantise(draw(9, 130, seed=1), scheme)
    assert torch.equal(w8a8_linear(torch.zeros(3, 130), weight), torch.zeros(3, 9))
    assert torch.equal(w8a8_linear(torch.full((3, 130), 1e-42), weight), torch.zeros(3, 9))
    assert torch.equal(w8a8_linear(x, weight)[:2], torch.zeros(2, 9))
    for bad in (math.nan, math.inf, -math.inf):
        x[140, 7] = bad
        found = w8a8_linear(x, weight)
        spoilt = torch.zeros(300, dtype=torch.bool)
        spoilt[128 : 256 if SCHEMES[scheme].tiled else 141] = True
        spoilt[128:140] &= SCHEMES[scheme].tiled
        assert torch.equal(found.isnan().all(1), spoilt) and torch.equal(found.isnan().any(1), spoilt)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_rows_no_columns_and_leading_sizes(scheme):
    weight = quantise(draw(6, 20, seed=1), scheme)
    assert w8a8_linear(torch.zeros(0, 20), weight).shape == (0, 6)
    assert w8a8_linear(torch.zeros(2, 0, 20), weight, torch.ones(6)).shape == (2, 0, 6)
    x = draw(2, 3, 20)
    assert torch.equal(w8a8_linear(x, weight), w8a8_linear(x.flatten(0, 1), weight).view(2, 3, 6))
    assert torch.equal(w8a8_linear(x[0, 0], weight), w8a8_linear(x[0, :1], weight)[0])


def test_inputs_are_not_changed_and_strides_do_not_matter():
    x = draw(40, 30).T
    before = x.clone()
    weight = quantise(draw(8, 40, seed=1), "int8_tile")
    assert torch.equal(w8a8_linear(x, weight), w8a8_linear(x.contiguous(), weight)) and torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input_also_under_autocast(dtype):
    x, weight = draw(6, 33).to(dtype), quantise(draw(8, 33, seed=1), "int8_row")
    wanted = w8a8_linear(x, weight)
    assert wanted.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(w8a8_linear(x, weight), wanted)


def test_the_door_names_the_kernel_and_the_reasons():
    x, weight = draw(4, 32), quantise(draw(8, 32, seed=1), "fp8_row")
    choice = explain(x, weight)
    if not weight.values.is_cuda:
        assert choice.kernel == "reference" and choice.able == ()
        assert "the weight is on cpu" in choice.refused["cublas"]
    assert explain(x, weight, kernel="reference").kernel == "reference"
    assert "a scale a row; int8_tile given" in explain(x, quantise(draw(8, 32), "int8_tile")).refused["cublas"]


def test_bad_input_is_refused_with_its_reason():
    x, weight = draw(4, 32), quantise(draw(8, 32, seed=1), "int8_row")
    for call, words in (
        (lambda: quantise(x, "int4"), "scheme: 'int4' given; known are int8_tile"),
        (lambda: quantise(x.int(), "int8_row"), r"x: torch.int32 \(4, 32\) given"),
        (lambda: quantise(x, "int8_row", "cutlass"), "kernel: 'cutlass' given"),
        (lambda: w8a8_linear(draw(4, 31), weight), r"x: \(4, 31\) given; the weight is \(8, 32\)"),
        (lambda: w8a8_linear(x, draw(8, 32)), "weight: Tensor given"),
        (lambda: w8a8_linear(quantise(x, "fp8_row"), weight), "x: in fp8_row, and the weight in int8_row"),
        (lambda: w8a8_linear(x, weight, draw(7)), r"bias: torch.float32 \(7,\)"),
        (lambda: w8a8_linear(x, weight, kernel="cublas"), "kernel: 'cublas' cannot run this call"),
        (lambda: w8a8_linear(x, weight, kernel="cutlass"), "kernel: 'cutlass' given"),
        (lambda: w8a8_linear(x.requires_grad_(), weight), "gradients are asked for"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with torch.no_grad():
        assert w8a8_linear(x, weight).shape == (4, 8)
