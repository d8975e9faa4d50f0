"""Linear attention's Hopper kernels without a GPU: compiled by NVRTC, what came out, what fits, and how parameters lie
in memory."""

import ctypes
import logging
import re
from collections import Counter

import pytest
import torch

pytest.importorskip("triton", reason="the pass between the kernels needs Triton: pip install 'allears[gpu]'")

from allears.ops import nvrtc
from allears.ops.aot import _read_cubin
from allears.ops.attention.linear.hopper import host
from allears.ops.attention.linear.hopper.forms import Form, form_of
from allears.ops.attention.linear.one_call import Call
from allears.ops.attention.lowbit.hopper.host import headers, sources

JOINT = Call("focused", 3, "channels", 1e-6)


@pytest.fixture
def compiled(monkeypatch, tmp_path, caplog):
    """A function that gives machine code of a form, and what the compiler said."""
    try:
        nvrtc._nvrtc()
    except nvrtc.KernelError as error:
        pytest.skip(f"{error}: pip install 'allears[dev]'")
    monkeypatch.setenv("ALLEARS_CACHE", str(tmp_path))

    def build(file, form):
        texts = headers(host.FOLDER), form.defines()
        with caplog.at_level(logging.INFO, logger="allears.ops.nvrtc"):
            code = nvrtc.compile_cubin(sources(host.FOLDER)[file], file, *texts, flags=["--ptxas-options=-v"])
        return code, caplog.text

    return build


def opcodes(code):
    sass = _read_cubin("nvdisasm", "-c", code)
    return Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass, flags=re.MULTILINE))


# 32 rows and 64 channels of a warp: products of 16 x 8 with 16 terms, 2 x 8 x 4 for the output (half of the terms where
# heads are smaller) and 4 x 8 x 2 for the sums.
@pytest.mark.parametrize(
    ("file", "function", "form"),
    [
        ("output.cu", "linear_output", Form(8, 64, 3, False, 5)),
        ("output.cu", "linear_output", Form(8, 64, 3, True, 5)),
        ("output.cu", "linear_output", Form(8, 64, 3, True, 7)),
        ("output.cu", "linear_output", Form(2, 16, 3, False, 5)),
        ("output.cu", "linear_output", Form(4, 32, 2, True, 3)),
        ("output.cu", "linear_output", Form(3, 64, 3, False, 1)),
        ("output.cu", "linear_output", Form(1, 64, 3, False, 0)),
        ("states.cu", "linear_states", Form(8, 64, 3, False)),
        ("states.cu", "linear_states", Form(2, 16, 3, True)),
        ("states.cu", "linear_states", Form(3, 64, 2, False)),
        ("states.cu", "linear_states", Form(1, 32, 3, True)),
    ],
)
def test_multiplies_by_the_matrix_unit_and_spills_nothing(compiled, file, function, form):
    code, log = compiled(file, form)
    assert f"Compiling entry function '{function}' for 'sm_90a'" in log
    assert "0 bytes stack frame, 0 bytes spill stores" in log
    assert re.findall(r"Used (\d+) registers", log) == ["168"]  # 384 threads; 232 where it multiplies
    counts = opcodes(code)
    assert counts["HMMA"] == (32 if file == "output.cu" and form.size < 64 else 64), counts
    assert counts["USETMAXREG"] == 2 and counts["UTMALDG"] > 0, counts
    assert not counts["LD"] and not counts["ST"], "an address of shared memory is not known as one"


@pytest.mark.parametrize("groups", range(1, 9))
@pytest.mark.parametrize("taps", [None, 0, 1, 3, 5, 7])
def test_buffers_fit_shared_memory(groups, taps):
    form = Form(groups, 64, 3, False, taps)
    assert form.shared_bytes <= 227 * 1024 and 2 <= form.stages <= 4 and form.stage_bytes % 1024 == 0
    assert form.parts * groups <= 8 < (form.parts + 1) * groups
    warps = form.parts * groups
    of_all_warps = warps * 64 * 64 * 4  # sums, at the end
    assert taps is not None or of_all_warps <= form.stages * form.stage_bytes
    assert not taps or (form.v_rows >= 32 + taps - 1 and form.v_rows % 4 == 0)


def test_parameters_lie_as_the_kernels_read_them():
    assert ctypes.sizeof(host._OutputParams) == 8 * 8 + 5 * 8 + 6 * 4 + 4 + 4  # the last four fill up
    assert host._OutputParams.conv_kind.offset == 104 and host._OutputParams.eps.offset == 128
    assert ctypes.sizeof(host._StatesParams) == 4 * 8 + 2 * 4


def test_what_bulk_copies_read():
    x = torch.zeros(2, 9, 8, 64, dtype=torch.float16)
    assert host.copied_in_bulk(x) and host.copied_in_bulk(x[:, 1:]) and host.copied_in_bulk(x[:, ::2])
    flat = torch.zeros(2 * 9 * 516 + 8, dtype=torch.float16)
    assert not host.copied_in_bulk(flat[1:].as_strided((2, 9, 8, 64), (9 * 512, 512, 64, 1)))  # begins beside 16 bytes
    assert not host.copied_in_bulk(flat.as_strided((2, 9, 8, 64), (9 * 516, 516, 64, 1)))
    assert not host.copied_in_bulk(flat.as_strided((2, 9, 8, 64), (9 * 512 + 4, 512, 64, 1)))
    assert not host.copied_in_bulk(x[:1].expand(2, 9, 8, 64))
    assert host.copied_in_bulk(flat.as_strided((1, 9, 8, 64), (3, 512, 64, 1)))  # no step in a batch of one


def test_which_calls_fit(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cuda = True

    def fits(shape=(1, 64, 8, 64), taps=5, keys=64, **how):
        call = Call(**{"kind": "focused", "power": 3, "norm": "channels", "eps": 1e-6, **how})
        q = torch.zeros(shape, dtype=torch.bfloat16).as_subclass(OnGpu)
        v = torch.zeros(shape[0], keys, *shape[2:], dtype=torch.bfloat16).as_subclass(OnGpu)
        return host.states_fit(v, v, call), host.output_fits(q, v, taps, call)

    assert fits() == fits(taps=0, keys=3) == fits(power=2) == (True, True)
    assert fits(taps=9) == fits(taps=4) == (True, False)
    assert fits(keys=0) == fits(power=4) == fits(power=1) == fits(norm="head") == fits(kind="elu") == (False, False)
    x = torch.zeros(1, 64, 8, 64, dtype=torch.bfloat16)
    assert not host.states_fit(x, x, JOINT)  # on the CPU


def test_maps_are_kept_by_what_they_hold(monkeypatch):
    """Two tensors of one place and form share a map; batches and rows of one get steps that the driver takes."""
    made = []
    monkeypatch.setattr(host, "_maps", {})
    monkeypatch.setattr(host, "tensor_map", lambda x, box, swizzle: made.append((x.shape, x.stride(), box)) or object())
    x = torch.zeros(1, 40, 8, 64, dtype=torch.float16)
    first = host.rows_map(x, 8, 32)
    assert host.rows_map(x.view(1, 40, 8, 64), 8, 32) is first
    assert host.rows_map(x, 8, 36) is not first and host.rows_map(x[:, 1:], 8, 32) is not first
    assert made[0] == ((1, 8, 40, 64), (40 * 512, 64, 512, 1), (1, 8, 32, 64))
    for n in range(2 * host._MOST_MAPS):
        host.rows_map(x, 8, n + 100)
    assert len(host._maps) <= host._MOST_MAPS


def test_parts_of_the_keys(monkeypatch):
    monkeypatch.setattr(host, "processors", lambda device: 132)

    def parts(batch, rows, heads=8, size=64, cu=None):
        cu = None if cu is None else torch.tensor(cu)
        k = torch.empty(batch, rows, heads, size, dtype=torch.bfloat16, device="meta")
        return host.part_count(k, Call("focused", 3, "channels", 1e-6, cu))

    assert parts(1, 2**20) == 132 and parts(1, 33) == 2 and parts(1, 1) == 1
    assert parts(3, 2**20) == 44 and parts(500, 4096) == 1
    assert parts(1, 1024, 8, 16) == 8  # 128 rows of 128 channels at once
    assert parts(1, 2048, cu=[0, 1, 2048]) == 32
    assert form_of(torch.empty(1, 1, 12, 16), 3).parts == 2
