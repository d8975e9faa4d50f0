"""Attention with its tangent: an explicit call, and one for dual tensors of forward-mode differentiation.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size.
"""

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from allears.ops.attention.call import autocast_inputs, check_tensors, check_values
from allears.ops.attention.dense.reference import reference_attention
from allears.ops.attention.jvp.ops import attention_jvp_op
from allears.ops.attention.jvp.reference import attention_jvp_reference
from allears.ops.triton_here import interpreted, triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

LARGEST_HEAD_SIZE = 128
_DTYPES = (torch.bfloat16, torch.float32)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_q: Tensor | None,
    d_k: Tensor | None,
    d_v: Tensor | None,
    scale: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v and its derivative along the tangents, in one pass.

    Args:
        q: (B, L_q, H, D).
        k, v: (B, L_k, G, D), L_k at least 1.
        d_q, d_k, d_v: tangents shaped and typed as q, k and v; ``None`` stands for zeros, and costs nothing.
        scale: factor on the logits; ``None`` means D^-0.5.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.

    Returns:
        Output and tangent, (B, L_q, H, D), in the dtype of q. Only the reference can be differentiated once more.

    Raises:
        ValueError: shapes do not fit, there are no keys, or the named kernel cannot run the call.
    """
    check_values(q, k, v)
    check_tensors(q, k, v, None, packed=False)
    if k.shape[1] == 0:
        raise ValueError("k: 0 keys given; attention has a tangent only where there is at least one key")
    for name, x, tangent in (("d_q", q, d_q), ("d_k", k, d_k), ("d_v", v, d_v)):
        if tangent is not None and (tangent.shape != x.shape or tangent.dtype != x.dtype or tangent.device != x.device):
            raise ValueError(
                f"{name}: {tangent.dtype} {tuple(tangent.shape)} on {tangent.device} given; a tangent is like its "
                f"tensor, {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"kernel: {kernel!r} given; known are auto, {', '.join(KERNELS)}")
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    refused = "" if kernel == "reference" else _refuses_triton((q, k, v, d_q, d_k, d_v), kernel)
    if refused and kernel == "triton":
        raise ValueError(f"kernel: 'triton' cannot run this call: {refused}; or use kernel='auto'")
    if kernel == "reference" or refused:
        return attention_jvp_reference(q, k, v, d_q, d_k, d_v, factor)
    return attention_jvp_op(q, k, v, d_q, d_k, d_v, factor)


def _refuses_triton(tensors: tuple[Tensor | None, ...], kernel: str) -> str:
    given = [x for x in tensors if x is not None]
    q = given[0]
    if q.dtype not in _DTYPES:
        return f"takes bfloat16 and float32, {q.dtype} given (the products of tangents may leave float16's range)"
    if q.shape[-1] > LARGEST_HEAD_SIZE:
        return f"takes head sizes up to {LARGEST_HEAD_SIZE}; {q.shape[-1]} given"
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "it has no backward and gradients are asked for; call it under torch.no_grad()"
    if not q.is_cuda and (kernel == "auto" or torch.cuda.is_available()):
        return f"runs on CUDA GPUs; q is on {q.device}"
    if interpreted() and q.dtype == torch.bfloat16:
        return "Triton's interpreter takes bfloat16 for integers; give float32"
    return triton_missing()


def dual_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, kernel: str = "auto") -> Tensor:
    """Attention of dual tensors (``torch.func.jvp``, or ``torch.autograd.forward_ad``): the output is dual too.

    Args:
        q, k, v, scale, kernel: see :func:`attention_jvp`; at least one of q, k and v carries a tangent. Under autocast
            they are cast as attention casts them.

    Returns:
        (B, L_q, H, D).
    """
    q, k, v = autocast_inputs(q, k, v)
    (q, d_q), (k, d_k), (v, d_v) = (_unpack(x) for x in (q, k, v))
    out, d_out = attention_jvp(q, k, v, d_q, d_k, d_v, scale, kernel)
    return forward_ad.make_dual(out, d_out)


def _unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x and its tangent in the dtype of x: torch's fused norms give a 16-bit x a tangent of 32 bits on a GPU."""
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, None if tangent is None else tangent.to(primal.dtype)


def is_dual(*tensors: Tensor) -> bool:
    """Whether one of them carries a tangent of the current level of forward-mode differentiation."""
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


class DualAttention(TorchFunctionMode):
    """A block in which ``F.scaled_dot_product_attention`` of dual tensors runs :func:`dual_attention`.

    torch's own kernels have no forward mode (its CPU kernel raises), so that a model could not be given to
    ``torch.func.jvp``; inside the block it can, as it is. Calls with a mask, causal calls and other rare ones run as
    they are written, L_q x L_k at once. What does not go through torch's function (a kernel of another package, or one
    of ours that is named) is not seen; :func:`allears.diffusion.tangent.tangent_error` finds a tangent that was cut.

    >>> with DualAttention():
    ...     out, d_out = torch.func.jvp(model, (x, t), (d_x, d_t))
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """query (B, H, L_q, D), key and value (B, G, L_k, D) to (B, H, L_q, D)."""
        if not is_dual(query, key, value) and (attn_mask is None or not is_dual(attn_mask)):
            more = {"enable_gqa": True} if enable_gqa else {}
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more
            )
        if dropout_p:
            raise ValueError(f"dropout_p: {dropout_p} given; attention has no tangent under dropout: use eval()")
        shaped = query.dim() == 4 and key.dim() == 4 and query.shape[:1] == key.shape[:1]
        queries, keys, values = (x.transpose(-2, -3) for x in (query, key, value))
        if not shaped:
            raise ValueError(f"query: shape {tuple(query.shape)} given; a tangent is taken of (B, H, L, D)")
        if attn_mask is None and not is_causal:
            return dual_attention(queries, keys, values, scale).transpose(1, 2)
        if is_causal and query.shape[2] != key.shape[2]:
            raise ValueError("is_causal: L_q and L_k differ; give a mask that says how they are aligned")
        return reference_attention(queries, keys, values, attn_mask, is_causal, scale).transpose(1, 2)  # type: ignore
