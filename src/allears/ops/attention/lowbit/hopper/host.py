"""Hopper kernels of the 8-bit family: compile at first use, allocate, launch.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size (64 or 128), N blocks of 128 keys.
"""

import ctypes
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.hopper import launches
from allears.ops.nvrtc import Kernel, TensorMap, compile_cubin, tensor_map

KEYS = 128
_FOLDER = Path(__file__).parent
_STAGES = 4
_GROUPS = 3  # warpgroups that compute in the forward
EARLY = True
"""Whether a kernel begins while the one before it ends; see ``early.cuh``."""


class _QuantiseParams(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("k", "v", "k8", "v8", "scales", "partial", "mean", "done")) + tuple(
        (name, c_longlong) for name in ("k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")
    ) + tuple((name, c_int) for name in ("groups", "rows", "blocks", "parts"))  # fmt: skip


class _ForwardParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in ("q", "out", "lse", "scales", "k_mean", "q8", "q_scale", "lse2", "counter")
    ) + tuple((name, c_longlong) for name in ("q_batch", "q_row", "q_head")) + tuple(
        (name, c_int) for name in ("batches", "heads", "groups", "rows", "keys", "blocks", "row_tiles", "head_chunk")
    ) + (("scale", c_float),)  # fmt: skip


@cache
def sources(folder: Path = _FOLDER) -> dict[str, str]:
    """The kernel files of a folder and all headers that they may include: those of this folder, and its own."""
    paths = [*_FOLDER.glob("*.cuh"), *folder.glob("*.cu*")]
    return {path.name: path.read_text() for path in sorted(paths)}


def headers(folder: Path = _FOLDER) -> dict[str, str]:
    """Those of :func:`sources` that are no kernel files."""
    return {name: text for name, text in sources(folder).items() if name.endswith(".cuh")}


@cache
def kernel(
    file: str, function: str, device: torch.device, shared_bytes: int, folder: Path = _FOLDER, **defines: int
) -> Kernel:
    """The compiled kernel ``function`` of ``file`` in ``folder``."""
    code = compile_cubin(sources(folder)[file], file, headers(folder), defines)
    return Kernel(code, function, device, shared_bytes)


class QuantisedKV(NamedTuple):
    """K and V in 8 bits.

    Args:
        k: (B, G, N * 128, D) int8, rows past the end zero.
        v: (B, G, D, N * 128) uint8 (E4M3) or int8, tokens of each 16 in operand order.
        scales: (B, G, N, 2), of K and of V.
        mean: (B, G, D) float32, what was taken off K, or ``None``.
        counter: (2,) int32 zeros, which a forward counts in and leaves as zeros; ``None`` for a backward alone.
    """

    k: Tensor
    v: Tensor
    scales: Tensor
    mean: Tensor | None
    counter: Tensor | None = None


def quantise_kv(k: Tensor, v: Tensor, pv: Literal["fp8", "int8"], smooth: bool) -> QuantisedKV:
    """k, v (B, L, G, D) bfloat16 or float16 with last stride 1."""
    batch, rows, groups, size = k.shape
    blocks = -(-rows // KEYS)
    device = k.device
    parts = max(1, min(64, -(-rows // 512)))
    scales = torch.empty(batch, groups, blocks, 2, device=device, dtype=torch.float32)
    k8 = torch.empty(batch, groups, blocks * KEYS, size, device=device, dtype=torch.int8)
    v8 = torch.empty(batch, groups, size, blocks * KEYS, device=device, dtype=torch.int8)
    mean = partial = done = None
    counters = torch.zeros(2 + (batch * groups if smooth else 0), device=device, dtype=torch.int32)
    if smooth:
        mean = torch.empty(batch, groups, size, device=device, dtype=torch.float32)
        partial = torch.empty(batch, groups, parts, size, device=device, dtype=torch.float32)
        done = counters[2:]
    params = _QuantiseParams(
        k.data_ptr(), v.data_ptr(), k8.data_ptr(), v8.data_ptr(), scales.data_ptr(),
        _pointer(partial), _pointer(mean), _pointer(done),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), groups, rows, blocks, parts,
    )  # fmt: skip
    defines = {"HEAD_DIM": size, "V_INT8": int(pv == "int8"), "IN_FP16": int(k.dtype == torch.float16)}
    if smooth:
        kernel("quantise.cu", "key_mean", device, 0, **defines)((parts, groups, batch), 256, params)
    quantise = kernel("quantise.cu", "quantise_kv", device, 0, **defines)
    quantise.bind(4 * size, params, early=EARLY and smooth)(blocks, groups, batch)
    return QuantisedKV(k8, v8, scales, mean, counters[:2])


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Forward(NamedTuple):
    """out (B, L_q, H, D); lse (B, H, L_q) or None; q8 (B, H, L_q, D) and q_scale (B, H, L_q) where saved."""

    out: Tensor
    lse: Tensor | None
    q8: Tensor | None
    q_scale: Tensor | None
    lse2: Tensor | None


def attend(
    q: Tensor,
    kv: QuantisedKV,
    keys: int,
    pv: Literal["fp8", "int8"],
    causal: bool,
    scale: float,
    need_lse: bool,
    save_q: bool,
) -> Forward:
    """q (B, L_q, H, D) 16 bit with last stride 1, against quantised keys and values.

    Args:
        keys: L_k, of which the last block of ``kv`` may hold fewer than 128.
    """
    batch, rows, heads, size = q.shape
    groups, blocks = kv.scales.shape[1:3]
    device = q.device
    counter = torch.zeros(2, device=device, dtype=torch.int32) if kv.counter is None else kv.counter
    out = torch.empty(batch, rows, heads, size, device=device, dtype=q.dtype)
    lse = torch.empty(batch, heads, rows, device=device, dtype=torch.float32) if need_lse else None
    q8 = torch.empty(batch, heads, rows, size, device=device, dtype=torch.int8) if save_q else None
    q_scale = torch.empty(batch, heads, rows, device=device, dtype=torch.float32) if save_q else None
    lse2 = torch.empty(batch, heads, rows, device=device, dtype=torch.float32) if save_q else None
    k_map = tensor_map(kv.k.view(batch * groups, blocks * KEYS, size), (1, KEYS, size), size)
    v_map = tensor_map(kv.v.view(batch * groups, size, blocks * KEYS), (1, size, KEYS), 128)
    row_tiles = -(-rows // (64 * _GROUPS))
    per_head_bytes = 2 * blocks * KEYS * size * groups // heads
    chunk = max(1, min(heads * batch, (24 << 20) // max(1, per_head_bytes)))
    params = _ForwardParams(
        q.data_ptr(), out.data_ptr(), _pointer(lse), kv.scales.data_ptr(), _pointer(kv.mean),
        _pointer(q8), _pointer(q_scale), _pointer(lse2), counter.data_ptr(), q.stride(0), q.stride(1), q.stride(2),
        batch, heads, groups, rows, keys, blocks, row_tiles, chunk, scale * math.log2(math.e),
    )  # fmt: skip
    defines = {
        "HEAD_DIM": size, "CAUSAL": int(causal), "PV_INT8": int(pv == "int8"), "IN_FP16": int(q.dtype == torch.float16),
        "SAVE_Q": int(save_q),
    }  # fmt: skip
    launch = launches.FORWARD[pv, size]
    shared = _GROUPS * 64 * size + 2 * _STAGES * KEYS * size + 1024 + _STAGES * 1024
    run = kernel("forward.cu", "attention_forward", device, shared, **defines, **launch.defines)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    launch_forward = run.bind(128 * (_GROUPS + 1), k_map, v_map, params, early=EARLY)
    launch_forward(min(multiprocessors, row_tiles * heads * batch), 1, 1)
    return Forward(out, lse, q8, q_scale, lse2)


class _PrepareParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in ("d_out", "out", "q8", "q_scale", "lse2", "q8_across", "do8_across", "columns")
    ) + tuple((name, c_longlong) for name in ("do_batch", "do_row", "do_head")) + tuple(
        (name, c_int) for name in ("heads", "rows", "padded")
    ) + (("scale", c_float),)  # fmt: skip


class _FinishParams(ctypes.Structure):
    _fields_ = (("dq", c_void_p), ("out", c_void_p), ("heads", c_int), ("rows", c_int))


class _BackwardParams(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("columns", "scales", "dq", "dk", "dv")) + tuple(
        (name, c_int) for name in ("heads", "groups", "rows", "keys", "blocks", "padded")
    ) + (("scale", c_float),)  # fmt: skip


def attend_backward(
    d_out: Tensor, v: Tensor, kv: QuantisedKV, forward: Forward, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d_out (B, L_q, H, D) and v (B, L_k, G, D), 16 bit with last stride 1; returns dq, dk, dv in their dtype."""
    assert forward.q8 is not None and forward.q_scale is not None and forward.lse2 is not None
    batch, rows, heads, size = d_out.shape
    keys, groups = v.shape[1:3]
    blocks = kv.scales.shape[2]
    device = d_out.device
    padded = -(-rows // 64) * 64
    across = torch.empty(2, batch * heads, size, padded, device=device, dtype=torch.int8)
    columns = torch.empty(batch, heads, padded, 4, device=device, dtype=torch.float32)
    factor = scale * math.log2(math.e)
    prepare = _PrepareParams(
        d_out.data_ptr(), forward.out.data_ptr(), forward.q8.data_ptr(), forward.q_scale.data_ptr(),
        forward.lse2.data_ptr(), across[0].data_ptr(), across[1].data_ptr(), columns.data_ptr(),
        d_out.stride(0), d_out.stride(1), d_out.stride(2), heads, rows, padded, factor,
    )  # fmt: skip
    half = int(d_out.dtype == torch.float16)
    kernel("backward_prepare.cu", "backward_prepare", device, 0, HEAD_DIM=size, IN_FP16=half)(
        (padded // 64, heads, batch), 256, prepare
    )
    sums = torch.zeros(batch, heads, padded * size, device=device, dtype=torch.float32)
    dq = torch.empty(batch, rows, heads, size, device=device, dtype=d_out.dtype)
    dk = torch.empty(batch, keys, groups, size, device=device, dtype=d_out.dtype)
    dv = torch.empty_like(dk)
    params = _BackwardParams(
        columns.data_ptr(), kv.scales.data_ptr(), sums.data_ptr(), dk.data_ptr(), dv.data_ptr(),
        heads, groups, rows, keys, blocks, padded, factor,
    )  # fmt: skip
    launch = launches.BACKWARD[size]
    maps = (
        tensor_map(kv.k.view(batch * groups, blocks * KEYS, size), (1, launch.keys, size), size),
        tensor_map(v, (1, launch.keys, 1, 64), 128),
        tensor_map(d_out, (1, 64, 1, 64), 128),
        tensor_map(forward.q8.view(batch * heads, rows, size), (1, 64, size), size),
        tensor_map(across[0], (1, size, 64), 64),
        tensor_map(across[1], (1, size, 64), 64),
    )
    shared = launch.shared_bytes(size)
    defines = {"HEAD_DIM": size, "CAUSAL": int(causal), "IN_FP16": half, **launch.defines}
    run = kernel("backward.cu", "attention_backward", device, shared, **defines)
    run((-(-keys // launch.keys), groups, batch), 128 * (launch.groups + 1), *maps, params)
    finish = _FinishParams(sums.data_ptr(), dq.data_ptr(), heads, rows)
    kernel("backward_prepare.cu", "backward_finish", device, 0, HEAD_DIM=size, IN_FP16=half)(
        (padded // 64, heads, batch), 256, finish
    )
    return dq, dk, dv


__all__ = ["Forward", "QuantisedKV", "TensorMap", "attend", "kernel", "quantise_kv"]
