"""Launches the kernel of ``triton_jvp.py``.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from allears.ops.attention.jvp.triton_jvp import attention_jvp_kernel


@dataclass(frozen=True)
class Launch:
    """Queries and keys of a tile, warps, stages of the loop, and channels of a logit that are summed at a time."""

    rows: int
    keys: int
    warps: int
    stages: int
    piece: int


def launch_for(padded: int, wide: bool, major: int = 9) -> Launch:
    """By the padded head size, whether the inputs have 32 bits, and the major compute capability.

    Six products a tile of keys and two sums of ROWS x DP: what fits the registers decides.
    """
    if wide:
        return Launch(rows=16, keys=32, warps=8, stages=1, piece=min(padded, 32))
    if padded <= 64:
        return Launch(rows=64, keys=32, warps=4, stages=2, piece=padded)
    if major == 9:
        return Launch(rows=64, keys=32, warps=8, stages=2, piece=padded)
    if major == 10:
        return Launch(rows=64, keys=64, warps=8, stages=2, piece=padded)
    return Launch(rows=32, keys=32, warps=4, stages=2, piece=padded)


def attention_jvp_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor | None,
    d_k: Tensor | None,
    d_v: Tensor | None,
    scale: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """q and d_q (B, L_q, H, D), k, v, d_k and d_v (B, L_k, G, D) to output and tangent (B, L_q, H, D), contiguous.

    Strides are honoured where D's is 1 and a tangent has its primal's; what differs is copied.
    """
    (q, d_q), (k, d_k), (v, d_v) = (_alike(x, t) for x, t in ((q, d_q), (k, d_k), (v, d_v)))
    batch, queries, heads, size = q.shape
    out, d_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    if not q.numel():
        return out, d_out
    padded = max(16, triton.next_power_of_2(size))
    major = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 9
    launch = launch or launch_for(padded, q.dtype == torch.float32, major)
    tiles = triton.cdiv(queries, launch.rows)
    attention_jvp_kernel[(tiles * batch * heads,)](
        q,
        k,
        v,
        d_q,
        d_k,
        d_v,
        out,
        d_out,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        queries,
        k.shape[1],
        heads,
        k.shape[2],
        size,
        tiles,
        scale,
        ROWS=launch.rows,
        KEYS=launch.keys,
        DP=padded,
        PIECE=launch.piece,
        PADDED=padded != size,
        HAS_DQ=d_q is not None,
        HAS_DK=d_k is not None,
        HAS_DV=d_v is not None,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out, d_out


def _alike(x: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with the same strides, D's 1."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if tangent is None or tangent.stride() == x.stride():
        return x, tangent
    return x.contiguous(), tangent.contiguous()
