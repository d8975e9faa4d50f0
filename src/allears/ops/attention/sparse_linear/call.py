"""The door of sparse-linear attention: which kernel runs a call, and nothing else silently.

Shapes: B batch (S sequences of a packed one), L_q queries, L_k keys, T_q and T_k rows of a packed batch, H query heads,
G key heads (H a multiple of G), D head size, N_q and N_k blocks, R width of the row lists.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from allears.ops.attention.call import Facts, autocast_inputs, func_differentiates, gather_facts
from allears.ops.attention.dispatch import Choice
from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.sparse_linear.backends import KERNELS, choose
from allears.ops.attention.sparse_linear.blocks import Blocks
from allears.ops.attention.sparse_linear.inputs import Projection, check_call
from allears.ops.attention.sparse_linear.ops_hopper import Statistics, block_statistics, sparse_linear_hopper
from allears.ops.attention.sparse_linear.options import SparseLinear

_PLAIN = SparseLinear()


@overload
def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None = None,
    options: SparseLinear | None = None,
    *,
    proj: Projection | None = None,
    causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[False] = False,
    statistics: Statistics | None = None,
) -> Tensor: ...
@overload
def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None = None,
    options: SparseLinear | None = None,
    *,
    proj: Projection | None = None,
    causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[True],
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor]: ...
def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None = None,
    options: SparseLinear | None = None,
    *,
    proj: Projection | None = None,
    causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    statistics: Statistics | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A softmax over the chosen key blocks of each query block, beside linear attention over the other blocks.

    Args:
        q: (B, L_q, H, D), or with ``cu_seqlens_q`` the packed (T_q, H, D).
        k, v: (B, L_k, G, D), or packed (T_k, G, D).
        blocks: the choice, from a router (``select_top_k``, ``select_mass``, ``sla_blocks``, ``spargeattn_blocks``) or
            ``blocks_from_map``, made with the block sizes of ``options``. A causal call must choose every block that a
            query block sees in part (``Geometry.forced``, which routers do). On a GPU the lists are not checked.
        ratio: weight of the softmax branch in (0, 1), broadcastable to (B, H, N_q); the form ``"sla2"`` needs it, the
            others have none.
        options: form, block sizes, feature map and precision; the default is ``SparseLinear()``.
        proj: weight (D, D) and bias (D,) or None of the projection of form ``"sla"``, as of ``nn.Linear``.
        causal: query i sees the keys up to i + L_k - L_q.
        scale: of the logits of the softmax branch; ``1 / sqrt(D)`` for None.
        kernel: ``"auto"`` takes the first that can run the call; a name takes that one, or fails with its reason.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in ``attention``; blocks are counted from each
            sequence's start.
        return_lse: also return the log-sum-exp over the selected keys.
        statistics: of the same q, k and v, where :func:`fused_statistics` gave them to the router.

    Returns:
        Output like ``q`` (under autocast in its dtype); with ``return_lse`` the pair (output, lse), lse natural-log of
        scale * q . k over the selected keys, float32 (float64 for float64), (B, H, L_q) or (H, T_q). A query without
        keys gives zeros and -inf. Differentiable in q, k, v, ratio and proj; the choice of blocks has no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the named kernel cannot run the call, or gradients are asked
            of a kernel that has none.
    """
    options = options or _PLAIN
    q, k, v = autocast_inputs(q, k, v)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    facts, more = _examine(q, k, v, blocks, ratio, options, proj, causal, packing, return_lse)
    chosen = choose(facts, options, kernel)
    if chosen.fused:
        more.update(need_lse=return_lse, statistics=statistics)
    factor = softmax_scale(scale, q.shape[-1])
    out, lse = chosen.run(q, k, v, blocks, ratio, options, proj=proj, causal=causal, scale=factor, **more)
    return (out, lse) if return_lse else out


def fused_statistics(
    q: Tensor, k: Tensor, v: Tensor, options: SparseLinear, *, trains: bool, causal: bool = False, kernel: str = "auto"
) -> Statistics | None:
    """What a router needs of q and k, measured in the same pass as what the kernel needs, where the kernel that will
    run this call has such a pass; None where it has none.

    Args:
        q, k, v: (B, L_q, H, D), (B, L_k, G, D), as they go into :func:`sparse_linear_attention`.
        options, causal, kernel: those of the call.
        trains: gradients of the ratio are asked for.
    """
    q, k, v = autocast_inputs(q, k, v)
    facts = gather_facts(q, k, v, None, causal, False, False)
    if trains and torch.is_grad_enabled():
        facts = facts._replace(grad=True)
    if not choose(facts, options, kernel).fused:
        return None
    return block_statistics(q, k, v, options.smooth_k)


def attend_measured(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor,
    options: SparseLinear,
    *,
    scale: float,
    statistics: Statistics,
) -> Tensor:
    """:func:`sparse_linear_attention` of what :func:`fused_statistics` has found fit for its kernel, with blocks and a
    ratio that a caller made for it and knows to fit: nothing is examined again, which takes some 40 us.
    """
    q, k, v = autocast_inputs(q, k, v)
    return sparse_linear_hopper(
        q,
        k,
        v,
        blocks,
        ratio,
        options,
        proj=None,
        causal=False,
        scale=softmax_scale(scale, q.shape[-1]),
        need_lse=False,
        statistics=statistics,
    )[0]


def explain_sparse_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None = None,
    options: SparseLinear | None = None,
    *,
    proj: Projection | None = None,
    causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Choice:
    """Which kernel :func:`sparse_linear_attention` would run for the same arguments, and why not each other one."""
    options = options or _PLAIN
    q, k, v = autocast_inputs(q, k, v)
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    facts, _ = _examine(q, k, v, blocks, ratio, options, proj, causal, packing, return_lse)
    softmax_scale(scale, q.shape[-1])
    return explain_choice(facts, options, kernel)


def explain_choice(facts: Facts, options: SparseLinear, kernel: str) -> Choice:
    """The kernel for these facts, and what the others say."""
    chosen = choose(facts, options, kernel)
    reasons = {known.name: known.objection(facts, options, False) for known in KERNELS if known is not chosen}
    refused = {name: reason for name, reason in reasons.items() if reason}
    return Choice(chosen.name, refused, tuple(name for name in reasons if name not in refused))


def _examine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None,
    options: SparseLinear,
    proj: Projection | None,
    causal: bool,
    packing: tuple[Tensor | None, Tensor | None, int | None, int | None],
    lse: bool,
) -> tuple[Facts, dict[str, Any]]:
    """The facts of a call that fits, and its packing as keyword arguments."""
    _, checked = check_call(q, k, v, blocks, ratio, options, proj, causal, *packing)
    facts = gather_facts(q, k, v, None, causal, checked is not None, lse)
    learned = [x for x in (ratio, *(proj or ())) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in learned):
        facts = facts._replace(grad=True, func=facts.func or func_differentiates(*learned))
    return facts, {} if checked is None else checked._asdict()
