"""The 8-bit linear layer against the layer that it was made of.

Shapes: M rows, N columns, K summed.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from allears.nn.w8a8 import W8A8Linear
from allears.ops.gemm.call import quantise
from allears.ops.gemm.reference import quantise_reference
from allears.ops.gemm.schemes import SCHEMES
from allears.ops.norm.fused import activate_quantised

ERRORS = {"int8_tile": 0.02, "int8_row": 0.015, "fp8_row": 0.04, "fp8_tile": 0.04}


def layers(scheme, inner=150, columns=70, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(inner, columns, bias=bias).to(dtype)
    return linear, W8A8Linear.from_linear(linear, scheme)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("inner", "columns", "bias"), [(150, 70, True), (1, 1, False), (128, 256, True), (17, 129, False)]
)
def test_it_gives_what_the_linear_layer_gives(scheme, inner, columns, bias):
    linear, layer = layers(scheme, inner, columns, bias)
    x = torch.randn(2, 67, inner)
    with torch.no_grad():
        found, wanted = layer(x), linear(x)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert relative(found, wanted) < ERRORS[scheme] * (1 if inner > 1 else 2)
    weight = quantise_reference(linear.weight.detach(), scheme).dequantise()
    given = quantise_reference(x, scheme).dequantise()
    exact = given.double() @ weight.double().T + (linear.bias.detach().double() if bias else 0)
    assert relative(found, exact) < 1e-6
    torch.testing.assert_close(layer.to_linear().weight.data, weight)


def test_shared_and_activated_inputs_are_taken_as_they_are():
    _, layer = layers("int8_row")
    x = torch.randn(5, 150)
    with torch.no_grad():
        assert torch.equal(layer(layer.quantise(x)), layer(x))
        wanted = layer(nn.functional.silu(x))
        assert relative(layer(activate_quantised(x, "silu", "int8_row")), wanted) < 1e-5
        with pytest.raises(ValueError, match="x: in fp8_row, and the weight in int8_row"):
            layer(quantise(x, "fp8_row"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_round_trip(scheme, tmp_path):
    _, layer = layers(scheme)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = W8A8Linear(150, 70, scheme=scheme)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 150)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x)) and float(layer(x).abs().max()) > 0
    assert set(layer.state_dict()) == {"values", "scale", "bias"}


def test_a_state_of_another_scheme_is_refused():
    _, layer = layers("int8_row")
    with pytest.raises(ValueError, match=r"values: torch.int8 in the state dict, and the layer's scheme 'fp8_row'"):
        W8A8Linear(150, 70, scheme="fp8_row").load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="scale: copying a param with shape"):
        W8A8Linear(150, 70, scheme="int8_tile").load_state_dict(layer.state_dict())


@pytest.mark.parametrize("scheme", ["int8_row", "fp8_tile"])
def test_casts_leave_the_eight_bits_alone(scheme):
    _, layer = layers(scheme)
    x = torch.randn(3, 150)
    with torch.no_grad():
        before, scale = layer(x), layer.scale.clone()
        block = nn.Sequential(layer).to(torch.bfloat16).double()
    assert layer.values.dtype == SCHEMES[scheme].dtype and torch.equal(layer.scale, scale)
    assert layer.bias is not None and layer.bias.dtype == torch.float64
    assert relative(block(x), before) < 3e-3  # the bias was rounded
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative(half, before) < 0.02


def test_under_autocast_it_gives_autocasts_dtype():
    linear, layer = layers("int8_row")
    x = torch.randn(3, 150)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = layer(x), linear(x)
    assert found.dtype == wanted.dtype == torch.bfloat16 and relative(found, wanted) < 0.02


def test_the_kernel_can_be_named():
    _, layer = layers("int8_row")
    layer.kernel = "reference"
    assert layer(torch.randn(3, 150)).shape == (3, 70)
    layer.kernel = "cublas"
    with pytest.raises(ValueError, match="kernel: 'cublas' cannot run this call: has FP8 with a scale a row"):
        layer(torch.randn(3, 150))


def test_bad_layers_are_refused():
    spoilt = nn.Linear(4, 4)
    spoilt.weight.data[1, 1] = float("nan")
    for call, words in (
        (lambda: W8A8Linear.from_linear(nn.Conv1d(4, 4, 1)), "linear: Conv1d given"),  # type: ignore
        (lambda: W8A8Linear.from_linear(spoilt), "holds an infinity or a NaN"),
        (lambda: W8A8Linear.from_linear(nn.Linear(4, 4, device="meta")), "on the meta device"),
        (lambda: W8A8Linear.from_linear(nn.Linear(4, 4), "fp4"), "scheme: 'fp4' given"),  # type: ignore
        (lambda: W8A8Linear(0, 4), "in_features, out_features: 0, 4 given"),
        (lambda: layers("int8_row")[1](torch.zeros(3, 149)), r"x: \(3, 149\) given; the weight is \(70, 150\)"),
        (lambda: layers("int8_row")[1](torch.zeros(3, 150, requires_grad=True)), "gradients are asked for"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_it_says_what_it_is():
    assert repr(layers("fp8_row", bias=False)[1]) == "W8A8Linear(150, 70, bias=False, scheme='fp8_row')"
