"""The router's Triton kernels as ``torch.library`` operators without a gradient: pools of blocks, and the hard choice.
None of them waits for the GPU. The attention itself is an operator in ``ops_backward.py``.

Shapes: B batch, E entries (B, or S packed sequences), L_q, L_k rows (packed: T_q, T_k rows of all sequences), H query
heads, G key heads, D head size, N_q and N_k blocks (of the longest sequence), R width of the row lists.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST_ROW = 16_384  # key blocks that a program of the router can hold


_FUNCTIONS: dict[Any, Callable[..., Any]] = {}


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A ``torch.library`` operator of the decorated function, which :func:`at_once` can also call as it is."""

    def made(function: Callable[..., Any]) -> Any:
        known = torch.library.custom_op(f"allears::{name}", function, mutates_args=())
        _FUNCTIONS[known] = function
        return known

    return made


def at_once(known: Any, first: Tensor, *more: Any) -> Any:
    """``known(first, *more)``, an operator without a gradient; where nothing but this call sees it, without the way
    through torch's dispatcher, which takes some 30 us: more than some of the kernels here."""
    if type(first) is not Tensor or torch.compiler.is_compiling():
        return known(first, *more)
    return _FUNCTIONS[known](first, *more)


def _entries(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _blocks(x: Tensor, block: int, longest: int | None) -> int:
    return -(-(x.shape[-3] if longest is None else longest) // block)


def list_width(n_k: int, keep: float | None, block_q: int, block_k: int, causal: bool) -> int:
    """R of the router's lists: the most key blocks that it can select, for a share ``keep`` of them, or any number."""
    if keep is None:
        return n_k
    diagonal = (block_q + block_k - 2) // block_k + 1 if causal else 1
    return min(max(int(keep * n_k + 1e-4), diagonal), n_k)


@operator("sparse_linear_pool")
def sparse_linear_pool(x: Tensor, block: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
    """Means of blocks of rows, (E, heads, N, D) float32: see ``triton_pool.pool_triton``.

    Args:
        x: (B, L, heads, D), or packed (T, heads, D), any strides.
    """
    from allears.ops.attention.sparse_linear.triton_pool import pool_triton

    with torch.cuda.device_of(x):
        return pool_triton(x, block, cu_seqlens, max_seqlen)


@sparse_linear_pool.register_fake
def _pool_fake(x: Tensor, block: int, cu_seqlens: Tensor | None, max_seqlen: int | None) -> Tensor:
    shape = (_entries(x, cu_seqlens), x.shape[-2], _blocks(x, block, max_seqlen), x.shape[-1])
    return x.new_empty(shape, dtype=torch.float32)


@operator("sparse_linear_pool_keys")
def sparse_linear_pool_keys(
    k: Tensor, block: int, cu_seqlens: Tensor | None, max_seqlen: int | None, centre: bool
) -> tuple[Tensor, Tensor]:
    """Means of blocks of keys (E, G, N_k, D), with ``centre`` less the mean of all keys, and that mean (E, G, D), in
    one pass over k: see ``triton_pool.pool_keys_triton``.
    """
    from allears.ops.attention.sparse_linear.triton_pool import pool_keys_triton

    with torch.cuda.device_of(k):
        pools, mean = pool_keys_triton(k, block, cu_seqlens, max_seqlen, centre)
    return pools, mean


@sparse_linear_pool_keys.register_fake
def _pool_keys_fake(
    k: Tensor, block: int, cu_seqlens: Tensor | None, max_seqlen: int | None, centre: bool
) -> tuple[Tensor, Tensor]:
    pools = _pool_fake(k, block, cu_seqlens, max_seqlen)
    return pools, pools.new_empty(pools.shape[0], pools.shape[1], pools.shape[3])


@operator("sparse_linear_route")
def sparse_linear_route(
    scores: Tensor,
    keep: float | None,
    mass: float | None,
    block_q: int,
    block_k: int,
    length_q: int,
    length_k: int,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Row lists (E, H, N_q, R) and their counts (E, H, N_q) of the best key blocks: see ``triton_router.route_triton``.

    Args:
        scores: (E, H, N_q, N_k) float32.
    """
    from allears.ops.attention.sparse_linear.triton_router import route_triton

    with torch.cuda.device_of(scores):
        blocks = route_triton(
            scores,
            keep=keep,
            mass=mass,
            block_q=block_q,
            block_k=block_k,
            length_q=length_q,
            length_k=length_k,
            causal=causal,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
    return blocks.rows, blocks.count


@sparse_linear_route.register_fake
def _route_fake(
    scores: Tensor,
    keep: float | None,
    mass: float | None,
    block_q: int,
    block_k: int,
    length_q: int,
    length_k: int,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    width = list_width(scores.shape[3], keep, block_q, block_k, causal)
    rows = scores.new_empty(*scores.shape[:3], width, dtype=torch.int32)
    return rows, scores.new_empty(scores.shape[:3], dtype=torch.int32)


@operator("sparse_linear_classes")
def sparse_linear_classes(
    scores: Tensor, keep: float, skip: float, block_q: int, block_k: int, length_q: int, length_k: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """SLA's three classes of key blocks, as ``routers.sla_blocks``: row lists, their counts, and (E, H, N_q, N_k) bool,
    the blocks of the linear branch.

    Args:
        scores: (E, H, N_q, N_k) float32.
    """
    from allears.ops.attention.sparse_linear.triton_router import route_triton

    sizes = {"block_q": block_q, "block_k": block_k, "length_q": length_q, "length_k": length_k, "causal": causal}
    with torch.cuda.device_of(scores):
        rows, count, linear = route_triton(scores, keep=keep, skip=skip, **sizes)
    assert linear is not None, "a share to skip was given"
    return rows, count, linear


@sparse_linear_classes.register_fake
def _classes_fake(
    scores: Tensor, keep: float, skip: float, block_q: int, block_k: int, length_q: int, length_k: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    made = _route_fake(scores, keep, None, block_q, block_k, length_q, length_k, causal, None, None)
    return *made, scores.new_empty(scores.shape, dtype=torch.bool)


@operator("sparse_linear_scores")
def sparse_linear_scores(
    q_pool: Tensor, k_pool: Tensor, k_mean: Tensor | None, proj_q: Tensor | None, proj_k: Tensor | None, scale: float
) -> Tensor:
    """Logits of blocks (E, H, N_q, N_k) float32: see ``triton_scores.scores_triton``."""
    from allears.ops.attention.sparse_linear.triton_scores import scores_triton

    with torch.cuda.device_of(q_pool):
        return scores_triton(q_pool, k_pool, k_mean, proj_q, proj_k, scale)


@sparse_linear_scores.register_fake
def _scores_fake(
    q_pool: Tensor, k_pool: Tensor, k_mean: Tensor | None, proj_q: Tensor | None, proj_k: Tensor | None, scale: float
) -> Tensor:
    return q_pool.new_empty(*q_pool.shape[:3], k_pool.shape[2])
