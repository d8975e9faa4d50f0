"""Sparse-linear attention (SLA2) on Hopper in 8 bits: compile at first use, allocate, launch. Inference only.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D = 128 head size, N_q blocks of 128 queries,
N_k blocks of 64 keys.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.hopper.host import kernel
from allears.ops.attention.sparse_linear.hopper.params import COLUMNS, HEAD_DIM, ForwardParams, PrepareParams, Scratch
from allears.ops.attention.sparse_linear.ops_hopper import BLOCK_K, BLOCK_Q
from allears.ops.launches import Kept
from allears.ops.nvrtc import Kernel, TensorMaps, current_stream, zero_words

_PART = 512  # tokens of a block of threads in statistics
_K_STAGES, _V_STAGES, _TOTALS_STAGES = 3, 4, 8
_V_STAGE = COLUMNS * BLOCK_K + HEAD_DIM * BLOCK_K
_SHARED = 4 * 128 * 128 + 2 * 128 * 128 + _K_STAGES * BLOCK_K * 128 + _V_STAGES * _V_STAGE + 2 * COLUMNS * 128 + 1024
_TOTALS_SHARED = _TOTALS_STAGES * _V_STAGE + 1024
EARLY = True
"""Whether a kernel of :func:`attend` begins while the one before it ends (``early.cuh``): measured 2 % faster at
(1, 32760, 12, 128) and 0.4 % at (1, 75600, 40, 128), 97 % sparsity, on an H100."""
_SHARES_FRACTION = 0.012  # of the bytes of q, k and v: for shares of sums
FOLDER = Path(__file__).parent


def _kernel(file: str, function: str, device: torch.device, shared_bytes: int, half: bool) -> Kernel:
    return kernel(file, function, device, shared_bytes, FOLDER, HEAD_DIM=HEAD_DIM, IN_FP16=int(half))


class _Measuring:
    """The one launch of :func:`statistics` for inputs of one kind."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, smooth: bool) -> None:
        self.params = _prepare_params(q, k, v, smooth)
        parts = self.params.q_parts, self.params.k_parts
        self.grid = max(parts), q.shape[2] + k.shape[2], q.shape[0]
        run = _kernel("prepare.cu", "statistics", q.device, 0, q.dtype == torch.float16)
        self.run = run.launcher(256, self.params)


_MEASURING: Kept[_Measuring] = Kept()


def statistics(q: Tensor, k: Tensor, v: Tensor, smooth: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q_pool, k_pool, k_mean, v_max as :class:`Statistics` of ``ops_hopper.py`` has them; q (B, L_q, H,
    D), k and v (B, L_k, G, D), 16 bit, aligned rows.
    """
    key = (*_kind(q, k, v), smooth)
    made = _MEASURING.take(key, lambda: _Measuring(q, k, v, smooth))
    params = made.params
    batch, _, heads, _ = q.shape
    groups, channels = k.shape[2], q.shape[0] * k.shape[2] * HEAD_DIM
    q_pool = q.new_empty((batch, heads, params.q_blocks, HEAD_DIM), dtype=torch.float32)
    k_pool = q.new_empty((batch, groups, params.k_blocks, HEAD_DIM), dtype=torch.float32)
    k_mean = q.new_empty((batch, groups, HEAD_DIM), dtype=torch.float32)
    zeros = q.new_empty(channels + batch * groups, dtype=torch.float32)
    partial = q.new_empty((batch, groups, params.k_parts, HEAD_DIM), dtype=torch.float32)
    stream, start = current_stream(), zeros.data_ptr()
    zero_words(start, channels + batch * groups, stream)
    params.q, params.k, params.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    params.q_pool, params.k_pool, params.k_mean = q_pool.data_ptr(), k_pool.data_ptr(), k_mean.data_ptr()
    params.v_max, params.done, params.partial = start, start + 4 * channels, partial.data_ptr()
    made.run(*made.grid, stream)
    _MEASURING.give(key, made)
    return q_pool, k_pool, k_mean, zeros[:channels].view(batch, groups, HEAD_DIM)


def _kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """All that prepared launches depend on of q, k and v but their addresses."""
    return q.shape, q.stride(), k.shape, k.stride(), v.stride(), q.dtype, q.device


def _prepare_params(q: Tensor, k: Tensor, v: Tensor, smooth: bool = False) -> PrepareParams:
    """Without addresses."""
    strides = [x.stride(axis) for x in (q, k, v) for axis in range(3)]
    queries, keys, groups = q.shape[1], k.shape[1], k.shape[2]
    return PrepareParams(
        *(None,) * 12, *strides, q.shape[2], groups, queries, keys,
        -(-queries // BLOCK_Q), -(-keys // BLOCK_K), -(-queries // _PART), -(-keys // _PART), int(smooth),
        0, groups,
    )  # fmt: skip


def _turns(q: Tensor, k: Tensor, v: Tensor, scratch_fraction: float, multiprocessors: int) -> tuple[int, int]:
    """Key heads to take at once, at least 1, and shares of their keys, so that scratch stays within the fraction of the
    bytes of q, k and v.
    """
    batch, keys, groups, _ = k.shape
    bytes_all = sum(x.numel() * x.element_size() for x in (q, k, v))
    shares = min(_SHARES_FRACTION, scratch_fraction / 4)
    fitting = max(1, int((scratch_fraction - shares) * bytes_all / (3 * batch * keys * HEAD_DIM)))
    at_once = -(-groups // -(-groups // min(groups, fitting)))
    heads = batch * at_once
    affordable = int(shares * bytes_all / (4 * heads * HEAD_DIM * (HEAD_DIM + 1)))
    wanted = min(-(-keys // (4 * BLOCK_K)), multiprocessors // heads)  # one wave
    return at_once, max(1, min(wanted, affordable))


class _Turn(NamedTuple):
    """``heads`` key heads from ``first`` on, and the blocks of threads of the main kernel."""

    first: int
    heads: int
    blocks: int


class _Attending:
    """The launches of :func:`attend` for calls of one kind."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, ratio: Tensor, out: Tensor, scale: float, fraction: float
    ) -> None:
        (batch, queries, heads, _), (keys, groups) = q.shape, k.shape[1:3]
        device, half = q.device, q.dtype == torch.float16
        q_blocks, width = rows.shape[2:]
        k_blocks, multiprocessors = -(-keys // BLOCK_K), _multiprocessors(device)
        at_once, self.splits = _turns(q, k, v, fraction, multiprocessors)
        self.places, self.bytes = Scratch.of(batch * at_once, k_blocks, self.splits).places()
        self.shared, self.key_tiles = heads // groups, -(-keys // 128)
        self.turns = []
        for first in range(0, groups, at_once):
            here = min(at_once, groups - first)
            blocks = min(batch * here * self.shared * q_blocks, multiprocessors)
            self.turns.append(_Turn(first, here, blocks))
        self.prepare = _prepare_params(q, k, v)
        self.params = ForwardParams(
            *(None,) * 13, batch, heads, groups, queries, keys, q_blocks, k_blocks, width, self.splits, 0, heads,
            *ratio.stride(), HEAD_DIM, scale * math.log2(math.e),
        )  # fmt: skip
        self.q_map, self.out_map = (TensorMaps(x, (1, 64, 1, 64), 128) for x in (q, out))
        quantise = _kernel("prepare.cu", "quantise", device, 0, half)
        self.quantise = quantise.launcher(512, self.prepare, early=EARLY)
        totals = _kernel("forward.cu", "linear_totals", device, _TOTALS_SHARED, half)
        self.totals = totals.launcher(384, self.params, early=EARLY)
        add = _kernel("forward.cu", "add_totals", device, 0, half)
        self.add = add.launcher(128, self.params, early=EARLY)
        forward = _kernel("forward.cu", "sparse_forward", device, _SHARED, half)
        self.forward = forward.launcher(384, self.q_map.map, self.out_map.map, self.params, early=EARLY)

    def point(
        self, q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, Tensor], ratio: Tensor, k_mean: Tensor,
        v_max: Tensor, scratch: Tensor, out: Tensor, lse: Tensor | None,
    ) -> None:  # fmt: skip
        """To these tensors."""
        prepare, params, start, of_q, of_mean, of_top = (
            self.prepare, self.params, scratch.data_ptr(), q.data_ptr(), k_mean.data_ptr(), v_max.data_ptr(),
        )  # fmt: skip
        records, k_scale, shares, ones, totals, total_ones, counter = (start + place for place in self.places)
        prepare.q, prepare.k, prepare.v = of_q, k.data_ptr(), v.data_ptr()
        prepare.k_mean, prepare.v_max = of_mean, of_top
        prepare.records, prepare.k_scale, prepare.counter = records, k_scale, counter
        params.share_ones = ones
        params.lse = None if lse is None else lse.data_ptr()
        params.rows, params.counts, params.ratio = lists[0].data_ptr(), lists[1].data_ptr(), ratio.data_ptr()
        params.k_mean, params.v_max = of_mean, of_top
        params.records, params.k_scale, params.partial, params.counter = records, k_scale, shares, counter
        params.totals, params.total_ones = totals, total_ones
        self.q_map.move(of_q)
        self.out_map.move(out.data_ptr())

    def run(self) -> None:
        """Launch all, on the current stream."""
        prepare, params, stream, batch = self.prepare, self.params, current_stream(), self.params.batches
        for first, here, blocks in self.turns:
            prepare.groups, prepare.first_group = here, first
            params.groups, params.heads, params.first_head = here, here * self.shared, first * self.shared
            self.quantise(self.key_tiles, here, batch, stream)
            self.totals(self.splits, batch * here, 1, stream)
            self.add(2 * 17, batch * here, 1, stream)
            self.forward(blocks, 1, 1, stream)


_ATTENDING: Kept[_Attending] = Kept()


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
        ratio: (B, H, N_q) float32, any strides.
        k_mean, v_max: of these k and v, see :func:`statistics`.
        scale: factor on the logits.
        need_lse: whether lse is wanted.
        scratch_fraction: heads are taken in turns so that 8-bit copies take this part of the bytes of q, k and v, if
            one key head fits.

    Returns:
        out (B, L_q, H, D), lse (B, H, L_q) or None.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32) if need_lse else None
    key = (*_kind(q, k, v), rows.shape[3], ratio.stride(), scale, scratch_fraction)
    made = _ATTENDING.take(key, lambda: _Attending(q, k, v, rows, ratio, out, scale, scratch_fraction))
    scratch = q.new_empty(made.bytes, dtype=torch.uint8)
    made.point(q, k, v, (rows, count), ratio, k_mean, v_max, scratch, out, lse)
    made.run()
    _ATTENDING.give(key, made)
    return out, lse


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
