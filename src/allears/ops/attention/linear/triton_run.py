"""Linear attention by the Triton kernels, as the door calls it.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, K taps of the convolution of V; packed T rows of S
sequences; E = S entries if packed, else B.
"""

import torch
from torch import Tensor

from allears.ops.attention.linear.conv import convolve_values
from allears.ops.attention.linear.ops import causal_triton, linear_forward, linear_triton, of_heads
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.state import LinearState


def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions,
    *,
    scale: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    causal: bool = False,
    state: LinearState | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearState | None]:
    """What :func:`~allears.ops.attention.linear.reference.linear_attention_reference` computes, in one or two passes
    over memory. Differentiable in q, k, v, scale, conv_weight, conv_bias and the state.

    q, k and v are float16, bfloat16 or float32, D is at most 128. The features' products are rounded to that dtype;
    sums, norms and quotients are in float32. With the third power and the focused map, (relu(x) + 1e-6) / scale must
    be under 40,000.

    Arguments and returns as there; :func:`~allears.ops.attention.linear.call.linear_attention` checks them.
    """
    packed = cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    heads, size = q.shape[2:]
    scale = None if scale is None else scale.float().contiguous()
    maps = (options.feature_map, options.power, options.norm, options.eps)
    if not causal and _plain(q, k, v, scale, conv_weight, conv_bias):
        out = linear_forward(q, k, v, scale, conv_weight, conv_bias, cu_seqlens, lengths, *maps)[0]
        return out[0] if packed else out, None
    weight, bias = of_heads(q, conv_weight, conv_bias)
    if not causal:
        out = linear_triton(q, k, v, scale, weight, bias, cu_seqlens, lengths, *maps)[0]
        return out[0] if packed else out, None
    entries = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else q.shape[0]
    kv, k_sum, count = (state.kv, state.k_sum, state.count) if state is not None else (None, None, None)
    count = torch.zeros(entries, dtype=torch.int64, device=q.device) if count is None else count
    kv = None if kv is None else kv.contiguous()
    k_sum = None if k_sum is None else k_sum.contiguous()
    out, kv, k_sum = causal_triton(q, k, v, scale, weight, bias, kv, k_sum, count, cu_seqlens, lengths, *maps)
    starts, ends = _bounds(v, lengths, cu_seqlens)
    kept = weight.shape[-1] - 1 if weight is not None else 0
    before = state.v_rows if state is not None else v.new_zeros(entries, kept, heads, size)
    if state is not None and weight is not None and kept:
        out = _add_past(out, before, weight, starts, v.shape[1] if cu_seqlens is None else None, cu_seqlens)
    new = LinearState(kv, k_sum, count + (ends - starts), _last_rows(v, before, starts, ends))
    return out[0] if packed else out, new


def _plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but this call sees its tensors, so that the way through torch's dispatcher can be left out."""
    if torch.compiler.is_compiling():
        return False
    given = [x for x in tensors if x is not None]
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return not learned and all(type(x) in (Tensor, torch.nn.Parameter) for x in given)


def _bounds(v: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first row of each entry among all B * L rows, and the one after its last that exists: (E,) int64."""
    if cu_seqlens is not None:
        return cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    starts = torch.arange(v.shape[0], device=v.device) * v.shape[1]
    return starts, starts + (v.shape[1] if lengths is None else lengths.long())


def _add_past(
    out: Tensor, before: Tensor, weight: Tensor, starts: Tensor, rows: int | None, cu_seqlens: Tensor | None
) -> Tensor:
    """out with what the convolution gives its first K - 1 rows from those before, (E, K - 1, H, D)."""
    kept = before.shape[1]
    nothing = before.new_zeros(before.shape, dtype=torch.float32)
    added = convolve_values(nothing, weight, causal=True, before=before.float())
    if rows is not None:
        first = min(rows, kept)
        head = (out[:, :first].float() + added[:, :first]).to(out.dtype)
        return torch.cat([head, out[:, first:]], dim=1)
    assert cu_seqlens is not None
    row = starts[:, None] + torch.arange(kept, device=out.device)
    inside = row < cu_seqlens[1:, None]
    added = torch.where(inside[..., None, None], added, 0.0).flatten(0, 1).to(out.dtype)
    row = torch.where(inside, row, 0).flatten()
    return out.index_add(1, row, added[None]) if out.shape[1] else out


def _last_rows(v: Tensor, before: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The last K - 1 rows of each entry's (before, v): (E, K - 1, H, D)."""
    kept = before.shape[1]
    if not kept or not v.shape[1]:
        return before
    row = ends[:, None] - kept + torch.arange(kept, device=v.device)
    of_v = v.flatten(0, 1)[row.clamp(0, v.shape[0] * v.shape[1] - 1)]
    past = (row - starts[:, None] + kept).clamp(0, kept - 1)
    of_past = torch.take_along_dim(before, past[..., None, None], dim=1)
    return torch.where((row >= starts[:, None])[..., None, None], of_v, of_past)
