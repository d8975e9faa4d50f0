"""Backward of sparse-linear attention by the Triton kernels.

Saved are q, k, v, the results, the log-sum-exp, the mean of K and the block lists; the states of the linear branch are
made again, for a group of units (key heads of entries) at a time as in the forward. Nothing waits for the GPU.

Shapes: B batch, E entries (B, or S packed sequences), L_q, L_k rows (packed: T_q, T_k), H query heads, G key heads, D
head size, DP = D padded, N_q, N_k blocks of the longest sequence, N_P = N_k padded, U units of a group.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.triton_host import HOPPER_SHARED_BYTES, chip_of
from allears.ops.attention.lowbit.triton_quant import on_hardware
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.triton_bwd_keys import columns_kernel, linear_keys_kernel, sparse_keys_kernel
from allears.ops.attention.sparse_linear.triton_bwd_queries import linear_queries_kernel, sparse_queries_kernel
from allears.ops.attention.sparse_linear.triton_host import LOG2_E, Call, Repeated, gather_call, prepared, unit_bytes

_COLUMNS = 32  # key blocks, and
_STEP = 128  # query blocks, that a program of the lists by column takes at once
_MOST_BLOCKS = 2**15 - 1  # what an int16 counts


@dataclass(frozen=True)
class BackwardLaunch:
    """How the kernels of the softmax branch and of the linear branch are launched.

    Args:
        rows: queries of a program of the kernel that keeps queries; the block of queries is a multiple.
        query_warps, query_stages: of that kernel.
        tile: queries that the kernel that keeps a block of keys takes at once; the block of queries is a multiple.
        key_warps, key_stages: of that kernel.
        features: channels of a state that the kernels of the linear branch take at once.
        linear_warps: of these.
    """

    rows: int
    query_warps: int
    query_stages: int
    tile: int
    key_warps: int
    key_stages: int
    features: int
    linear_warps: int


class Gradients(NamedTuple):
    """d_q like q, d_k and d_v like k, contiguous; d_ratio (E, H, N_q) float32, or None."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    d_ratio: Tensor | None


def backward_launch(
    padded: int,
    block_q: int,
    wide: bool = False,
    matched: bool = False,
    major: int = 9,
    shared_bytes: int = HOPPER_SHARED_BYTES,
) -> BackwardLaunch:
    """The launch by DP, queries of a block, whether q is float32 (``wide``), whether the operands are those of an 8-bit
    forward (``matched``), the major compute capability, and the shared memory of a block.

    At DP 128 and 16 bits, two programs of the kernel of keys fit into a multiprocessor of Hopper.
    """
    if wide:
        rows = 64 if shared_bytes >= 200 * 1024 else 32
        return BackwardLaunch(rows, rows // 8, 1, 32, 8, 1, 32, 8)
    if padded == 256:
        return BackwardLaunch(64, 8, 1, 64, 8, 1, 64, 8)
    row = 4 * padded  # bytes of a row of both operands
    ways = ((block_q, 1), (64, 1)) if matched else ((block_q, 3), (block_q, 2), (64, 2))
    rows, stages = next((way for way in ways if (way[0] + way[1] * 64) * row <= shared_bytes), (64, 1))
    key_stages = 2 if not matched and 3 * 64 * row <= shared_bytes else 1
    key_warps = 4 if major == 9 and not matched else 8
    return BackwardLaunch(rows, rows // 16, stages, 64, key_warps, key_stages, padded, 8)


def sparse_linear_backward_triton(
    d_out: Tensor,
    d_linear: Tensor | None,
    call: Call,
    out: Tensor,
    lse: Tensor,
    ratio: Tensor | None,
    factor: float,
    *,
    scratch_fraction: float = 0.1,
    launch: BackwardLaunch | None = None,
) -> Gradients:
    """The gradients of q, k, v and ratio; they repeat bit for bit.

    Args:
        d_out: gradient of ``out``, like it, any strides.
        d_linear: that of ``o_linear`` of the form "sla", like it; None for other forms.
        call: what the forward was called with, with its k_mean.
        out, lse: what the forward made, with B = 1 in front if packed; out contiguous.
        ratio: (E, H, N_q) float32, contiguous, of the form "sla2"; else None.
        factor: on the logits.
        scratch_fraction: as of the forward; also the memory is that of the forward.
        launch: how the kernels are launched; None takes :func:`backward_launch`.

    Raises:
        ValueError: the launch does not fit the blocks.
    """
    if launch is None:
        matched = call.options.precision == "int8_fp8" and call.options.backward == "matched"
        launch = backward_launch(call.padded, call.options.block_q, call.wide, matched, *chip_of(call.q.device))
    if call.options.block_q % launch.rows or call.options.block_q % launch.tile or call.padded % launch.features:
        raise ValueError(
            f"launch: {launch} given; rows and tile must divide block_q, {call.options.block_q}, and features the "
            f"padded head size, {call.padded}"
        )
    q, k = call.q, call.k
    work = _Work(
        call,
        out,
        lse,
        ratio,
        factor,
        launch,
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        torch.empty(lse.shape, device=q.device),
        torch.empty(lse.shape, device=q.device),
    )
    of_linear = d_out if call.options.form == "sla2" else d_linear
    d_ratio, d_mean = None, None
    if of_linear is not None:
        d_ratio, d_mean = _linear_branch(of_linear, work, scratch_fraction)
    leaks = _sparse_queries(d_out, work)
    if leaks is not None:
        d_mean = leaks if d_mean is None else d_mean + leaks
    _sparse_keys(d_out, work, d_mean)
    return Gradients(work.d_q, work.d_k, work.d_v, d_ratio)


def packed_backward(
    d_out: Tensor,
    d_linear: Tensor | None,
    out: Tensor,
    lse: Tensor,
    operands: tuple[Tensor, Tensor, Tensor],
    ratio: Tensor | None,
    k_mean: Tensor | None,
    blocks: Blocks,
    options: SparseLinear,
    causal: bool,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int | None,
    longest_k: int | None,
    factor: float,
) -> Gradients:
    """:func:`sparse_linear_backward_triton` of ``operands`` q, k, v as the caller of the forward has them: (B, L,
    heads, D), or packed (T, heads, D), with d_out, d_linear and out like q, and lse (B, H, L_q) or (H, T_q).
    """
    call = gather_call(*operands, blocks, options, causal, cu_q, cu_k, longest_q, longest_k, k_mean)
    if cu_q is not None:
        d_out, out, lse = d_out.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
        d_linear = d_linear.unsqueeze(0) if d_linear is not None else None
    ratio = ratio.contiguous() if ratio is not None else None
    d_q, d_k, d_v, d_ratio = sparse_linear_backward_triton(
        d_out, d_linear, call, out.contiguous(), lse.contiguous(), ratio, factor
    )
    return Gradients(d_q[0], d_k[0], d_v[0], d_ratio) if cu_q is not None else Gradients(d_q, d_k, d_v, d_ratio)


class _Work(NamedTuple):
    """What the launches share; row_shift and row_lse (B, H, L_q) are for the kernels of the softmax branch."""

    call: Call
    out: Tensor
    lse: Tensor
    ratio: Tensor | None
    factor: float
    launch: BackwardLaunch
    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    row_shift: Tensor
    row_lse: Tensor

    @property
    def matched(self) -> bool:
        options = self.call.options
        return options.precision == "int8_fp8" and options.backward == "matched"

    @property
    def leaky(self) -> bool:
        """P of a 16-bit backward is not that of an 8-bit forward, and its rows do not sum to 1."""
        return self.call.options.precision == "int8_fp8" and not self.matched and self.call.k_mean is not None

    def constants(self) -> dict[str, object]:
        """Of both kernels of the softmax branch."""
        options = self.call.options
        return {
            "BLOCK_Q": options.block_q,
            "BLOCK_K": options.block_k,
            "DP": self.call.padded,
            "CAUSAL": self.call.geometry.causal,
            "ADDED": options.form != "sparse",
            "MATCHED": self.matched,
            "SMOOTH": self.call.k_mean is not None,
            "PACKED": self.call.cu_q is not None,
            "PADDED": self.call.padded != self.call.q.shape[3],
            "HARDWARE": on_hardware(),
        }


def _linear_branch(d_out: Tensor, work: _Work, fraction: float) -> tuple[Tensor | None, Tensor | None]:
    """Writes the linear branch's part of the gradients, and for "sla2" the rows' numbers. d_ratio, and (E, G, D) the
    sum of d_k over the keys if K was smoothed."""
    call, ratio = work.call, work.ratio
    q, k, repeats = call.q, call.k, call.heads_a_unit
    n_q, n_k, n_p, size = call.geometry.n_q, call.geometry.n_k, call.key_blocks, q.shape[3]
    d_ratio = torch.empty(ratio.shape, device=q.device) if ratio is not None else None
    d_means = torch.empty(call.entries, call.k.shape[2], n_k, size, device=q.device)
    budget = fraction * q.element_size() * (q.numel() + 2 * k.numel())
    at_once = replace(unit_bytes(call), copies=0).groups(call.units, budget).units
    columns = (call.padded + 1) * call.padded
    states, sums, weights = (
        torch.empty(at_once, *shape, dtype=q.dtype, device=q.device)
        for shape in ((n_p, columns), (repeats * n_q, columns), (repeats * n_q, n_p))
    )
    prepare = prepared(call, states, weights, (None,) * 4)
    of_queries, of_keys = _linear_kernels(d_out, work, sums, states, d_ratio, d_means)
    for first in range(0, call.units, at_once):
        made = min(at_once, call.units - first)
        prepare(made, first)
        torch.bmm(weights[:made], states[:made], out=sums[:made])
        if n_q:
            of_queries((made * repeats * n_q, 1), first=first * repeats)
        torch.bmm(weights[:made].transpose(1, 2), sums[:made], out=states[:made])
        if n_k:
            of_keys((made * n_k, 1), first=first)
    return d_ratio, d_means.sum(2) if call.k_mean is not None else None


def _linear_kernels(
    d_out: Tensor, work: _Work, sums: Tensor, states: Tensor, d_ratio: Tensor | None, d_means: Tensor
) -> tuple[Repeated, Repeated]:
    call, launch = work.call, work.launch
    q, k, v, options = call.q, call.k, call.v, call.options
    size, mixes = q.shape[3], options.form == "sla2"
    shape = {"FEATURES": launch.features, "DP": call.padded, "MAP": options.feature_map}
    packed = {"PACKED": call.cu_q is not None, "PADDED": call.padded != size}
    of_queries = (
        q,
        d_out,
        work.out if mixes else None,
        work.lse if mixes else None,
        work.ratio,
        sums,
        work.d_q,
        d_ratio,
        work.row_shift,
        work.row_lse,
        call.cu_q,
        *q.stride(),
        *d_out.stride(),
        q.shape[1],
        q.shape[2],
        size,
        call.geometry.n_q,
        q.shape[1],
        0,
    )
    of_keys = (
        k,
        v,
        call.k_mean,
        states,
        work.d_k,
        work.d_v,
        d_means,
        call.cu_k,
        *k.stride(),
        *v.stride(),
        k.shape[1],
        k.shape[2],
        size,
        call.geometry.n_k,
        call.key_blocks,
        k.shape[1],
        0,
    )
    queries = {"ROWS": options.block_q, **shape, "MIX": mixes, **packed}
    keys = {"ROWS": options.block_k, **shape, "CENTRED": call.k_mean is not None, **packed}
    return (
        Repeated(linear_queries_kernel, of_queries, queries, launch.linear_warps, 1),
        Repeated(linear_keys_kernel, of_keys, keys, launch.linear_warps, 1),
    )


def _sparse_queries(d_out: Tensor, work: _Work) -> Tensor | None:
    """Adds the softmax branch's part to d_q and completes the rows' numbers. Where rows of dS do not sum to 0, the sum
    (E, G, D) over the keys of their part of d_k."""
    call, launch = work.call, work.launch
    q, k, options, geometry = call.q, call.k, call.options, call.geometry
    tiles = geometry.n_q * (options.block_q // launch.rows)
    leaks = None
    if work.leaky:
        leaks = torch.empty(call.entries, k.shape[2], call.heads_a_unit * tiles, q.shape[3], device=q.device)
    if work.d_q.numel():
        sparse_queries_kernel[(tiles * call.entries * q.shape[2],)](
            q,
            k,
            call.v,
            d_out,
            work.out,
            work.lse,
            call.k_mean,
            call.blocks.rows,
            call.blocks.count,
            work.d_q,
            work.row_shift,
            work.row_lse,
            leaks,
            call.cu_q,
            call.cu_k,
            *q.stride(),
            *k.stride(),
            *call.v.stride(),
            *d_out.stride(),
            q.shape[1],
            k.shape[1],
            q.shape[2],
            k.shape[2],
            q.shape[3],
            geometry.n_q,
            call.blocks.rows.shape[3],
            q.shape[1],
            work.factor,
            work.factor * LOG2_E,
            ROWS=launch.rows,
            OWN=options.form != "sla2",
            LEAKY=work.leaky,
            **work.constants(),
            num_warps=launch.query_warps,
            num_stages=launch.query_stages,
        )
    return leaks.sum(2) if leaks is not None else None


def column_lists(blocks: Blocks, n_k: int) -> tuple[Tensor, Tensor]:
    """The query blocks that list each key block, rising, (E, H, N_k, N_q) int16, and how many of these are valid, (E,
    H, N_k) int32: ``blocks.columns_of`` in one launch."""
    entries, heads, n_q, width = blocks.rows.shape
    if n_q > _MOST_BLOCKS:
        raise ValueError(f"q: {n_q} blocks of queries given; the backward's lists hold {_MOST_BLOCKS}: use block_q=128")
    device = blocks.rows.device
    index = torch.empty(entries, heads, n_k, n_q, dtype=torch.int16, device=device)
    lengths = torch.empty(entries, heads, n_k, dtype=torch.int32, device=device)
    if lengths.numel():
        grid = (entries * heads * -(-n_k // _COLUMNS),)
        columns_kernel[grid](
            blocks.rows, blocks.count, index, lengths, n_q, n_k, width, COLUMNS=_COLUMNS, STEP=_STEP, num_warps=4
        )
    return index, lengths


def _sparse_keys(d_out: Tensor, work: _Work, d_mean: Tensor | None) -> None:
    """Adds the softmax branch's part to d_k and d_v, and spreads ``d_mean`` (E, G, D), what d_k sums to over the keys
    without the gradient of the keys' mean."""
    call, launch = work.call, work.launch
    q, k, geometry = call.q, call.k, call.geometry
    if not work.d_k.numel():
        return
    index, lengths = column_lists(call.blocks, geometry.n_k)
    of_groups = lengths.view(call.entries, k.shape[2], call.heads_a_unit, geometry.n_k).sum(2, dtype=torch.int32)
    order = of_groups.argsort(-1, descending=True)
    if d_mean is not None:
        length = k.shape[1] if call.cu_k is None else call.cu_k.diff().clamp(min=1).view(-1, 1, 1)
        d_mean = d_mean / length
    sparse_keys_kernel[(geometry.n_k * call.units,)](
        q,
        k,
        call.v,
        d_out,
        call.k_mean,
        order,
        index,
        lengths,
        work.row_shift,
        work.row_lse,
        work.d_k,
        work.d_v,
        d_mean,
        call.cu_q,
        call.cu_k,
        *q.stride(),
        *k.stride(),
        *call.v.stride(),
        *d_out.stride(),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        k.shape[2],
        q.shape[3],
        geometry.n_q,
        geometry.n_k,
        q.shape[1],
        k.shape[1],
        work.factor,
        work.factor * LOG2_E,
        QUERIES=launch.tile,
        CENTRED=d_mean is not None,
        **work.constants(),
        num_warps=launch.key_warps,
        num_stages=launch.key_stages,
    )
