"""Sparse-linear attention (SLA2) on Hopper in 8 bits: compile at first use, allocate, launch. Inference only.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D = 128 head size, N_q blocks of 128 queries,
N_k blocks of 64 keys.
"""

import ctypes
import math
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.hopper.host import kernel
from allears.ops.attention.sparse_linear.ops_hopper import BLOCK_K, BLOCK_Q
from allears.ops.nvrtc import Kernel, tensor_map

HEAD_DIM = 128
_PART = 512  # tokens of a block of threads in statistics
_COLUMNS = 136  # of h: the channels of V, one of ones, and what fills up to a multiple of 8
_K_STAGES, _V_STAGES, _TOTALS_STAGES = 3, 4, 8
_V_STAGE = _COLUMNS * BLOCK_K + HEAD_DIM * BLOCK_K
_SHARED = 4 * 128 * 128 + 2 * 128 * 128 + _K_STAGES * BLOCK_K * 128 + _V_STAGES * _V_STAGE + 2 * _COLUMNS * 128 + 1024
_TOTALS_SHARED = _TOTALS_STAGES * _V_STAGE + 1024
EARLY = True
"""Whether a kernel begins while the one before it ends; see ``hopper/early.cuh``."""
L2_HINTS = False
"""Whether the cache is asked to keep key blocks; see ``hopper/forward.cu``."""
_SHARES_FRACTION = 0.012  # of the bytes of q, k and v: for shares of sums
FOLDER = Path(__file__).parent


class _PrepareParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "q", "k", "v", "q_pool", "k_pool", "k_mean", "v_max", "partial", "done", "records", "k_scale", "counter",
        )
    ) + tuple(
        (f"{x}_{axis}", c_longlong) for x in ("q", "k", "v") for axis in ("batch", "row", "head")
    ) + tuple(
        (name, c_int)
        for name in (
            "heads", "groups", "queries", "keys", "q_blocks", "k_blocks", "q_parts", "k_parts", "smooth",
            "first_group", "all_groups",
        )
    )  # fmt: skip


class _ForwardParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            "lse", "rows", "counts", "ratio", "records", "k_scale", "k_mean", "v_max", "partial", "totals",
            "total_ones", "counter",
        )
    ) + tuple(
        (name, c_int)
        for name in (
            "batches", "heads", "groups", "queries", "keys", "q_blocks", "k_blocks", "width", "splits",
            "first_head", "all_heads",
        )
    ) + (("scale", c_float),)  # fmt: skip


def _kernel(file: str, function: str, device: torch.device, shared_bytes: int, half: bool) -> Kernel:
    return kernel(
        file, function, device, shared_bytes, FOLDER, HEAD_DIM=HEAD_DIM, IN_FP16=int(half), L2_HINTS=int(L2_HINTS)
    )


def statistics(q: Tensor, k: Tensor, v: Tensor, smooth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q_pool, k_pool, k_mean, v_max as :class:`Statistics` of ``ops_hopper.py`` has them; q (B, L_q, H,
    D), k and v (B, L_k, G, D), 16 bit, aligned rows.
    """
    batch, queries, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    q_pool = q.new_empty(batch, heads, -(-queries // BLOCK_Q), HEAD_DIM, dtype=torch.float32)
    k_pool = q.new_empty(batch, groups, -(-keys // BLOCK_K), HEAD_DIM, dtype=torch.float32)
    k_mean = q.new_empty(batch, groups, HEAD_DIM, dtype=torch.float32)
    zeros = q.new_zeros(batch * groups, HEAD_DIM + 1, dtype=torch.float32).flatten()
    v_max = zeros[: batch * groups * HEAD_DIM].view(batch, groups, HEAD_DIM)
    q_parts, k_parts = -(-queries // _PART), -(-keys // _PART)
    partial = q.new_empty(batch, groups, k_parts, HEAD_DIM, dtype=torch.float32)
    done = zeros[batch * groups * HEAD_DIM :]
    params = _prepare_params(
        q, k, v, k_mean, v_max, q_pool=q_pool, k_pool=k_pool, partial=partial, done=done, smooth=smooth
    )
    run = _kernel("prepare.cu", "statistics", q.device, 0, q.dtype == torch.float16)
    run((max(q_parts, k_parts), heads + groups, batch), 256, params)
    return q_pool, k_pool, k_mean, v_max


class _Scratch(NamedTuple):
    """Of C key heads.

    Args:
        records: (B * C, N_k, 3, 64 * D) bytes: K, phi(K) and V of each block, as the products read them.
        k_scale: (B * C, N_k) float32.
        partial: (splits, B * C, D, 136) float32, shares of the sum of h over all blocks.
        totals: (B * C, D, D) float32, their sum in the order of the kernel's registers.
        total_ones: (B * C, D) float32, the same of a column of ones.
    """

    records: Tensor
    k_scale: Tensor
    partial: Tensor
    totals: Tensor
    total_ones: Tensor


def _scratch(like: Tensor, key_heads: int, k_blocks: int, splits: int) -> _Scratch:
    return _Scratch(
        like.new_empty(key_heads, k_blocks, 3, BLOCK_K * HEAD_DIM, dtype=torch.uint8),
        like.new_empty(key_heads, k_blocks, dtype=torch.float32),
        like.new_empty(splits, key_heads, HEAD_DIM, _COLUMNS, dtype=torch.float32),
        like.new_empty(key_heads, HEAD_DIM, HEAD_DIM, dtype=torch.float32),
        like.new_empty(key_heads, HEAD_DIM, dtype=torch.float32),
    )


def _prepare_params(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_mean: Tensor,
    v_max: Tensor,
    *,
    q_pool: Tensor | None = None,
    k_pool: Tensor | None = None,
    partial: Tensor | None = None,
    done: Tensor | None = None,
    scratch: _Scratch | None = None,
    counter: Tensor | None = None,
    smooth: bool = False,
) -> _PrepareParams:
    records, k_scale = scratch[:2] if scratch else (None, None)
    tensors = (q, k, v, q_pool, k_pool, k_mean, v_max, partial, done, records, k_scale, counter)
    strides = [x.stride(axis) for x in (q, k, v) for axis in range(3)]
    queries, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    return _PrepareParams(
        *(None if x is None else x.data_ptr() for x in tensors), *strides, q.shape[2], groups, queries, keys,
        -(-queries // BLOCK_Q), -(-keys // BLOCK_K), -(-queries // _PART), -(-keys // _PART), int(smooth), 0, groups,
    )  # fmt: skip


def _turns(q: Tensor, k: Tensor, v: Tensor, scratch_fraction: float, multiprocessors: int) -> tuple[int, int]:
    """Key heads to take at once, at least 1, and shares of their keys in linear_totals, so that scratch stays within
    the fraction of the bytes of q, k and v.
    """
    batch, keys, groups, _ = k.shape
    bytes_all = sum(x.numel() * x.element_size() for x in (q, k, v))
    shares = min(_SHARES_FRACTION, scratch_fraction / 4)
    fitting = max(1, int((scratch_fraction - shares) * bytes_all / (3 * batch * keys * HEAD_DIM)))
    at_once = -(-groups // -(-groups // min(groups, fitting)))
    heads = batch * at_once
    affordable = int(shares * bytes_all / (4 * heads * HEAD_DIM * _COLUMNS))
    wanted = min(-(-keys // (4 * BLOCK_K)), -(-multiprocessors // heads))
    return at_once, max(1, min(wanted, affordable))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    count: Tensor,
    ratio: Tensor,
    k_mean: Tensor,
    v_max: Tensor,
    scale: float,
    need_lse: bool = False,
    scratch_fraction: float = 0.097,
) -> tuple[Tensor, Tensor | None]:
    """ratio O_s + (1 - ratio) O_l.

    Args:
        q, k, v: (B, L_q, H, D), (B, L_k, G, D), 16 bit, aligned rows.
        rows, count: as in :class:`Blocks`, of 128 queries and 64 keys, contiguous; at least one block of each row.
        ratio: (B, H, N_q) float32, contiguous.
        k_mean, v_max: of these k and v, see :func:`statistics`.
        scale: factor on the logits.
        need_lse: whether lse is wanted.
        scratch_fraction: heads are taken in turns so that 8-bit copies take this part of the bytes of q, k and v, if
            one key head fits.

    Returns:
        out (B, L_q, H, D), lse (B, H, L_q) or None.
    """
    batch, queries, heads, _ = q.shape
    keys, groups = k.shape[1:3]
    device, half = q.device, q.dtype == torch.float16
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32) if need_lse else None
    q_blocks, width = rows.shape[2:]
    k_blocks = -(-keys // BLOCK_K)
    multiprocessors = _multiprocessors(device)
    at_once, splits = _turns(q, k, v, scratch_fraction, multiprocessors)
    scratch = _scratch(q, batch * at_once, k_blocks, splits)
    counter = q.new_empty(1, dtype=torch.int32)
    shared = heads // groups
    prepare = _prepare_params(q, k, v, k_mean, v_max, scratch=scratch, counter=counter)
    params = _ForwardParams(
        None if lse is None else lse.data_ptr(), rows.data_ptr(), count.data_ptr(),
        ratio.data_ptr(), scratch.records.data_ptr(), scratch.k_scale.data_ptr(), k_mean.data_ptr(),
        v_max.data_ptr(),
        scratch.partial.data_ptr(), scratch.totals.data_ptr(), scratch.total_ones.data_ptr(), counter.data_ptr(),
        batch, heads, groups, queries, keys, q_blocks, k_blocks, width, splits, 0, heads, scale * math.log2(math.e),
    )  # fmt: skip
    q_map, out_map = (tensor_map(x, (1, 64, 1, 64), 128) for x in (q, out))
    early = EARLY
    quantise = _kernel("prepare.cu", "quantise", device, 0, half).bind(512, prepare, early=early)
    totals = _kernel("forward.cu", "linear_totals", device, _TOTALS_SHARED, half).bind(384, params, early=early)
    add = _kernel("forward.cu", "add_totals", device, 0, half).bind(128, params, early=early)
    forward = _kernel("forward.cu", "sparse_forward", device, _SHARED, half)
    forward = forward.bind(384, q_map, out_map, params, early=early)
    for first in range(0, groups, at_once):
        here = min(at_once, groups - first)
        prepare.groups, prepare.first_group = here, first
        params.groups, params.heads, params.first_head = here, here * shared, first * shared
        quantise(-(-keys // 128), here, batch)
        totals(splits, batch * here, 1)
        add(2 * 17, batch * here, 1)
        forward(min(batch * here * shared * q_blocks, multiprocessors), 1, 1)
    return out, lse


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
