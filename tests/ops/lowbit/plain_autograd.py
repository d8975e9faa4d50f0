"""The references with their own gradients as plain autograd functions: what the library's operators must equal."""

import torch

from allears.ops.attention.lowbit.fake_quant import quantised_backward, quantised_forward
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.sagebwd_reference import SageSaved, sagebwd_backward, sagebwd_forward


class SageBwd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, how):
        out, lse, saved = sagebwd_forward(q, k, v, **how)
        ctx.save_for_backward(*saved)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse):
        saved = SageSaved(*ctx.saved_tensors)
        d_out = torch.zeros_like(saved.out) if d_out is None else d_out
        return *sagebwd_backward(d_out, saved, d_lse=d_lse, **ctx.how), None


def sagebwd_attention(q, k, v, *, causal=False, scale=None, options=None):
    """Output and log-sum-exp of ``sagebwd_forward``, with ``sagebwd_backward`` as their gradient."""
    return SageBwd.apply(q, k, v, {"causal": causal, "scale": scale, "options": options})


class FakeQuantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, how):
        out, lse = quantised_forward(q, k, v, **how)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_lse):
        q, k, v, out, lse = ctx.saved_tensors
        d_out = torch.zeros_like(out) if d_out is None else d_out
        return *quantised_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **ctx.how), None


def fake_quantised_attention(q, k, v, *, numerics, causal=False, scale=None, options=None):
    """Output and log-sum-exp of ``quantised_forward``, with ``quantised_backward`` as their gradient."""
    how = {"numerics": numerics, "causal": causal, "scale": scale, "options": options or LowBit()}
    return FakeQuantised.apply(q, k, v, how)
