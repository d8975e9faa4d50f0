"""Linear attention by the Triton kernels: which tiles they take, what they leave one another, and in which order.

Nothing is tuned at run time and nothing waits for the GPU. A kernel is compiled for the distance of rows in memory,
which in (B, L, H, D) is H * D, and never again for a length or a batch. Sums are always added in one order, so that a
call repeats bit by bit on one kind of GPU.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, W = D padded to 16, 32, 64 or 128, K taps; S packed
sequences are (1, T, H, D) with E = S entries, else E = B; P parts of a sequence, G groups of heads, TOTAL = B * L rows.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from allears.ops.attention.linear.one_call import Call, processors
from allears.ops.attention.linear.triton_bwd import keys_gradient_kernel, queries_gradient_kernel
from allears.ops.attention.linear.triton_features import norms_kernel
from allears.ops.attention.linear.triton_fwd import mean_kernel, output_kernel, states_kernel

LARGEST_HEAD = 128
_HOPPER_SHARED_BYTES = 227 * 1024


class Tile(NamedTuple):
    """What a program holds: rows, heads beside one another, the padded head size; and its warps and stages."""

    rows: int
    side: int
    width: int
    warps: int
    stages: int


def padded_size(size: int) -> int:
    """16, 32, 64 or 128."""
    return max(16, triton.next_power_of_2(size))


def tile_for(x: Tensor, matrices: int = 1) -> Tile:
    """The tile over rows of x (B, L, H, D) whose program keeps ``matrices`` of each head in shared memory: all heads if
    these, and the sums of phi(k)^T v in registers, fit a multiprocessor, else as many as do.

    A product of several heads gives each warp heads of its own, whose sums take at most 128 registers a thread; and a
    thread has 16 or 32 numbers of a tile.
    """
    heads, size = x.shape[2:]
    width, wide = padded_size(size), x.element_size() == 4
    if width == 128:
        return Tile(16 if wide else 64, 1, width, 8, 1 if wide else 2)
    room = 8192 if wide else 32768
    while room * matrices * x.element_size() > 0.8 * shared_bytes(x.device):
        room //= 2
    side = max(1, min(triton.next_power_of_2(heads), 512 // width, room // width**2))
    if side == 1:
        return Tile(64, 1, width, 4, 2)
    across = side * width
    warps = min(side, 8, max(1, across // 32))
    return Tile(max(16, 512 * warps // across), side, width, warps, 3 - (width == 64) - (matrices - 1))


def head_tile(size: int) -> Tile:
    """The tile of causal attention: one head, and queries and keys in square products."""
    width = padded_size(size)
    return Tile(32, 1, width, 8 if width >= 64 else 4, 1 if width == 128 else 2)


def parts_for(tile: Tile, groups: int, entries: int, rows: int, device: torch.device) -> int:
    """P: parts of a sequence of about ``rows`` rows, so that all programs run at once and none has less than two
    tiles."""
    wanted = processors(device) * max(1, (8 if tile.width >= 64 else 16) // tile.warps)
    return max(1, min(-(-wanted // max(1, groups * entries)), -(-rows // (2 * tile.rows))))


def shared_bytes(device: torch.device) -> int:
    """What a program may take of shared memory."""
    return _shared_bytes(device.index) if device.type == "cuda" else _HOPPER_SHARED_BYTES


@cache
def _shared_bytes(index: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


class Run(NamedTuple):
    """How the kernels of one call are launched over the rows of q or k."""

    tile: Tile
    grid: tuple[int, int, int]
    norm: str
    more: dict[str, Any]


def plan(x: Tensor, call: Call, tile: Tile | None = None, finer: int = 1) -> Run:
    """The launch over the rows of x (B, L, H, D), in ``finer`` times as many parts as run at once."""
    rows, heads, size = x.shape[1:]
    tile = tile or tile_for(x)
    groups, entries = -(-heads // tile.side), call.entries(x)
    length = -(-rows // max(1, entries)) if call.cu is not None else rows
    parts = parts_for(tile, groups, entries, length, x.device)
    parts = min(parts * finer, -(-length // tile.rows)) or 1
    grid = (parts, groups, entries)
    norm = ("given" if groups > 1 else "channels") if call.joint else "head"
    more = {
        "H": heads,
        "D": size,
        "KIND": call.kind,
        "POWER": call.power if call.kind == "focused" else 1,
        "NORM": norm,
        "ROWS": tile.rows,
        "W": tile.width,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    return Run(tile, grid, norm, more)


def padded_conv(weight: Tensor | None, bias: Tensor | None, width: int) -> tuple[Tensor | None, Tensor | None, int]:
    """weight (H, D, K) and bias (H, D) as the kernels read them, (K, H, W) and (H, W) in float32; and K, 0 without."""
    if weight is None:
        return None, None, 0
    pad = (0, width - weight.shape[1])
    taps = torch.nn.functional.pad(weight.float().permute(2, 0, 1), pad).contiguous()
    return taps, None if bias is None else torch.nn.functional.pad(bias.float(), pad).contiguous(), weight.shape[2]


def row_norms(x: Tensor, scale: Tensor | None, call: Call, run: Run) -> Tensor | None:
    """The joint norms of rows (2, TOTAL), where a program of ``run`` does not see all heads."""
    if run.norm != "given":
        return None
    batch, rows, heads, size = x.shape
    norms = torch.empty(2, batch * rows, device=x.device)
    tile = tile_for(x)
    if norms.numel():
        norms_kernel[(-(-rows // tile.rows), batch)](
            x,
            scale,
            norms,
            *x.stride(),
            rows,
            batch * rows,
            H=heads,
            D=size,
            POWER=call.power,
            ROWS=tile.rows,
            SIDE=tile.side,
            W=tile.width,
            num_warps=tile.warps,
        )
    return norms


def part_states(
    x: Tensor,
    y: Tensor,
    scale: Tensor | None,
    norms: Tensor | None,
    call: Call,
    run: Run,
    weights: tuple[Tensor, Tensor] | None = None,
    past: Tensor | None = None,
) -> Tensor:
    """Sums of each part: (E, P, H * (W * W + W)); see ``states_kernel``."""
    heads, width = x.shape[2], run.tile.width
    parts = torch.empty(run.grid[2], run.grid[0], heads * (width * width + width), device=x.device)
    if parts.numel():
        states_kernel[run.grid](
            x,
            y,
            scale,
            norms,
            *(weights or (None, None)),
            past,
            call.cu,
            call.lengths,
            parts,
            *x.stride(),
            *y.stride(),
            x.shape[1],
            x.shape[0] * x.shape[1],
            SIDE=run.tile.side,
            **run.more,
        )
    return parts


def mean_states(parts: Tensor, keys: Tensor, call: Call, width: int) -> tuple[Tensor, Tensor]:
    """The parts' sum over the number of keys: (E, H, W, W) in the dtype of the keys, and (E, H, W) in float32."""
    entries, count, heads = parts.shape[0], parts.shape[1], keys.shape[2]
    matrix = torch.empty(entries, heads, width, width, dtype=keys.dtype, device=keys.device)
    sums = torch.empty(entries, heads, width, device=keys.device)
    block = 128
    if parts.numel():
        mean_kernel[(-(-parts.shape[2] // block), entries)](
            parts,
            call.cu,
            call.lengths,
            matrix,
            sums,
            keys.shape[1],
            count,
            MATRIX=heads * width * width,
            SUMS=heads * width,
            STEP=16,
            BLOCK=block,
            num_warps=4,
        )
    return matrix, sums


def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over both directions.

    Args:
        q: (B, L_q, H, D), float16, bfloat16 or float32, any strides; packed: B = 1.
        k, v: (B, L_k, H, D).
        scale: (H, D) float32 or None.
        conv_weight, conv_bias: (H, D, K) and (H, D) or None.

    Returns:
        out like q, contiguous; mean(phi(k)^T v) (E, H, W, W) in the dtype of q and mean phi(k) (E, H, W) in float32.
    """
    over_k, over_q = plan(k, call), plan(q, call, finer=4)
    width = over_q.tile.width
    parts = part_states(k, v, scale, row_norms(k, scale, call, over_k), call, over_k)
    matrix, sums = mean_states(parts, k, call, width)
    conv, bias, taps = padded_conv(conv_weight, conv_bias, width)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        output_kernel[over_q.grid](
            q,
            v,
            scale,
            row_norms(q, scale, call, over_q),
            matrix,
            sums,
            conv,
            bias,
            call.cu,
            call.lengths,
            out,
            *q.stride(),
            *v.stride(),
            *out.stride(),
            q.shape[1],
            k.shape[1],
            q.shape[0] * q.shape[1],
            call.eps,
            TAPS=taps,
            SIDE=over_q.tile.side,
            **over_q.more,
        )
    return out, matrix, sums


class Gradients(NamedTuple):
    """d_q, d_k, d_v as q, k, v, contiguous; d_scale (H, D), d_conv (H, D, K) and d_bias (H, D) in float32, or None."""

    d_q: Tensor
    d_k: Tensor
    d_v: Tensor
    d_scale: Tensor | None
    d_conv: Tensor | None
    d_bias: Tensor | None


def linear_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    with_bias: bool,
    matrix: Tensor,
    sums: Tensor,
    call: Call,
) -> Gradients:
    """Gradients of :func:`linear_forward`, of its arguments and what it returned."""
    over_k, over_q = plan(k, call, tile_for(k, matrices=2)), plan(q, call)
    rows_q, rows_k = q.shape[0] * q.shape[1], k.shape[0] * k.shape[1]
    heads, width = q.shape[2], over_q.tile.width
    q_norms, k_norms = row_norms(q, scale, call, over_q), row_norms(k, scale, call, over_k)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    weights = tuple(torch.empty(rows_q, heads, device=q.device) for _ in range(2))
    of_scale = [empty_parts(run, heads, width, q, scale) for run in (over_q, over_k)]
    for dots, stage in stages(over_q, rows_q, q):
        queries_gradient_kernel[over_q.grid](
            q,
            d_out,
            scale,
            q_norms,
            dots,
            matrix,
            sums,
            call.cu,
            call.lengths,
            d_q,
            *weights,
            of_scale[0],
            *q.stride(),
            *d_out.stride(),
            *d_q.stride(),
            q.shape[1],
            k.shape[1],
            rows_q,
            call.eps,
            DOTS=stage,
            SIDE=over_q.tile.side,
            **over_q.more,
        )
    parts = part_states(q, d_out, scale, q_norms, call, over_q, (weights[0], weights[1]))
    d_matrix, d_sums = mean_states(parts, k, call, width)
    conv, _, taps = padded_conv(conv_weight, None, width)
    of_conv = empty_parts(over_k, heads, width, q, conv, taps)
    for dots, stage in stages(over_k, rows_k, q):
        keys_gradient_kernel[over_k.grid](
            k,
            v,
            d_out,
            scale,
            k_norms,
            dots,
            d_matrix,
            d_sums,
            conv,
            call.cu,
            call.lengths,
            d_k,
            d_v,
            of_scale[1],
            of_conv,
            *k.stride(),
            *v.stride(),
            *d_out.stride(),
            *d_k.stride(),
            *d_v.stride(),
            q.shape[1],
            k.shape[1],
            rows_k,
            DOTS=stage,
            TAPS=taps,
            SIDE=over_k.tile.side,
            **over_k.more,
        )
    return Gradients(
        d_q, d_k, d_v, *parameter_gradients(scale, of_scale, of_conv, d_out if with_bias else None, heads, q.shape[3])
    )


def stages(run: Run, rows: int, x: Tensor) -> Iterator[tuple[Tensor | None, bool]]:
    """(dots, DOTS) of the runs of a gradient kernel: one, or two where its heads share norms with other programs', or
    none without entries."""
    if not run.grid[2]:
        return
    if run.norm != "given":
        yield None, False
        return
    dots = torch.empty(run.grid[1], rows, device=x.device)
    yield dots, True
    yield dots.sum(0), False


def empty_parts(
    run: Run, heads: int, width: int, x: Tensor, wanted: Tensor | None, taps: int | None = None
) -> Tensor | None:
    """Sums of every program: (E * P, H * W), or (E * P, K, H * W), or None where nothing is wanted."""
    if wanted is None:
        return None
    between = () if taps is None else (taps,)
    return torch.empty(run.grid[2] * run.grid[0], *between, heads * width, device=x.device)


def parameter_gradients(
    scale: Tensor | None,
    of_scale: list[Tensor | None],
    of_conv: Tensor | None,
    d_out: Tensor | None,
    heads: int,
    size: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_scale, d_conv and d_bias from the programs' sums; that of the bias from ``d_out``."""
    d_scale = d_conv = d_bias = None
    if scale is not None:
        logs = sum(part.sum(0) for part in of_scale if part is not None)
        assert isinstance(logs, Tensor)
        d_scale = -logs.view(heads, -1)[:, :size] / scale
    if of_conv is not None:
        d_conv = of_conv.sum(0).view(of_conv.shape[1], heads, -1)[..., :size].permute(1, 2, 0).contiguous()
    if d_out is not None:
        d_bias = d_out.sum((0, 1), dtype=torch.float32)
    return d_scale, d_conv, d_bias
