"""The kernels for Hopper compiled by NVRTC without a GPU, and what came out of it."""

import logging
import re
from collections import Counter

import pytest

from allears.ops import nvrtc
from allears.ops.aot import _read_cubin
from allears.ops.attention.lowbit.hopper import host, launches
from allears.ops.attention.lowbit.hopper.launches import BackwardLaunch, ForwardLaunch


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path):
    """A compiler, and no code kept by earlier runs."""
    try:
        nvrtc._nvrtc()
    except nvrtc.KernelError as error:
        pytest.skip(f"{error}: pip install 'allears[dev]'")
    monkeypatch.setenv("ALLEARS_CACHE", str(tmp_path))


def build(file, caplog, change=("", ""), **defines):
    """Machine code of a kernel file for sm_90a, and what the compiler said; ``change`` is made in the headers."""
    headers = {name: text.replace(*change) for name, text in host.headers().items()}
    with caplog.at_level(logging.INFO, logger="allears.ops.nvrtc"):
        code = nvrtc.compile_cubin(host.sources()[file], file, headers, defines, flags=["--ptxas-options=-v"])
    return code, caplog.text


def opcodes(code):
    sass = _read_cubin("nvdisasm", "-c", code)
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, flags=re.MULTILINE))


def check_log(log, functions, spilled_bytes=100):
    for function in functions:
        assert f"Compiling entry function '{function}' for 'sm_90a'" in log
    assert not waits_of_the_compiler(log)
    assert all(int(n) <= spilled_bytes for n in re.findall(r"(\d+) bytes spill stores", log)), log


def waits_of_the_compiler(log):
    """What ptxas says where it makes warpgroup products wait for one another, which costs most of their speed."""
    return [line for line in log.splitlines() if "instructions are serialized" in line or "is injected" in line]


# 128 keys a tile: a product of 32 terms is an instruction, for Q K^T and, over the keys, for P V.
@pytest.mark.parametrize(
    ("defines", "launch", "wanted"),
    [
        (
            {"HEAD_DIM": 128, "CAUSAL": 0, "PV_INT8": 0, "IN_FP16": 0, "SAVE_Q": 0},
            launches.FORWARD["fp8", 128],
            {"IGMMA": 4, "QGMMA": 4},
        ),
        (
            {"HEAD_DIM": 64, "CAUSAL": 1, "PV_INT8": 0, "IN_FP16": 1, "SAVE_Q": 0},
            ForwardLaunch(skip=True),
            {"IGMMA": 2, "QGMMA": 4},
        ),
        (
            {"HEAD_DIM": 64, "CAUSAL": 1, "PV_INT8": 1, "IN_FP16": 0, "SAVE_Q": 1},
            ForwardLaunch(skip=True),
            {"IGMMA": 6, "IDP": 16},
        ),
        (
            {"HEAD_DIM": 128, "CAUSAL": 1, "PV_INT8": 1, "IN_FP16": 0, "SAVE_Q": 1},
            ForwardLaunch(),
            {"IGMMA": 8, "IDP": 16},
        ),
    ],
)
def test_forward_multiplies_in_8_bits(defines, launch, wanted, caplog):
    pytest.importorskip("triton", reason="its disassembler is used: pip install 'allears[gpu]'")
    code, log = build("forward.cu", caplog, **defines, **launch.defines)
    check_log(log, ["attention_forward"], spilled_bytes=24)
    counts = opcodes(code)
    assert all(counts[name] >= least for name, least in wanted.items()), counts
    assert not counts["HGMMA"] and not counts["HMMA"] and bool(counts["QGMMA"]) == ("QGMMA" in wanted)


def test_serialised_products_are_seen(caplog):
    defines = {"HEAD_DIM": 64, "CAUSAL": 0, "PV_INT8": 0, "IN_FP16": 0, "SAVE_Q": 0}
    defines |= ForwardLaunch().defines
    called = ("DEVICE void mma_commit()", "__device__ __noinline__ void mma_commit()")
    _, log = build("forward.cu", caplog, called, **defines)
    assert waits_of_the_compiler(log)


# Of the backward's five products, three are in INT8: 4 + 4 + 4 instructions of 32 terms at D = 128, 2 + 2 + 2 at 64;
# two are in 16 bits: dO V^T over D, and dQ over the keys of the block, 16 terms each.
@pytest.mark.parametrize(
    ("size", "causal", "launch", "integer", "half"),
    [
        (128, 1, BackwardLaunch(late=True), 12, 16),
        (64, 0, BackwardLaunch(), 6, 12),
        (64, 1, BackwardLaunch(groups=3, late=True, turns=True), 6, 16),
    ],
)
def test_backward_multiplies_in_8_and_16_bits(size, causal, launch, integer, half, caplog):
    pytest.importorskip("triton", reason="its disassembler is used: pip install 'allears[gpu]'")
    code, log = build("backward.cu", caplog, HEAD_DIM=size, CAUSAL=causal, IN_FP16=0, **launch.defines)
    check_log(log, ["attention_backward"], spilled_bytes=96 if launch.groups == 3 else 32)
    counts = opcodes(code)
    assert counts["IGMMA"] >= integer and counts["HGMMA"] >= half and not counts["HMMA"], counts


@pytest.mark.parametrize(
    ("size", "launch", "kibibytes"),
    [
        (64, BackwardLaunch(), 115),  # K 40, dS 16, dQ 16, two stages of 21, 1 to align
        (64, BackwardLaunch(groups=3, late=True, turns=True), 199),  # K 60, dS 48, dQ 48
        (64, BackwardLaunch(groups=3, late=True, turns=True, stages=3), 220),
        (128, BackwardLaunch(), 211),
        (128, BackwardLaunch(late=True), 227 - 80 / 1024),  # all there is, beside 80 bytes of barriers
    ],
)
def test_shared_memory_of_the_backward(size, launch, kibibytes):
    assert launch.shared_bytes(size) == kibibytes * 1024


def test_launches_that_there_are_fit():
    """The table knows both head sizes, and asks only for what the kernels can do."""
    assert set(launches.FORWARD) == {(pv, size) for pv in ("fp8", "int8") for size in (64, 128)}
    assert set(launches.BACKWARD) == {64, 128}
    for size, launch in launches.BACKWARD.items():
        assert launch.late or not launch.turns
        assert launch.turns or launch.groups == 2
        assert size == 64 or not launch.turns


@pytest.mark.parametrize(
    ("file", "functions", "defines"),
    [
        ("quantise.cu", ("key_mean", "quantise_kv"), {"HEAD_DIM": 128, "V_INT8": 0, "IN_FP16": 0}),
        ("backward_prepare.cu", ("backward_prepare", "backward_finish"), {"HEAD_DIM": 64, "IN_FP16": 1}),
    ],
)
def test_what_surrounds_them_compiles(file, functions, defines, caplog):
    _, log = build(file, caplog, **defines)
    check_log(log, functions)


def test_code_is_kept_and_refusals_hold_the_log(tmp_path):
    source = 'extern "C" __global__ void f(int* x) { *x = NUMBER; }'
    code = nvrtc.compile_cubin(source, "small.cu", {}, {"NUMBER": 1})
    (kept,) = (tmp_path / "kernels").iterdir()
    assert kept.read_bytes() == code
    kept.write_bytes(b"from the cache")
    assert nvrtc.compile_cubin(source, "small.cu", {}, {"NUMBER": 1}) == b"from the cache"
    assert nvrtc.compile_cubin(source, "small.cu", {}, {"NUMBER": 2}) not in (code, b"from the cache")
    with pytest.raises(nvrtc.KernelError, match=r"small.cu does not compile for sm_90a:\n.*nothing"):
        nvrtc.compile_cubin(source, "small.cu", {}, {"NUMBER": "nothing"})
