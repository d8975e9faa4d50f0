"""Fused norms, residuals, modulation and RoPE against PyTorch, and the kernels against the reference.

Shapes: B entries, L rows of an entry, H heads, D head size, C channels.
"""

import os
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests.ops.poison import poison_new_empty

from allears.ops.gemm.reference import quantise_reference
from allears.ops.gemm.schemes import SCHEMES, Quantised
from allears.ops.norm.fused import (
    activate_quantised,
    explain,
    fused_rows,
    gated_residual,
    layer_norm_modulated,
    residual_norm,
    rms_norm,
)
from allears.ops.norm.rope import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
KERNELS = ("reference", "triton") if find_spec("triton") else ("reference",)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install 'allears[gpu]'")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Each kernel, with fresh memory full of NaN."""
    poison_new_empty(monkeypatch)
    return request.param


def near(found, wanted, dtype=torch.float32):
    assert found.dtype == dtype
    close = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found.float(), wanted.float(), **close)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5, 24), torch.float32), ((7, 130), HALF), ((1, 1), torch.float32)])
def test_rms_norm_is_pytorchs(kernel, shape, dtype):
    x, weight = draw(*shape, dtype=dtype) * 3, draw(shape[-1], seed=1)
    near(rms_norm(x, weight, 1e-5, kernel=kernel), F.rms_norm(x.float(), shape[-1:], weight, 1e-5), dtype)
    near(rms_norm(x, eps=1e-5, kernel=kernel), F.rms_norm(x.float(), shape[-1:], None, 1e-5), dtype)


@pytest.mark.parametrize("modulation", [(2, 1, 40), (1, 1, 40), (2, 9, 40), (2, 40), (40,)])
def test_layer_norm_with_modulation(kernel, modulation):
    x, scale, shift = 3 * draw(2, 9, 40) + 5, draw(*modulation, seed=1), draw(*modulation, seed=2)
    weight, bias = draw(40, seed=3), draw(40, seed=4)
    plain = F.layer_norm(x, (40,), weight, bias, 1e-6)
    wide = [t[:, None] if t.dim() == 2 else t for t in (scale, shift)]
    found = layer_norm_modulated(x, scale, shift, weight, bias, kernel=kernel)
    near(found, plain * (1 + wide[0]) + wide[1])
    near(layer_norm_modulated(x, weight=weight, bias=bias, kernel=kernel), plain)


def test_modulation_may_be_a_slice_of_six_and_scale_and_shift_may_differ(kernel):
    six = draw(2, 6, 24, seed=1)
    shift, scale = six.chunk(6, dim=1)[:2]
    x = draw(2, 7, 24)
    near(layer_norm_modulated(x, scale, shift, kernel=kernel), F.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + shift)
    rows = draw(1, 7, 24, seed=2)
    near(layer_norm_modulated(x, scale, rows, kernel=kernel), F.layer_norm(x, (24,), eps=1e-6) * (1 + scale) + rows)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_residual_then_norm(kernel, dtype):
    x, branch, gate = draw(2, 9, 40, dtype=dtype), draw(2, 9, 40, seed=1, dtype=dtype), draw(2, 1, 40, seed=2)
    scale, shift = draw(2, 1, 40, seed=3), draw(2, 1, 40, seed=4)
    wanted = (x.float() + branch.float() * gate).to(dtype)
    total, found = residual_norm(x, branch, gate, scale, shift, kernel=kernel)
    near(total, wanted, dtype)
    near(found, F.layer_norm(total.float(), (40,), eps=1e-6) * (1 + scale) + shift, dtype)
    near(gated_residual(x, branch, gate, kernel), wanted, dtype)
    near(gated_residual(x, branch, kernel=kernel), x.float() + branch.float(), dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
def test_eight_bits_are_those_of_the_norm(kernel, scheme, norm):
    x, branch, gate = 4 * draw(2, 77, 150) + 1, draw(2, 77, 150, seed=1), draw(2, 1, 150, seed=2)
    modulation = {"scale": draw(2, 1, 150, seed=3), "shift": draw(2, 1, 150, seed=4)}
    plain, total = fused_rows(x, branch=branch, gate=gate, norm=norm, kernel="reference", **modulation)
    found, sums = fused_rows(x, branch=branch, gate=gate, norm=norm, kernel=kernel, scheme=scheme, **modulation)
    assert isinstance(found, Quantised) and found.shape == (2, 77, 150) and found.dtype == torch.float32
    near(sums, total)
    wanted = quantise_reference(plain, scheme)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-5, atol=0)
    same = found.values.view(torch.uint8) == wanted.values.view(torch.uint8)
    assert same.float().mean() > 0.999  # a number may lie at the border of two
    torch.testing.assert_close(found.values.float(), wanted.values.float(), rtol=0.13, atol=1.0)


@pytest.mark.parametrize("scheme", ["int8_row", "fp8_tile"])
@pytest.mark.parametrize(
    ("name", "function"), [("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")), ("silu", F.silu)]
)
def test_activation_in_eight_bits(kernel, scheme, name, function):
    x = 3 * draw(140, 150)
    x[0, :4] = torch.tensor([-90.0, 90.0, 0.0, -0.0])
    found, wanted = activate_quantised(x, name, scheme, kernel), quantise_reference(function(x), scheme)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-5, atol=0)
    assert (found.values.view(torch.uint8) == wanted.values.view(torch.uint8)).float().mean() > 0.995
    torch.testing.assert_close(found.values.float(), wanted.values.float(), rtol=0.13, atol=1.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "size"), [(3, 8), (2, 6), (1, 2)])
def test_rope_turns_complex_numbers(kernel, heads, size, norm):
    x = draw(2, heads, 11, size).transpose(1, 2)
    angles = draw(11, size // 2, seed=1) * 3
    weight = draw(heads * size, seed=2) if norm else None
    rows = x.flatten(2)
    rows = (F.rms_norm(rows, rows.shape[-1:], weight, 1e-6) if norm else rows).unflatten(2, (heads, size))
    turned = (
        torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    given = {"weight": weight, "norm": norm, "kernel": kernel}
    near(rotate(x, angles.cos(), angles.sin(), **given), torch.view_as_real(turned).flatten(-2))
    order = torch.arange(size, device=DEVICE).view(2, -1).T.flatten()  # the pairs of halves, side by side
    if norm:
        given["weight"] = (
            torch.empty_like(weight).view(heads, size).index_copy(1, order, weight.view(heads, -1)).flatten()
        )
    halves = torch.empty_like(x).index_copy(3, order, x)
    found = rotate(halves, angles.cos(), angles.sin(), interleaved=False, **given)
    near(found[..., order], torch.view_as_real(turned).flatten(-2))


@needs_triton
def test_half_precision_rope_keeps_its_dtype():
    x, angles = draw(1, 5, 2, 8, dtype=HALF), draw(5, 4, seed=1)
    found, wanted = (rotate(x, angles.cos(), angles.sin(), kernel=k) for k in ("triton", "reference"))
    near(found, wanted, HALF)


def test_inputs_are_not_changed_and_nothing_is_made_of_nothing(kernel):
    x, branch = draw(2, 3, 20), draw(2, 3, 20, seed=1)
    before = x.clone(), branch.clone()
    residual_norm(x, branch, kernel=kernel, scheme="int8_tile")
    assert torch.equal(x, before[0]) and torch.equal(branch, before[1])
    empty = draw(2, 0, 20)
    assert rms_norm(empty, kernel="auto").shape == (2, 0, 20)
    for scheme in SCHEMES:
        found = rms_norm(empty, scheme=scheme, kernel=kernel)
        assert found.values.shape == (0, 32) and found.dequantise().shape == (2, 0, 20)


def test_gradients_pass_through_the_reference_and_are_refused_elsewhere():
    x = draw(2, 3, 20).requires_grad_()
    near(torch.autograd.grad(rms_norm(x).square().sum(), x)[0], torch.zeros(2, 3, 20, device=DEVICE))
    with pytest.raises(ValueError, match="gradients are asked for"):
        rms_norm(x, scheme="int8_row")
    with torch.no_grad():
        assert isinstance(rms_norm(x, scheme="int8_row"), Quantised)


def test_bad_input_is_refused_with_its_reason():
    x = draw(2, 3, 20)
    angles = draw(3, 5)
    for call, words in (
        (lambda: fused_rows(x, norm="batch"), "norm, activation: 'batch' and 'none' given"),
        (lambda: fused_rows(x, activation="relu"), "'layer' and 'relu' given"),
        (lambda: fused_rows(x, scheme="int4"), "scheme: 'int4' given"),
        (lambda: rms_norm(x, draw(19)), r"weight: \(19,\) given; wanted is \(20,\)"),
        (lambda: rms_norm(x, kernel="cuda"), "kernel: 'cuda' given"),
        (lambda: rms_norm(x.long()), "x: torch.int64"),
        (lambda: layer_norm_modulated(x, draw(3, 1, 20)), r"scale: \(3, 1, 20\) given for x \(2, 3, 20\)"),
        (lambda: layer_norm_modulated(x[0], draw(20)), r"scale: \(1, 1, 20\) given for x \(3, 20\)"),
        (lambda: gated_residual(x, draw(2, 3, 1)), r"branch: \(2, 3, 1\) given"),
        (lambda: fused_rows(x, gate=draw(20)), "gate: given without a branch"),
        (lambda: rotate(draw(1, 3, 2, 9), angles, angles), "an even D"),
        (lambda: rotate(draw(1, 3, 2, 8), angles, angles), r"wanted is \(L, D / 2\) = \(3, 4\)"),
        (lambda: rotate(draw(1, 3, 2, 10), angles, angles, weight=draw(20)), "norm=False"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    if DEVICE == "cpu":
        assert explain(x).kernel == "reference" and "triton" in explain(x).refused
