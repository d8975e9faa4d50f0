"""Sparse-linear attention by the Triton kernels, with gradients: what the door calls for ``kernel="triton"``.

Shapes: B batch (S sequences of a packed one), L_q queries, L_k keys, packed T_q, T_k rows, H query heads, G key heads,
D head size, N_q blocks of queries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.call import Packing
from allears.ops.attention.dense.packing import locate
from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, linear_weights
from allears.ops.attention.sparse_linear.inputs import Projection
from allears.ops.attention.sparse_linear.ops_backward import sparse_linear_attention_triton
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.reference import by_query
from allears.ops.attention.sparse_linear.triton_host import sparse_linear_forward_triton

_LARGEST_WIDE_HEAD = 128


def sparse_linear_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None,
    options: SparseLinear,
    *,
    proj: Projection | None = None,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    k_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`~allears.ops.attention.sparse_linear.sparse_linear_attention`, which checks the arguments.

    Differentiable in q, k, v, ratio and proj. The projection of the form "sla" is in the dtype of q; where no gradient
    is asked for the kernel applies it.

    Args:
        k_mean: (B, G, D) float32, the mean over the keys of each sequence, of a router that has made it already; it is
            made where it is needed.

    Returns:
        Output like q; natural log-sum-exp over the selected keys, (B, H, L_q) or packed (H, T_q), float32.

    Raises:
        ValueError: the GPU lacks what the numerics need; gradients are asked for with float32 heads above 128; or in
            the backward the gradient of the log-sum-exp is asked for, which the kernels do not have.
    """
    _refuse_large_heads(q, k, v, ratio, proj)
    longest = (max_seqlen_q, max_seqlen_k) if cu_seqlens_q is not None else (None, None)
    if ratio is not None:
        ratio = ratio.float().expand(blocks.count.shape)
    if not _learned(q, k, v, ratio, proj) and not torch.compiler.is_compiling() and type(q) is Tensor:
        with torch.cuda.device_of(q):
            made = sparse_linear_forward_triton(
                q,
                k,
                v,
                blocks,
                ratio,
                options,
                causal=causal,
                scale=scale,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=longest[0],
                max_seqlen_k=longest[1],
                k_mean=k_mean,
                proj=None if proj is None else (proj[0].to(q.dtype), None if proj[1] is None else proj[1].to(q.dtype)),
            )
        return made.out, made.lse
    out, lse, _, linear = sparse_linear_attention_triton(
        q,
        k,
        v,
        *blocks,
        ratio,
        k_mean.detach() if k_mean is not None else None,
        cu_seqlens_q,
        cu_seqlens_k,
        *longest,
        options.form,
        options.block_q,
        options.block_k,
        options.feature_map,
        options.smooth_k,
        options.precision,
        options.backward,
        causal,
        softmax_scale(scale, q.shape[-1]),
    )
    if proj is None:
        return out, lse
    weight, bias = (x.to(q.dtype) if x is not None else None for x in proj)
    assert weight is not None
    out = out + F.linear(linear, weight)
    if bias is None:
        return out, lse
    packing = None
    if cu_seqlens_q is not None:
        assert cu_seqlens_k is not None and max_seqlen_q is not None and max_seqlen_k is not None
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    there = _has_linear(q, blocks, Geometry.of(q, k, options, causal, packing), packing)
    return out + torch.where(there, bias, 0.0), lse


def _learned(q: Tensor, k: Tensor, v: Tensor, ratio: Tensor | None, proj: Projection | None) -> bool:
    """Whether gradients are asked for."""
    given = (q, k, v, ratio, *(proj or ()))
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def _refuse_large_heads(q: Tensor, k: Tensor, v: Tensor, ratio: Tensor | None, proj: Projection | None) -> None:
    if q.dtype == torch.float32 and q.shape[-1] > _LARGEST_WIDE_HEAD and q.is_cuda and _learned(q, k, v, ratio, proj):
        raise ValueError(
            f"q: float32 with head size {q.shape[-1]} given; above {_LARGEST_WIDE_HEAD} the backward's tiles do not "
            f"fit into a GPU's shared memory: cast q, k and v to bfloat16, or use kernel='reference'"
        )


def _has_linear(q: Tensor, blocks: Blocks, geometry: Geometry, packing: Packing | None) -> Tensor:
    """(B, L_q, H, 1) or (T_q, H, 1) bool: the query's block has blocks in the linear branch."""
    there = by_query(linear_weights(blocks, geometry).any(-1), geometry)
    if packing is None:
        return there.transpose(1, 2).unsqueeze(-1)
    home = locate(packing.cu_seqlens_q, packing.max_seqlen_q, q.shape[0]).home
    return there.transpose(0, 1).flatten(1, 2)[:, home].transpose(0, 1).unsqueeze(-1)
