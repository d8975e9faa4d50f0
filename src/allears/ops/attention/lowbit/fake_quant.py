"""Quantisation-aware training: forward in nvfp4 or int8_fp8, gradients in 16 bit as if rounding were the identity.

Two forms of backward, with P = exp(S - lse) and dS = P * (dP - D):

* ``drop_in``: that of flash attention on the given q, k, v, with the log-sum-exp and the output of the low-bit forward
  (SLA2, arXiv 2602.12675, section on QAT). Neither do the rows of this P sum to 1 nor is D = rowsum(P * dP), which the
  derivative of a softmax needs: rows of dS do not sum to 0. In 4 bits this is reported to be unstable (Attn-QAT,
  arXiv 2603.00040).
* ``matched``: S and P from the same rounded values as in the forward, dP = dO V^^T, dV = P^^T dO with the rounded P
  and V, and D = rowsum(dO * O'), O' = P V^ with P not rounded. This is the exact derivative of O = round(P) V^ with
  every rounding replaced by the identity ("straight through"), smoothing included.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, R = H / G, D head size, N keys of a tile.
"""

from typing import Literal

import torch
from torch import Tensor

from allears.ops.attention.lowbit.fake_quant_backward import drop_in_backward, matched_backward
from allears.ops.attention.lowbit.int8_reference import int8_forward
from allears.ops.attention.lowbit.nvfp4_reference import four_bit_rounding, nvfp4_forward
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.rounding import INT8_FP8, Round, Rounding

FakeQuantised = Literal["nvfp4", "int8_fp8"]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounding):  # pyrefly: ignore
        return rounding(x).to(x.dtype)

    @staticmethod
    def backward(ctx, d_rounded):  # pyrefly: ignore
        return d_rounded, None


def straight_through(x: Tensor, rounding: Round) -> Tensor:
    """``rounding(x)`` in x's dtype, with the gradient of ``x``: a quantiser that trains (arXiv 1308.3432)."""
    return _StraightThrough.apply(x, rounding)


def rounding_of(numerics: FakeQuantised, options: LowBit) -> Rounding:
    """How ``numerics`` rounds.

    Raises:
        ValueError: ``numerics`` is not one of the two.
    """
    if numerics == "nvfp4":
        return four_bit_rounding(options.two_level_p)
    if numerics == "int8_fp8":
        return INT8_FP8
    raise ValueError(f"numerics: {numerics!r} given; fake-quantised training takes 'nvfp4' or 'int8_fp8'")


def quantised_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    numerics: FakeQuantised,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
) -> tuple[Tensor, Tensor]:
    """The inference forward of ``numerics``.

    Args:
        q: (B, L_q, H, D).
        k, v: (B, L_k, G, D).

    Returns:
        Output (B, L_q, H, D) and log-sum-exp (B, H, L_q).
    """
    rounding_of(numerics, options or LowBit())
    if numerics == "nvfp4":
        return nvfp4_forward(q, k, v, causal=causal, scale=scale, options=options)
    return int8_forward(q, k, v, pv="fp8", causal=causal, scale=scale, options=options)


def quantised_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    numerics: FakeQuantised,
    d_lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`quantised_forward` in the form that ``options.backward`` names.

    Args:
        d_out, q, out: (B, L_q, H, D).
        k, v: (B, L_k, G, D).
        lse, d_lse: (B, H, L_q), the log-sum-exp that forward returned, and its gradient.

    Returns:
        dQ (B, L_q, H, D), dK and dV (B, L_k, G, D).

    Raises:
        ValueError: ``options.backward`` is ``"none"``, or ``numerics`` has no such backward.
    """
    options = options or LowBit()
    rounding = rounding_of(numerics, options)
    if options.backward == "none":
        raise ValueError(
            f"backward: 'none' given, but {numerics} was asked for gradients; choose LowBit(backward='matched') or "
            "'drop_in', or run it under torch.no_grad()"
        )
    if options.backward == "drop_in":
        return drop_in_backward(d_out, q, k, v, out, lse, d_lse=d_lse, causal=causal, scale=scale)
    smooth_q = options.smooth_q if options.smooth_q is not None else numerics == "nvfp4"
    return matched_backward(
        d_out,
        q,
        k,
        v,
        lse,
        rounding,
        smooth_q=smooth_q,
        smooth_k=options.smooth_k,
        d_lse=d_lse,
        causal=causal,
        scale=scale,
    )
