"""The references of int8_fp8, int8_fp16 and nvfp4 as one ``torch.library`` operator, on any device.

Its gradient is that of fake-quantised training (``fake_quant.py``), in the form that ``backward`` names. Autocast is
off inside: what is float32 there stays float32. Packed sequences run one by one, which waits for the GPU.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size; packed T_q, T_k
rows of S sequences.
"""

from typing import Any, cast

import torch
from torch import Tensor

from allears.ops.attention.lowbit.fake_quant import FakeQuantised, quantised_backward, quantised_forward
from allears.ops.attention.lowbit.int8_reference import int8_forward
from allears.ops.attention.lowbit.ops import like_output
from allears.ops.attention.lowbit.options import Backward, LowBit
from allears.ops.attention.lowbit.varlen import backward_over_sequences, over_sequences


def without_autocast(x: Tensor) -> torch.autocast:
    """Autocast off on the device of x."""
    return torch.autocast(x.device.type, enabled=False)


def _options(smooth_k: bool, smooth_q: bool | None, two_level_p: bool, backward: str) -> LowBit:
    form = cast(Backward, backward)
    return LowBit(smooth_k=smooth_k, smooth_q=smooth_q, two_level_p=two_level_p, backward=form)


@torch.library.custom_op("allears::lowbit_attention_reference", mutates_args=())
def lowbit_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    numerics: str,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool | None,
    two_level_p: bool,
    backward: str,
) -> tuple[Tensor, Tensor]:
    """Attention in ``numerics`` with its log-sum-exp; int8_fp8 and nvfp4 train unless ``backward`` is ``"none"``.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D); float16, bfloat16 or float32, D up to 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1) of packed sequences.
        scale: factor on the logits.
        smooth_k, smooth_q, two_level_p, backward: see :class:`LowBit`.

    Returns:
        Output like q and the log-sum-exp, float32 (B, H, L_q) or (H, T_q), both contiguous.
    """
    how: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "options": _options(smooth_k, smooth_q, two_level_p, backward),
    }

    def one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if numerics == "int8_fp16":
            return int8_forward(q, k, v, pv="fp16", **how)
        return quantised_forward(q, k, v, numerics=cast(FakeQuantised, numerics), **how)

    with without_autocast(q):
        if cu_seqlens_q is None or cu_seqlens_k is None:
            out, lse = one(q, k, v)
        else:
            out, lse = over_sequences(one, q, k, v, cu_seqlens_q, cu_seqlens_k)
    return out.contiguous(), lse.contiguous()


@lowbit_attention_reference.register_fake
def _reference_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return like_output(q)


@torch.library.custom_op("allears::lowbit_attention_reference_backward", mutates_args=())
def lowbit_attention_reference_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    numerics: str,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool | None,
    two_level_p: bool,
    backward: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`lowbit_attention_reference` like q, k and v, contiguous.

    Args:
        d_out, d_lse: gradients of its results; ``d_lse`` may be None.
        out, lse: what it returned; the rest is what it was given.
    """
    how: dict[str, Any] = {
        "numerics": numerics,
        "causal": causal,
        "scale": scale,
        "options": _options(smooth_k, smooth_q, two_level_p, backward),
    }

    def one(q: Tensor, d_out: Tensor, out: Tensor, k: Tensor, v: Tensor, lse: Tensor, d_lse: Tensor | None):
        return quantised_backward(d_out, q, k, v, out, lse, d_lse=d_lse, **how)

    with without_autocast(q):
        if cu_seqlens_q is None or cu_seqlens_k is None:
            d_q, d_k, d_v = one(q, d_out, out, k, v, lse, d_lse)
        else:
            d_q, d_k, d_v = backward_over_sequences(
                one, (q, d_out, out), (k, v), (lse, d_lse), cu_seqlens_q, cu_seqlens_k
            )
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


@lowbit_attention_reference_backward.register_fake
def _reference_backward_fake(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.rest = inputs[5:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *given, out, lse = ctx.saved_tensors
    nothing = (None,) * (2 + len(ctx.rest))
    if d_out is None and d_lse is None:
        return None, None, None, *nothing
    d_out = torch.zeros_like(out) if d_out is None else d_out
    return *lowbit_attention_reference_backward(d_out, d_lse, out, lse, *given, *ctx.rest), *nothing


lowbit_attention_reference.register_autograd(_gradient, setup_context=_keep)
