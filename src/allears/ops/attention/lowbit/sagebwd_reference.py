"""SageBwd, INT8 attention that trains (arXiv 2505.11594, section 4; 2603.02170): what its kernels follow.

Six of the seven products are in INT8; dO V^T is in 16 bit. Forward: Q one scale a token, K and V one a block of 128
keys, P one a row of a tile. Backward, in tiles of 64 queries x 128 keys, with P = exp(S - lse) recomputed from the
saved INT8:

* ``grad_scales="row"``: each operand has one scale for each row of the product in the tile. The scales of the tokens
  of dO and Q would vary along the sum over queries, so they are multiplied into P and dS first:
  dV = quant_columns(P * s_dO)^T dO8, dK = quant_columns(dS * s_Q)^T Q8, dQ = quant_rows(dS) K8 * s_K.
* ``grad_scales="tile"``, the paper's: one scale for the tile of P, dS, dO and Q. Q has then one scale for 64 queries
  in the forward too, as one copy of it is saved.

With smoothed Q (2603.02170) what is quantised is Q less the mean of its block of 128. S gets the mean's
part back in float32, forward and backward; dQ = dS K does not change; dK = dS^T Q has two terms: the INT8 product with
the centred Q, and in float32 (sum of dS over a block's queries)^T mean.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, R = H / G, D head size, T tiles of 64 queries, N
keys of a tile, M blocks of 128 queries.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.lowbit.inputs import check_inputs, softmax_scale
from allears.ops.attention.lowbit.int8_reference import int8_product, int8_scores
from allears.ops.attention.lowbit.online_softmax import (
    LOG2_E,
    exp2_below,
    hidden_keys,
    key_tiles,
    merge_heads,
    of_seen,
    online_softmax,
    split_heads,
)
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import (
    INT8_TOP,
    KEY_BLOCK,
    QUERY_TILE,
    quantise_int8,
    quantise_int8_blocks,
    quantise_int8_rows,
    quantise_weights,
    rows_of_blocks,
)
from allears.ops.attention.lowbit.smooth import (
    QUERY_BLOCK,
    corrected,
    key_mean_logits,
    query_correction,
    smooth_keys,
    smooth_queries,
)


class SageSaved(NamedTuple):
    """What the backward needs.

    q8 int8 (B, L_q, H, D), q_scale (B, H, L_q); k8 int8 (B, L_k, G, D), k_scale (B, G, M); v (B, L_k, G, D) as given;
    k_mean (B, G, D), 0 without smoothing; out (B, L_q, H, D) as returned; lse (B, H, L_q), natural, of the smoothed
    scores. With smoothed Q also its means q_mean (B, M, H, D) and correction (B, H, M, L_k), what the scores lose by
    them, not yet scaled.
    """

    q8: Tensor
    q_scale: Tensor
    k8: Tensor
    k_scale: Tensor
    v: Tensor
    k_mean: Tensor
    out: Tensor
    lse: Tensor
    q_mean: Tensor | None = None
    correction: Tensor | None = None


def sagebwd_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    p_top: float = INT8_TOP,
) -> tuple[Tensor, Tensor, SageSaved]:
    """The forward of SageBwd.

    Args:
        q: (B, L_q, H, D), float16, bfloat16 or float32, D at most 256.
        k, v: (B, L_k, G, D).
        causal: query ``i`` sees keys up to ``i + L_k - L_q``.
        scale: factor on the logits; ``None``: ``1 / sqrt(D)``.
        options: ``smooth_k``, ``smooth_q`` and ``grad_scales`` count here.
        p_top: the integer of a row's largest P: 127, or 255 as in Hopper's kernels.

    Returns:
        Output (B, L_q, H, D) in q's dtype, the natural log-sum-exp of the logits of the given k, float32 (B, H, L_q),
        and what
        :func:`sagebwd_backward` needs. A query without keys gives 0 and -inf. An infinity or a NaN makes NaN of every
        result that shares its scale.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_inputs(q, k, v)
    options = options or LowBit()
    factor = softmax_scale(scale, q.shape[-1])
    keys, k_mean = smooth_keys(k) if options.smooth_k else (k.float(), k.new_zeros(k[:, 0].shape, dtype=torch.float32))
    k8, k_scale = quantise_int8_blocks(keys)
    v8, v_scale = quantise_int8_blocks(v)
    centred, q_mean = smooth_queries(q) if options.smooth_q else (q, None)
    if options.grad_scales == "row":
        q8, q_scale = quantise_int8_rows(centred)
    else:
        q8, tile_scale = quantise_int8_blocks(centred, QUERY_TILE)
        q_scale = rows_of_blocks(tile_scale, q.shape[1], QUERY_TILE)
    groups = k.shape[2]
    shape = (q.shape[0], groups, q.shape[2] // groups, q.shape[1], q.shape[3])
    scores, correction = int8_scores(q8, q_scale, k8, k_scale, factor), None
    if q_mean is not None:
        correction = query_correction(q_mean, keys)
        scores = corrected(scores, correction, factor, q.shape[1], groups)
    wide, lse = online_softmax(scores, int8_product(v8, v_scale, p_top), shape, k.shape[1], causal, q.device)
    out, lse = merge_heads(wide).to(q.dtype), lse.flatten(1, 2)
    saved = SageSaved(q8, q_scale, k8, k_scale, v, k_mean, out, lse, q_mean, correction)
    return out, lse + factor * key_mean_logits(q, k_mean), saved


def sagebwd_backward(
    d_out: Tensor,
    saved: SageSaved,
    *,
    d_lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    p_top: float = INT8_TOP,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of SageBwd.

    Args:
        d_out: (B, L_q, H, D), in the dtype of v.
        saved: from :func:`sagebwd_forward`, called with the same ``causal``, ``scale`` and ``options``.
        d_lse: (B, H, L_q), the gradient of the returned log-sum-exp, if it has one.
        p_top: as in :func:`sagebwd_forward`, for the P of dV.

    Returns:
        dQ (B, L_q, H, D), dK and dV (B, L_k, G, D), in the dtype of v; sums in float32.

    Raises:
        ValueError: ``d_out`` does not fit the output.
    """
    if d_out.shape != saved.out.shape or d_out.dtype != saved.v.dtype:
        raise ValueError(
            f"d_out: {d_out.dtype} {tuple(d_out.shape)} given; it must be like the output, {saved.v.dtype} "
            f"{tuple(saved.out.shape)}"
        )
    options = options or LowBit()
    factor = softmax_scale(scale, d_out.shape[-1])
    per_tile = options.grad_scales == "tile"
    queries, keys, groups = d_out.shape[1], saved.k8.shape[1], saved.k8.shape[2]

    def tiled(x: Tensor) -> Tensor:
        """(B, G, R, L_q, ...) -> (B, G, R, T, 64, ...), zeros after the last query."""
        after = (0, 0) * (x.dim() - 4) + (0, -queries % QUERY_TILE)
        return F.pad(x, after).unflatten(3, (-(-queries // QUERY_TILE), QUERY_TILE))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1))

    errors = (d_out.float() * saved.out.float()).sum(-1).transpose(1, 2)
    d_sums = torch.zeros_like(errors) if d_lse is None else of_seen(d_lse, saved.lse)
    row_shift = tiled(heads(errors - d_sums)).unsqueeze(-1)
    row_lse = (heads(saved.lse) * LOG2_E).unsqueeze(-1)
    d_tiles = tiled(split_heads(d_out.float(), groups))
    do8, do_scale = quantise_int8(d_tiles, (-2, -1) if per_tile else -1)
    q_tiles = tiled(split_heads(saved.q8, groups)).float()
    q_scale = tiled(heads(saved.q_scale)).unsqueeze(-1)
    if per_tile:
        q_scale = q_scale[..., :1, :]
    scores = int8_scores(saved.q8, saved.q_scale, saved.k8, saved.k_scale, factor)
    q_means = None
    if saved.q_mean is not None and saved.correction is not None:
        scores = corrected(scores, saved.correction, factor, queries, groups)
        of_tiles = saved.q_mean.repeat_interleave(QUERY_BLOCK // QUERY_TILE, dim=1)[:, : q_tiles.shape[3]]
        q_means = split_heads(of_tiles, groups)
    k_wide, v_wide = saved.k8.transpose(1, 2).float(), saved.v.transpose(1, 2).float()

    d_q = torch.zeros_like(q_tiles)
    d_k, d_v = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for tile in key_tiles(keys):
        logits = scores(tile)
        if causal:
            logits = logits.masked_fill(hidden_keys(queries, keys, tile, d_out.device), -torch.inf)
        weights = tiled(exp2_below(logits, row_lse))
        d_weights = d_tiles @ v_wide[:, :, None, None, tile].transpose(-1, -2)
        d_logits = weights * (d_weights - row_shift)
        if per_tile:
            d_v[:, :, tile] = _int8_sum(*quantise_weights(weights, (-2, -1), p_top), do8, do_scale)
            d_k[:, :, tile] = _int8_sum(*quantise_int8(d_logits, (-2, -1)), q_tiles, q_scale)
            ds8, ds_scale = quantise_int8(d_logits, (-2, -1))
        else:
            d_v[:, :, tile] = _int8_sum(*quantise_weights(weights * do_scale, -2, p_top), do8)
            d_k[:, :, tile] = _int8_sum(*quantise_int8(d_logits * q_scale, -2), q_tiles)
            ds8, ds_scale = quantise_int8(d_logits, -1)
        if q_means is not None:
            d_k[:, :, tile] += torch.einsum("bgrtn,bgrtd->bgnd", d_logits.sum(-2), q_means)
        k_scale = saved.k_scale[:, :, None, None, None, tile.start // KEY_BLOCK, None]
        d_q += (ds8.float() @ k_wide[:, :, None, None, tile]) * (ds_scale * k_scale)

    d_q = d_q.flatten(3, 4)[:, :, :, :queries] * factor
    if d_lse is not None:
        d_q = d_q + factor * heads(d_sums).unsqueeze(-1) * saved.k_mean[:, :, None, None]
    dtype = saved.v.dtype
    return merge_heads(d_q).to(dtype), (d_k * factor).transpose(1, 2).to(dtype), d_v.transpose(1, 2).to(dtype)


def _int8_sum(left8: Tensor, scale: Tensor, right8: Tensor, right_scale: Tensor | None = None) -> Tensor:
    """left^T right summed over R and T: (B, G, R, T, 64, N), (B, G, R, T, 64, D) -> (B, G, N, D)."""
    if right_scale is not None:
        scale = scale * right_scale
    return ((left8.float().transpose(-1, -2) @ right8.float()) * scale.transpose(-1, -2)).sum((2, 3))
