"""Causal linear attention by the Triton kernels, with the state of a stream before and after it.

Shapes as in ``triton_host.py``; N = H * (W * W + W) numbers of a state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.linear.triton_causal import (
    causal_keys_gradient_kernel,
    causal_output_kernel,
    causal_queries_gradient_kernel,
    scan_kernel,
)
from allears.ops.attention.linear.triton_host import (
    Call,
    Gradients,
    empty_parts,
    head_tile,
    padded_conv,
    parameter_gradients,
    part_states,
    plan,
    row_norms,
    stages,
)


class Sums(NamedTuple):
    """What a stream carries but for its rows of v: kv (E, H, D, D) and k_sum (E, H, D) in float32, or None for zeros,
    and count (E,) int64."""

    kv: Tensor | None
    k_sum: Tensor | None
    count: Tensor


def _padded(kv: Tensor | None, k_sum: Tensor | None, width: int) -> Tensor | None:
    """(E, N) as the kernels read a state."""
    if kv is None or k_sum is None:
        return None
    pad = width - kv.shape[-1]
    kv = torch.nn.functional.pad(kv.float(), (0, pad, 0, pad))
    k_sum = torch.nn.functional.pad(k_sum.float(), (0, pad))
    return torch.cat([kv.flatten(1), k_sum.flatten(1)], dim=1)


def _cut(state: Tensor, heads: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`_padded`, as new tensors."""
    kv, k_sum = state.split([heads * width * width, heads * width], dim=1)
    kv = kv.view(-1, heads, width, width)[..., :size, :size]
    return kv.clone(memory_format=torch.contiguous_format), k_sum.view(-1, heads, width)[..., :size].clone()


def _scan(parts: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """parts (E, P, N), and what is before them (behind, if reverse), to their running sums (E, P + 1, N)."""
    entries, count, size = parts.shape
    states = torch.empty(entries, count + 1, size, device=parts.device)
    block = 128
    if entries:
        scan_kernel[(-(-size // block), entries)](
            parts, initial, states, count, SIZE=size, REVERSE=reverse, STEP=16, BLOCK=block, num_warps=4
        )
    return states


def causal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    past: Sums,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention; arguments as ``linear_forward``, with L_q = L_k.

    Returns:
        out like q; kv (E, H, D, D) and k_sum (E, H, D) after the last key.
    """
    run = plan(q, call, head_tile(q.shape[3]))
    heads, size, width = q.shape[2], q.shape[3], run.tile.width
    q_norms, k_norms = row_norms(q, scale, call, run), row_norms(k, scale, call, run)
    parts = part_states(k, v, scale, k_norms, call, run)
    states = _scan(parts, _padded(past.kv, past.k_sum, width), reverse=False)
    conv, bias, taps = padded_conv(conv_weight, conv_bias, width)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        causal_output_kernel[run.grid](
            q,
            k,
            v,
            scale,
            q_norms,
            k_norms,
            states,
            past.count,
            conv,
            bias,
            call.cu,
            call.lengths,
            out,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            q.shape[1],
            q.shape[0] * q.shape[1],
            call.eps,
            TAPS=taps,
            **run.more,
        )
    return out, *_cut(states[:, -1], heads, width, size)


def causal_backward(
    d_out: Tensor,
    d_kv: Tensor | None,
    d_k_sum: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    with_bias: bool,
    past: Sums,
    call: Call,
) -> tuple[Gradients, Tensor, Tensor]:
    """Gradients of :func:`causal_forward`, those of the past kv and k_sum last; ``d_kv`` and ``d_k_sum`` are those of
    what it returned. The sums before each part are made again."""
    run = plan(q, call, head_tile(q.shape[3]))
    batch, rows, heads, size = q.shape
    width, total = run.tile.width, batch * rows
    q_norms, k_norms = row_norms(q, scale, call, run), row_norms(k, scale, call, run)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    weights = (torch.empty(total, heads, device=q.device), torch.empty(total, heads, device=q.device))
    of_scale = [empty_parts(run, heads, width, q, scale) for _ in range(2)]
    states = _scan(part_states(k, v, scale, k_norms, call, run), _padded(past.kv, past.k_sum, width), reverse=False)
    conv, _, taps = padded_conv(conv_weight, None, width)
    of_conv = empty_parts(run, heads, width, q, conv, taps)
    read = (q, k, v, d_out, scale, q_norms, k_norms)
    strides = (*q.stride(), *k.stride(), *v.stride(), *d_out.stride())
    for dots, stage in stages(run, total, q):
        causal_queries_gradient_kernel[run.grid](
            *read,
            dots,
            states,
            past.count,
            call.cu,
            call.lengths,
            d_q,
            *weights,
            of_scale[0],
            *strides,
            *d_q.stride(),
            rows,
            total,
            call.eps,
            DOTS=stage,
            **run.more,
        )
    parts = part_states(q, d_out, scale, q_norms, call, run, weights, past.count)
    d_states = _scan(parts, _padded(d_kv, d_k_sum, width), reverse=True)
    for dots, stage in stages(run, total, q):
        causal_keys_gradient_kernel[run.grid](
            *read,
            dots,
            *weights,
            d_states,
            past.count,
            conv,
            call.cu,
            call.lengths,
            d_k,
            d_v,
            of_scale[1],
            of_conv,
            *strides,
            *d_k.stride(),
            *d_v.stride(),
            rows,
            total,
            DOTS=stage,
            TAPS=taps,
            **run.more,
        )
    of_parameters = parameter_gradients(scale, of_scale, of_conv, d_out if with_bias else None, heads, size)
    return Gradients(d_q, d_k, d_v, *of_parameters), *_cut(d_states[:, 0], heads, width, size)
