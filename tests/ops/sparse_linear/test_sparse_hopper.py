"""The 8-bit sparse-linear kernel for Hopper: compiled without a GPU, and on one against the reference.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D = 128, N_q and N_k blocks.
"""

import ctypes
import gc
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.ops.lowbit.test_hopper_build import check_log, opcodes
from tests.ops.lowbit.textbook import rel

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops import nvrtc, nvrtc_launch
from allears.ops.attention.lowbit.hopper import host as lowbit_host
from allears.ops.attention.sparse_linear import (
    SparseLinear,
    blocks_from_map,
    explain_sparse_linear,
    key_mean,
    pool_blocks,
    sparse_linear_attention,
)
from allears.ops.attention.sparse_linear.hopper import host
from allears.ops.attention.sparse_linear.hopper.params import Scratch
from allears.ops.attention.sparse_linear.ops_hopper import block_statistics
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference
from allears.ops.launches import Kept

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
OPTIONS = SparseLinear(precision="int8_fp8")


@pytest.mark.parametrize(
    ("file", "functions"),
    [
        ("forward.cu", ("sparse_forward", "linear_totals", "add_totals")),
        ("prepare.cu", ("statistics", "quantise")),
    ],
)
@pytest.mark.parametrize("half", [0, 1])
def test_kernels_compile_and_multiply_in_8_bits(file, functions, half, caplog, monkeypatch, tmp_path):
    try:
        nvrtc._nvrtc()
    except nvrtc.KernelError as error:
        pytest.skip(f"{error}: pip install 'allears[dev]'")
    pytest.importorskip("triton", reason="its disassembler is used: pip install 'allears[gpu]'")
    monkeypatch.setenv("ALLEARS_CACHE", str(tmp_path))
    source, headers = lowbit_host.sources(host.FOLDER)[file], lowbit_host.headers(host.FOLDER)
    defines = {"HEAD_DIM": 128, "IN_FP16": half}
    with caplog.at_level(logging.INFO, logger="allears.ops.nvrtc"):
        code = nvrtc.compile_cubin(source, file, headers, defines, flags=["--ptxas-options=-v"])
    check_log(caplog.text, functions, spilled_bytes=32 if file == "forward.cu" else 0)
    counts = opcodes(code)
    if file == "forward.cu":
        # Q K^T of a block: four products of 32 channels, at two places; P V and h: two each of 32 keys
        assert counts["IGMMA"] >= 8 and counts["QGMMA"] >= 8 and counts["HGMMA"] == 8, counts


def make(batch, queries, keys, heads, groups, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda")

    q = normal(batch, queries, heads, 128)
    k = normal(batch, keys, groups, 128) + 2 * normal(128)
    v = normal(batch, keys, groups, 128) + 0.5
    n_q, n_k = -(-queries // 128), -(-keys // 64)
    picked = torch.rand(batch, heads, n_q, n_k, generator=generator, device="cuda")
    ratio = torch.rand(batch, heads, n_q, generator=generator, device="cuda") * 0.8 + 0.1
    return q.to(dtype), k.to(dtype), v.to(dtype), picked, ratio


def map_of(picked, keep):
    count = max(1, int(keep * picked.shape[-1]))
    return picked >= picked.topk(count, -1).values[..., -1:]


def exact(q, k, v, blocks, ratio):
    wide = (x.float() for x in (q, k, v))
    return sparse_linear_reference(*wide, blocks, ratio, SparseLinear(), causal=False, scale=128**-0.5)


# Rounding q and k to 8 bits and P, v and phi to E4M3 costs about 4 % of the softmax branch and 0.6 % of the linear one.
@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "keep", "dtype"),
    [
        ((1, 256, 512, 1, 1), 0.5, torch.bfloat16),
        ((2, 1000, 1300, 4, 2), 0.2, torch.float16),
        ((1, 130, 100, 2, 1), 0.6, torch.bfloat16),
        ((1, 2000, 2000, 12, 12), 0.05, torch.bfloat16),
        ((3, 1, 65, 2, 2), 0.5, torch.bfloat16),
        ((1, 128, 1, 1, 1), 1.0, torch.bfloat16),
    ],
)
def test_it_computes_what_the_reference_does(shape, keep, dtype):
    q, k, v, picked, ratio = make(*shape, dtype)
    blocks = blocks_from_map(map_of(picked, keep))
    assert explain_sparse_linear(q, k, v, blocks, ratio, OPTIONS).kernel == "hopper"
    out, lse = sparse_linear_attention(q, k, v, blocks, ratio, OPTIONS, kernel="hopper", return_lse=True)
    wanted, wanted_lse = exact(q, k, v, blocks, ratio)
    assert rel(out.float(), wanted) < 0.05 and out.dtype == dtype
    torch.testing.assert_close(lse, wanted_lse, atol=0.05, rtol=0)
    assert torch.equal(sparse_linear_attention(q, k, v, blocks, ratio, OPTIONS, kernel="hopper"), out)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_each_branch_alone(ratio):
    q, k, v, picked, _ = make(1, 700, 1500, 2, 1)
    blocks = blocks_from_map(map_of(picked, 0.3))
    share = torch.full((1, 2, 6), ratio, device="cuda")
    out = sparse_linear_attention(q, k, v, blocks, share, OPTIONS, kernel="hopper")
    assert rel(out.float(), exact(q, k, v, blocks, share)[0]) < (0.05 if ratio else 0.015)


@on_hopper
@pytest.mark.gpu
def test_rows_of_different_counts_and_nothing_left_for_the_linear_branch():
    q, k, v, picked, ratio = make(1, 600, 640, 2, 2)
    chosen = map_of(picked, 0.3)
    chosen[:, :, 1] = True  # a full row: its output is that of the softmax branch
    chosen[:, :, 2] = False
    chosen[:, :, 2, 7] = True
    blocks = blocks_from_map(chosen)
    out = sparse_linear_attention(q, k, v, blocks, ratio, OPTIONS, kernel="hopper").float()
    wanted = exact(q, k, v, blocks, ratio)[0]
    for rows in (slice(0, 128), slice(128, 256), slice(256, 384), slice(384, 600)):
        assert rel(out[:, rows], wanted[:, rows]) < 0.06


@on_hopper
@pytest.mark.gpu
def test_strides_are_honoured_and_heads_taken_in_turns_change_nothing():
    q, k, v, picked, ratio = make(2, 384, 512, 4, 4)
    blocks = blocks_from_map(map_of(picked, 0.3))
    found = block_statistics(q, k, v, True)
    args = (blocks.rows, blocks.count, ratio.mT.contiguous().mT, found.k_mean, found.v_max, 128**-0.5)
    at_once, _ = host.attend(q, k, v, *args, scratch_fraction=4.0)
    in_turns, _ = host.attend(q, k, v, *args, scratch_fraction=0.001)
    assert torch.equal(at_once, in_turns)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(sparse_linear_attention(*apart, blocks, ratio, OPTIONS, kernel="hopper"), at_once)


@on_hopper
@pytest.mark.gpu
def test_kernels_that_begin_early_change_nothing(monkeypatch):
    """Many turns over one scratch, again and again: a kernel that did not wait would read or write another turn's."""
    q, k, v, picked, ratio = make(1, 3000, 5000, 8, 8)
    blocks = blocks_from_map(map_of(picked, 0.1))
    found = block_statistics(q, k, v, True)
    args = (blocks.rows, blocks.count, ratio.contiguous(), found.k_mean, found.v_max, 128**-0.5)
    made = {}
    for early in (False, True):
        monkeypatch.setattr(host, "EARLY", early)
        monkeypatch.setattr(host, "_ATTENDING", Kept())
        made[early] = [host.attend(q, k, v, *args, scratch_fraction=0.001)[0] for _ in range(10)]
    assert all(torch.equal(x, made[False][0]) for x in made[True])


@on_hopper
@pytest.mark.gpu
def test_statistics_are_those_of_the_routers():
    q, k, v, *_ = make(2, 1000, 1300, 4, 2)
    found = block_statistics(q, k, v, True)
    torch.testing.assert_close(found.q_pool, pool_blocks(q.float().cpu(), 128).cuda(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.k_pool, pool_blocks(k.float().cpu(), 64).cuda(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.k_mean, key_mean(k.float().cpu()).cuda(), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.v_max, v.float().abs().amax(1))
    assert not block_statistics(q, k, v, False).k_mean.any()


@on_hopper
@pytest.mark.gpu
def test_the_module_runs_on_it_and_agrees_with_triton():
    q, k, v, *_ = make(1, 1000, 2000, 4, 2)
    core = SparseLinearAttention(4, 128, 0.2, OPTIONS, kv_heads=2).cuda()
    with torch.no_grad():
        out = core(q, k, v)
        core.kernel = "triton"
        assert rel(out.float(), core(q, k, v).float()) < 0.06
        core.kernel, core.options = "reference", replace(OPTIONS, precision="exact")
        assert rel(out.float(), core(q, k, v).float()) < 0.06


@on_hopper
@pytest.mark.gpu
def test_nan_stays_in_its_head_and_inputs_as_they_were():
    q, k, v, picked, ratio = make(1, 256, 512, 2, 2)
    k[0, 70, 1, 3] = float("nan")
    before = [x.clone() for x in (q, k, v)]
    blocks = blocks_from_map(map_of(picked, 0.3))
    out = sparse_linear_attention(q, k, v, blocks, ratio, OPTIONS, kernel="hopper")
    assert out[:, :, 0].isfinite().all() and out[:, :, 1].isnan().any()
    assert torch.equal(q, before[0]) and torch.equal(v, before[2])
    assert torch.equal(k.nan_to_num(), before[1].nan_to_num())


@on_hopper
@pytest.mark.gpu
def test_gradients_and_what_it_has_not_are_refused():
    q, k, v, picked, ratio = make(1, 256, 512, 2, 2)
    blocks = blocks_from_map(map_of(picked, 0.3))
    with pytest.raises(ValueError, match="no backward"):
        sparse_linear_attention(q.requires_grad_(), k, v, blocks, ratio, OPTIONS, kernel="hopper")
    with pytest.raises(ValueError, match="int8_fp8"):
        sparse_linear_attention(q.detach(), k, v, blocks, ratio, SparseLinear(), kernel="hopper")


@on_hopper
@pytest.mark.gpu
def test_it_compiles_whole_and_goes_into_a_graph():
    q, k, v, picked, ratio = make(1, 512, 1024, 2, 2)
    blocks = blocks_from_map(map_of(picked, 0.3))

    def call(q, k, v, ratio):
        return sparse_linear_attention(q, k, v, blocks, ratio, OPTIONS)

    wanted = call(q, k, v, ratio)
    assert torch.equal(torch.compile(call, fullgraph=True)(q, k, v, ratio), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v, ratio)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_scratch_lies_apart_and_its_size_is_what_it_holds():
    scratch = Scratch.of(key_heads=3, k_blocks=5, splits=2)
    places, size = scratch.places()
    shares = 2 * 3 * 128 * 128 * 4
    assert scratch == (3 * 5 * 3 * 64 * 128, 60, shares, 2 * 3 * 128 * 4, 3 * 128 * 128 * 4, 3 * 128 * 4, 4)
    ends = [*places[1:], size]
    assert all(x % 256 == 0 and end - x >= held for x, end, held in zip(places, ends, scratch, strict=True))
    assert size < sum(scratch) + 7 * 256


@pytest.mark.parametrize(
    ("tokens", "heads", "wanted", "splits"), [(75600, 40, [6] * 6 + [4], 22), (32760, 12, [2] * 6, 27)]
)
def test_heads_go_in_turns_that_fit(tokens, heads, wanted, splits, monkeypatch):
    """The two shapes of the targets on 132 multiprocessors: heads in each turn and shares of their keys; each kernel
    of a turn is launched once, may begin early, and is told which heads it has."""
    launched = []

    def launcher(file, function, device, shared_bytes, half):
        def prepare(threads, *params, early):
            def launch(x, y, z, stream):
                groups, splits = params[-1].groups, getattr(params[-1], "splits", None)
                launched.append((function, (x, y, z), groups, splits, early))

            return launch

        return SimpleNamespace(launcher=prepare)

    monkeypatch.setattr(host, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(host, "_kernel", launcher)
    monkeypatch.setattr(host, "current_stream", lambda: 0)
    q, blocks = torch.empty(1, tokens, heads, 128, device="meta", dtype=torch.bfloat16), -(-tokens // 128)
    rows = torch.empty(1, heads, blocks, 35, device="meta")
    ratio = torch.empty(heads, 1, device="meta").expand(1, heads, blocks)
    made = host._Attending(q, q, q, rows, ratio, q, 0.1, 0.097)
    assert [turn.heads for turn in made.turns] == wanted and made.splits == made.params.splits == splits
    assert [turn.first for turn in made.turns] == [sum(wanted[:i]) for i in range(len(wanted))]
    assert {turn.blocks for turn in made.turns} == {132}
    assert made.bytes < 0.0975 * 3 * q.numel() * 2
    assert made.params.share_row == 128
    assert (made.params.ratio_batch, made.params.ratio_head, made.params.ratio_block) == ratio.stride()
    made.run()
    assert launched == [
        launch
        for here in wanted
        for launch in (
            ("quantise", (blocks, here, 1), here, None, True),
            ("linear_totals", (splits, here, 1), here, splits, True),
            ("add_totals", (34, here, 1), here, splits, True),
            ("sparse_forward", (132, 1, 1), here, splits, True),
        )
    ]


def test_a_launch_that_may_begin_early_tells_the_driver_so(monkeypatch):
    """Grid, block, stream, arguments and the attribute, as a driver in C would read them."""
    seen = []

    def driver(config, function, arguments, extra):
        found = nvrtc_launch._LaunchConfig.from_address(config)
        attribute = nvrtc_launch._LaunchAttribute.from_address(found.attributes)
        first = ctypes.cast(arguments, ctypes.POINTER(ctypes.POINTER(ctypes.c_int)))[0][0]
        shape = [getattr(found, f"{what}_{axis}") for what in ("grid", "block") for axis in "xyz"]
        seen.append((shape, found.shared_bytes, found.stream, found.number, attribute.kind, attribute.value, first))
        return 0

    launch = ctypes.CFUNCTYPE(ctypes.c_int, *(ctypes.c_void_p,) * 4)(driver)
    monkeypatch.setattr(nvrtc_launch, "_launch_ex", lambda: launch)
    monkeypatch.setattr(nvrtc_launch, "_launch", lambda: None)
    monkeypatch.setattr(nvrtc_launch, "enter", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    kernel = object.__new__(nvrtc_launch.Kernel)
    kernel.shared_bytes, kernel._function = 1000, ctypes.c_void_p(5)
    argument = ctypes.c_int(41)
    run = kernel.bind(96, argument, early=True)
    gc.collect()
    run(2, 3, 4)
    argument.value = 42
    run(5, 1, 1)
    assert seen == [
        ([2, 3, 4, 96, 1, 1], 1000, 77, 1, 6, 1, 41),
        ([5, 1, 1, 96, 1, 1], 1000, 77, 1, 6, 1, 42),
    ]
    assert ctypes.sizeof(nvrtc_launch._LaunchAttribute) == 72 and nvrtc_launch._LaunchConfig.stream.offset == 32
