"""The Triton product and quantisers against the references: in the interpreter on a CPU, else on the chip.

Shapes: M rows, N columns, K summed.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install 'allears[gpu]'")

from tests.ops.poison import poison_new_empty  # noqa: E402

from allears.ops.gemm import tuned  # noqa: E402
from allears.ops.gemm.call import explain, quantise, w8a8_linear  # noqa: E402
from allears.ops.gemm.ops import w8a8_triton  # noqa: E402
from allears.ops.gemm.reference import product_reference, quantise_reference  # noqa: E402
from allears.ops.gemm.schemes import SCHEMES  # noqa: E402
from allears.ops.gemm.triton_host import product  # noqa: E402
from allears.ops.gemm.tuned import Config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter takes bfloat16 for integers
FP8_ERROR = 2e-3 if DEVICE == "cuda" else 1e-6  # Hopper adds products of FP8 with 14 bits or so


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a kernel does not write is NaN, or 0x7F."""
    poison_new_empty(monkeypatch)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def bits(x):
    return x.view(torch.uint8)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (9, 5), (3, 12), (3, 37), (130, 140), (128, 256), (257, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_quantisers_give_the_same_bits(scheme, rows, columns, dtype):
    x = draw(rows, columns, dtype=dtype) * torch.logspace(-2, 2, columns, device=DEVICE).to(dtype)
    x[0] = 0
    if rows > 1:
        x[1, 0] = float("inf") if rows > 128 else 3e3
    found, wanted = quantise(x, scheme, "triton"), quantise_reference(x, scheme)
    assert torch.equal(bits(found.values), bits(wanted.values))
    torch.testing.assert_close(found.scale, wanted.scale, rtol=0, atol=0, equal_nan=True)
    assert found[2:] == wanted[2:]


@pytest.mark.parametrize("make", ["triton", "reference"])
def test_scales_are_correctly_rounded(make):
    x = draw(300, 16)
    for scheme in ("int8_row", "fp8_row"):
        scale = quantise(x, scheme, make).scale
        assert torch.equal(scale, (x.abs().amax(1).double() / SCHEMES[scheme].top).float())


def test_quantisers_take_any_strides():
    x = draw(2, 40, 30).transpose(1, 2)
    for scheme in SCHEMES:
        found, wanted = quantise(x, scheme, "triton"), quantise_reference(x, scheme)
        assert torch.equal(bits(found.values), bits(wanted.values)) and torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns", "inner"), [(1, 5, 7), (65, 40, 130), (130, 140, 200), (64, 128, 128)])
@pytest.mark.parametrize("maps", [False, True])
def test_product_equals_the_reference(scheme, rows, columns, inner, maps):
    if maps and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor maps need compute capability 9.0")
    a, b = quantise_reference(draw(rows, inner), scheme), quantise_reference(draw(columns, inner, seed=1), scheme)
    bias = draw(columns, seed=2, dtype=HALF)
    for config in (Config(64, 64, bk=64, warps=4, stages=2), Config(128, 128, map_out=True, group=2)):
        found = product(a.values, b.values, a.scale, b.scale, bias, scheme, torch.float32, config, maps)
        wanted = product_reference(a, b, bias)
        assert found.isfinite().all() and relative(found, wanted) < (FP8_ERROR if "fp8" in scheme else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_candidate_of_this_chip_is_right(scheme):
    from allears.ops.gemm.triton_host import can_specialise

    major, minor = torch.cuda.get_device_capability()
    chip = tuned.chip_of(10 * major + minor)
    a, b = (quantise_reference(draw(n, 1040, seed=n), scheme) for n in (1000, 520))
    wanted = product_reference(a, b)
    for config in tuned.candidates_for(chip, scheme):
        if config.specialise and not can_specialise():
            continue
        found = product(a.values, b.values, a.scale, b.scale, None, scheme, torch.float32, config)
        assert relative(found, wanted) < (FP8_ERROR if "fp8" in scheme else 1e-6), config.name


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_cublas_equals_the_reference(bias):
    x, weight = draw(1001, 528, dtype=HALF), quantise(draw(272, 528, seed=1, dtype=HALF), "fp8_row")
    shift = draw(272, seed=2) if bias else None
    wanted = w8a8_linear(x, weight, shift, "reference")
    assert relative(w8a8_linear(x, weight, shift, "cublas"), wanted) < 5e-3
    assert relative(w8a8_linear(x, weight, shift, "triton"), wanted) < 5e-3
    assert explain(x, weight).kernel != "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_graph_holds_it_whole(scheme):
    x, weight = draw(300, 256, dtype=HALF), quantise(draw(64, 256, seed=1, dtype=HALF), scheme)
    call = torch.compile(lambda x: w8a8_linear(x, weight) * 2, fullgraph=True)
    assert relative(call(x), w8a8_linear(x, weight) * 2) < 1e-2


def test_the_door_runs_the_named_kernel_with_bias_and_leading_sizes():
    x = draw(2, 33, 50, dtype=HALF)
    for scheme in SCHEMES:
        weight = quantise(draw(21, 50, seed=1, dtype=HALF), scheme, "reference")
        bias = draw(21, seed=2)
        assert explain(x, weight, bias, "triton").kernel == "triton"
        found, wanted = (w8a8_linear(x, weight, bias, kernel) for kernel in ("triton", "reference"))
        assert found.dtype == HALF and found.shape == (2, 33, 21) and relative(found, wanted) < 5e-3


def test_the_operator_is_sound():
    a, b = quantise_reference(draw(5, 20), "int8_tile"), quantise_reference(draw(7, 20, seed=1), "int8_tile")
    arguments = (a.values, b.values, a.scale, b.scale, None, "int8_tile", torch.float32)
    torch.library.opcheck(w8a8_triton, arguments, test_utils=("test_schema", "test_faketensor"))


def test_configs_of_chips():
    assert [tuned.chip_of(c) for c in (80, 89, 90, 103, 120)] == [80, 80, 90, 100, 120]
    assert tuned.config_for(80, "fp8_row", 1000, 64, 64) == tuned.CANDIDATES[80, "int8_row"][0]
    assert tuned.config_for(90, "int8_row", 3, 64, 64).bm == 64
    for (chip, scheme), candidates in tuned.CANDIDATES.items():
        assert not candidates[0].specialise, f"{chip} {scheme}: the first must compile with every Triton"
        assert all(max(c.bm, c.bn, c.bk) <= 128 for c in candidates if scheme.endswith("tile"))
    for (chip, scheme, columns, inner), config in tuned.MEASURED.items():
        assert config in tuned.candidates_for(chip, scheme)
        fallback = tuned.config_for(chip, scheme, 10_000, columns, inner, specialise=False)
        assert not fallback.specialise and tuned.config_for(chip, scheme, 10_000, columns, inner, True) == config
