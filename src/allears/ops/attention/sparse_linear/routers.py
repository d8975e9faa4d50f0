"""Routers: which key blocks each query block reads exactly, from the means of blocks.

A score is scale * (mean of the queries) . (mean of the keys); see ``block_scores``. Every router selects at least one
block wherever a query block sees any key, and in causal calls the blocks on the diagonal (``Geometry.forced``), which
count among those asked for. Routers have no gradient: training uses ``soft_top_k``. On a GPU the pools and the two
selections run in the kernels of ``triton_pool.py`` and ``triton_router.py``, which what is written here defines.

Shapes: B batch (S sequences of a packed one), L rows, H query heads, G key heads (H a multiple of G), D head size,
N_q and N_k blocks of queries and keys, R width of the row lists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.call import Packing
from allears.ops.attention.dense.packing import locate
from allears.ops.attention.lowbit.inputs import DTYPES, LARGEST_HEAD_SIZE
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry, blocks_from_order
from allears.ops.attention.sparse_linear.ops import (
    LARGEST_ROW,
    at_once,
    list_width,
    sparse_linear_classes,
    sparse_linear_pool,
    sparse_linear_pool_keys,
    sparse_linear_route,
)
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.triton_here import triton_missing

_SPARE = 1e-4  # so that 0.05 of 20 blocks is 1 block, not 0.99999


def pool_blocks(x: Tensor, block: int, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
    """Means of blocks of ``block`` rows, over the rows that exist; 0 where none does.

    Args:
        x: (B, L, heads, D), or with ``cu_seqlens`` (S + 1) packed (T, heads, D), blocks counted from each sequence's
            start.
        max_seqlen: the longest packed sequence.

    Returns:
        (B, heads, N, D), float32 (float64 for float64).
    """
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError("max_seqlen: None given beside cu_seqlens; give the longest sequence as an int")
    if _by_kernel(x) and x.shape[-1] <= LARGEST_HEAD_SIZE:
        offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        return at_once(sparse_linear_pool, x, block, offsets, max_seqlen)
    if cu_seqlens is None or max_seqlen is None:
        return _block_means(x, block, wide=_wide(x))
    rows = locate(cu_seqlens, max_seqlen, x.shape[0])
    padded = x[rows.source].masked_fill(~rows.filled[..., None, None], 0.0)
    start = torch.arange(-(-max_seqlen // block), device=x.device) * block
    size = (rows.lengths[:, None] - start).clamp(0, block)
    share = torch.minimum(max_seqlen - start, torch.as_tensor(block)) / size.clamp(min=1)  # the padding was averaged in
    return _block_means(padded, block, wide=_wide(x)) * share[:, None, :, None]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_means(x: Tensor, block: int, wide: torch.dtype) -> Tensor:
    whole = x.shape[1] // block * block
    parts = [x[:, :whole].unflatten(1, (whole // block, block)).mean(2, dtype=wide)] if whole else []
    if whole < x.shape[1]:
        parts.append(x[:, whole:].mean(1, keepdim=True, dtype=wide))
    if not parts:
        return x.new_zeros(x.shape[0], x.shape[2], 0, x.shape[3], dtype=wide)
    return torch.cat(parts, 1).transpose(1, 2)


def key_mean(k: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean over a sequence's keys: k (B, L_k, G, D) or packed (T_k, G, D) -> (B, G, D), float32 (float64 for float64).

    The mean of no keys is 0.
    """
    wide = _wide(k)
    if cu_seqlens is None:
        return k.sum(1, dtype=wide) / max(k.shape[1], 1)
    owner = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(k.shape[0], device=k.device), right=True)
    total = k.new_zeros(len(cu_seqlens) - 1, *k.shape[1:], dtype=wide).index_add(0, owner, k.to(wide))
    return total / cu_seqlens.diff().clamp(min=1)[:, None, None]


def block_scores(q_pool: Tensor, k_pool: Tensor, scale: float) -> Tensor:
    """Logits of blocks, (B, H, N_q, N_k).

    Args:
        q_pool: (B, H, N_q, D), see :func:`pool_blocks`.
        k_pool: (B, G, N_k, D), smoothed by the caller: ``pool_blocks(k, ...) - key_mean(k)[:, :, None]``.
        scale: as in the attention's logits.
    """
    grouped = (q_pool * scale).unflatten(1, (k_pool.shape[1], -1))
    return (grouped @ k_pool[:, :, None].transpose(-1, -2)).flatten(1, 2)


def pools(
    q: Tensor, k: Tensor, options: SparseLinear, *, causal: bool = False, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """What :func:`block_scores` takes: means of blocks of q (B, H, N_q, D) and of smoothed k (B, G, N_k, D).

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D).
        k: (B, L_k, G, D), or packed (T_k, G, D); smoothed where ``options`` say so and the call is not causal.
    """
    of_q, of_k = sequences(packing)
    q_pool, centred = pool_blocks(q, options.block_q, *of_q), options.smooth_k and not causal
    if centred and _by_kernel(k) and k.shape[-1] <= LARGEST_HEAD_SIZE:
        return q_pool, at_once(sparse_linear_pool_keys, k, options.block_k, *of_k, True)[0]
    k_pool = pool_blocks(k, options.block_k, *of_k)
    return q_pool, k_pool - key_mean(k, of_k[0])[:, :, None] if centred else k_pool


def _by_kernel(x: Tensor) -> bool:
    """Whether Triton pools or ranks x, whose gradient nobody asks for."""
    if x.device.type != "cuda" or x.dtype not in DTYPES or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return not triton_missing()


def pooled_scores(
    q: Tensor,
    k: Tensor,
    options: SparseLinear,
    *,
    scale: float,
    causal: bool = False,
    packing: Packing | None = None,
) -> Tensor:
    """:func:`block_scores` of q (B, L_q, H, D) and k (B, L_k, G, D), or packed ones, smoothed as ``options`` say."""
    return block_scores(*pools(q, k, options, causal=causal, packing=packing), scale)


def sequences(packing: Packing | None) -> tuple[tuple[Tensor | None, int | None], tuple[Tensor | None, int | None]]:
    """(cu_seqlens, max_seqlen) of the queries and of the keys, each None where nothing is packed."""
    if packing is None:
        return (None, None), (None, None)
    return (packing.cu_seqlens_q, packing.max_seqlen_q), (packing.cu_seqlens_k, packing.max_seqlen_k)


@torch.no_grad()
def select_top_k(scores: Tensor, keep: float, *, geometry: Geometry) -> Blocks:
    """The blocks with the highest scores: max(1, floor(keep * visible + 1e-4)) of the blocks a query block sees.

    Forced blocks count among them, and may exceed that number. Of equal scores the earlier block is taken.

    Args:
        scores: (B, H, N_q, N_k).
        keep: share of the visible blocks, in (0, 1].

    Raises:
        ValueError: ``keep`` is outside (0, 1], or the scores do not fit the geometry.
    """
    _check_share("keep", keep)
    _check_fit(scores, geometry)
    if _rank_by_kernel(scores):
        return _routed(scores, keep, None, geometry)
    order, count, width = _ranked(scores, keep, geometry)
    return blocks_from_order(order[..., :width], count.expand(scores.shape[:-1]), scores.shape[-1])


def best_blocks(scores: Tensor, keep: float, options: SparseLinear, length_q: int, length_k: int) -> Blocks:
    """:func:`select_top_k` of a bidirectional call that is not packed, whose scores are known to fit: in a third of the
    time to issue."""
    if not _rank_by_kernel(scores):
        return select_top_k(scores, keep, geometry=Geometry(length_q, length_k, options.block_q, options.block_k))
    sizes = (options.block_q, options.block_k, length_q, length_k, False)
    return Blocks(*at_once(sparse_linear_route, scores, keep, None, *sizes, None, None))


@torch.no_grad()
def sla_blocks(scores: Tensor, keep: float, skip: float, *, geometry: Geometry) -> Blocks:
    """SLA's three classes (arXiv 2509.24006, section 4.1): the best ``keep`` of the visible blocks go to the softmax
    branch as in :func:`select_top_k`, the worst floor(skip * visible + 1e-4) nowhere, the marginal rest to the linear.

    Args:
        scores: (B, H, N_q, N_k).
        keep: in (0, 1].
        skip: in [0, 1); the paper has keep 0.05 and skip 0.1.
    """
    if not 0 <= skip < 1:
        raise ValueError(f"skip: {skip} given; it must be in [0, 1)")
    if _rank_by_kernel(scores) and not isinstance(geometry.length_q, Tensor):
        _check_share("keep", keep)
        _check_fit(scores, geometry)
        sizes = (geometry.block_q, geometry.block_k, *geometry.longest, geometry.causal)
        return Blocks(*at_once(sparse_linear_classes, scores, keep, skip, *sizes))
    order, count, width = _ranked(scores, keep, geometry)
    seen = geometry.visible(scores.device).sum(-1)
    place = torch.arange(scores.shape[-1], device=scores.device)
    marginal = (place >= count[..., None]) & (place < (seen - _share(seen, skip))[..., None])
    linear = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, marginal.expand(order.shape))
    count = count.expand(scores.shape[:-1])
    return blocks_from_order(order[..., :width], count, scores.shape[-1], linear & geometry.full(scores.device))


@torch.no_grad()
def select_mass(scores: Tensor, mass: float, *, geometry: Geometry, at_least: int = 1) -> Blocks:
    """The fewest blocks whose softmax over the visible scores sums to ``mass``, the forced blocks first among them.

    Args:
        scores: (B, H, N_q, N_k); a block of -inf has no mass.
        mass: in (0, 1].
        at_least: blocks selected in any case, as far as there are visible ones.

    Raises:
        ValueError: ``mass`` or ``at_least`` is out of range, or the scores do not fit the geometry.
    """
    _check_share("mass", mass)
    if at_least < 1:
        raise ValueError(f"at_least: {at_least} given; it must be at least 1, or a query block could stay empty")
    _check_fit(scores, geometry)
    if at_least == 1 and _rank_by_kernel(scores):
        return _routed(scores, None, mass, geometry)
    seen, forced = geometry.visible(scores.device), geometry.forced(scores.device)
    shares = _finite(scores).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)  # NaN: nothing has mass
    order = _order(scores, seen, forced)
    ranked = shares.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    needed = ((before < mass - 1e-6) & (ranked > 0)).sum(-1)
    count = torch.maximum(needed, torch.maximum(forced.sum(-1), seen.sum(-1).clamp(max=at_least)))
    return blocks_from_order(order, count, scores.shape[-1])


def top_k_count(keep: float, geometry: Geometry, device: torch.device | None = None) -> Tensor:
    """(B or 1, 1, N_q) int64: how many blocks :func:`select_top_k` selects for each query block.

    Raises:
        ValueError: ``keep`` is outside (0, 1].
    """
    _check_share("keep", keep)
    visible, forced = geometry.visible(device).sum(-1), geometry.forced(device).sum(-1)
    count = torch.maximum(_share(visible, keep).clamp(min=1), forced)
    return torch.where(visible > 0, count, 0)


def _ranked(scores: Tensor, keep: float, geometry: Geometry) -> tuple[Tensor, Tensor, int]:
    """Key blocks best first (B, H, N_q, N_k), how many are kept (B or 1, 1, N_q), and the most that can be kept."""
    count = top_k_count(keep, geometry, scores.device)
    width = list_width(geometry.n_k, keep, geometry.block_q, geometry.block_k, geometry.causal)
    _check_fit(scores, geometry)
    return _order(scores, geometry.visible(scores.device), geometry.forced(scores.device)), count, width


def _rank_by_kernel(scores: Tensor) -> bool:
    return _by_kernel(scores) and scores.dtype == torch.float32 and scores.shape[-1] <= LARGEST_ROW


def _routed(scores: Tensor, keep: float | None, mass: float | None, geometry: Geometry) -> Blocks:
    """By the kernel, which takes packed sequences by their offsets."""
    lengths, offsets = (geometry.length_q, geometry.length_k), [None, None]
    if any(isinstance(x, Tensor) for x in lengths):
        each = (torch.as_tensor(x, device=scores.device).expand(scores.shape[0]) for x in lengths)
        offsets = [F.pad(x.cumsum(0), (1, 0)).to(torch.int32) for x in each]
    sizes = (geometry.block_q, geometry.block_k, *geometry.longest, geometry.causal)
    return Blocks(*at_once(sparse_linear_route, scores, keep, mass, *sizes, *offsets))


def _share(count: Tensor, share: float) -> Tensor:
    return (count.double() * share + _SPARE).long()


def _check_fit(scores: Tensor, geometry: Geometry) -> None:
    if scores.dim() != 4 or scores.shape[2:] != (geometry.n_q, geometry.n_k):
        raise ValueError(
            f"scores: shape {tuple(scores.shape)} given; it must be (B, H, N_q, N_k) with N_q = {geometry.n_q} and "
            f"N_k = {geometry.n_k} for these lengths and block sizes"
        )


def _finite(scores: Tensor) -> Tensor:
    """Ordered as given, NaN at the top, -inf kept."""
    top = torch.finfo(scores.dtype).max
    return torch.nan_to_num(scores, nan=top, posinf=top, neginf=-torch.inf)


def _order(scores: Tensor, seen: Tensor, forced: Tensor) -> Tensor:
    """(B, H, N_q, N_k) key blocks, the forced first, then by falling score, the invisible last."""
    ranks = _finite(scores).clamp(min=torch.finfo(scores.dtype).min)
    ranks = ranks.masked_fill(~seen, -torch.inf).masked_fill(forced, torch.inf)
    return ranks.sort(dim=-1, descending=True, stable=True).indices


def _check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name}: {share} given; it must be in (0, 1]")
