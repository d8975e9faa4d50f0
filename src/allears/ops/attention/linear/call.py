"""The door of linear attention. A caller who names a kernel gets that one or an error, never another one.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, K taps of the convolution of V; packed T rows of S
sequences.
"""

from functools import cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from allears.ops.attention.call import autocast_inputs, func_differentiates
from allears.ops.attention.dispatch import Choice
from allears.ops.attention.linear.check import check_call
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.reference import linear_attention_reference
from allears.ops.attention.linear.state import LinearState
from allears.ops.constant import constant_in_graphs
from allears.ops.triton_here import triton_missing

KERNELS = ("triton", "reference")
"""In the order in which ``kernel="auto"`` tries them."""

_PLAIN = LinearOptions()
_LARGEST_TRITON_HEAD = 128


class _Facts(NamedTuple):
    """What decides whether a kernel runs a call."""

    kernel: str
    device: str
    dtype: torch.dtype
    head_dim: int
    packed: bool
    func: bool


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions | None = None,
    *,
    scale: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    causal: bool = False,
    state: LinearState | None = None,
    return_state: Literal[False] = False,
    kernel: str = "auto",
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions | None = None,
    *,
    scale: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    causal: bool = False,
    state: LinearState | None = None,
    return_state: Literal[True],
    kernel: str = "auto",
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, LinearState]: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions | None = None,
    *,
    scale: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    causal: bool = False,
    state: LinearState | None = None,
    return_state: bool = False,
    kernel: str = "auto",
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention in time and memory that grow with the length: the softmax's exponential becomes phi(q) . phi(k).

    out_i = phi(q_i) . mean_j(phi(k_j)^T v_j) / (phi(q_i) . mean_j phi(k_j) + eps) + (convolution of v)_i, with the
    means over all keys, or if causal over those up to i (Katharopoulos et al., 2020; the focused map and the
    convolution: Han et al., FLatten Transformer, ICCV 2023). All sums are in float32, or float64 for float64.

    Args:
        q: (B, L_q, H, D), or with ``cu_seqlens`` the packed (T, H, D): all rows of S sequences behind one another.
        k, v: (B, L_k, H, D), or packed (T, H, D). L_k may differ from L_q unless causal, packed or convolved.
        options: feature map and its power, norm and epsilon.
        scale: (H, D), positive: divides the rectified queries and keys of the focused map. Whether it is positive is
            not checked.
        conv_weight: (D, K), shared by the heads, or (H, D, K): depthwise convolution of v, added to the output. K is
            odd and centred, or if causal any and over the last K rows.
        conv_bias: (D,) or (H, D), added to the convolution.
        causal: position i sees those up to i.
        state: causal only: what the call before returned; the stream goes on from there.
        return_state: causal only: also return the state after the last row that exists. Parts of any lengths give
            what the whole stream gives.
        kernel: ``"auto"``, ``"triton"`` or ``"reference"``; a named one runs or raises with its reason.
        lengths: (B,) int, how many rows of k and v exist; what stands behind them is not read (queries there are
            computed like others, and of no use).
        cu_seqlens: (S + 1,) int offsets of packed sequences; sequence s owns rows cu[s] to cu[s + 1]. B of the state
            is S then.

    Returns:
        The output, shaped as q, in its dtype (under autocast in autocast's); with ``return_state`` the pair (output,
        state). Differentiable in q, k, v, scale, conv_weight, conv_bias and the state's tensors. A query without keys
        gives 0 before the convolution. Inputs are never changed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the named kernel cannot run the call.
    """
    options = options or _PLAIN
    q, k, v = autocast_inputs(q, k, v)
    more: dict[str, Any] = {"scale": scale, "conv_weight": conv_weight, "conv_bias": conv_bias, "causal": causal}
    more |= {"state": state, "lengths": lengths, "cu_seqlens": cu_seqlens}
    check_call(q, k, v, options, **more)
    if return_state and not causal:
        raise ValueError("return_state: True given without causal=True; only causal attention has a state")
    run = _runner(_choose(_facts(q, k, v, kernel, cu_seqlens)).kernel)
    out, new = run(q, k, v, options, **more)
    return (out, new) if return_state else out


def explain_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: LinearOptions | None = None,
    *,
    scale: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    causal: bool = False,
    state: LinearState | None = None,
    return_state: bool = False,
    kernel: str = "auto",
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Choice:
    """Which kernel :func:`linear_attention` would run for the same arguments, and why not each other one."""
    q, k, v = autocast_inputs(q, k, v)
    check_call(
        q,
        k,
        v,
        options or _PLAIN,
        scale=scale,
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        causal=causal,
        state=state,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
    )
    return _choose(_facts(q, k, v, kernel, cu_seqlens))


def _facts(q: Tensor, k: Tensor, v: Tensor, kernel: str, cu_seqlens: Tensor | None) -> _Facts:
    func = torch.is_grad_enabled() and func_differentiates(q, k, v)
    return _Facts(kernel, q.device.type, q.dtype, q.shape[-1], cu_seqlens is not None, func)


def _choose(facts: _Facts) -> Choice:
    if facts.kernel != "auto" and facts.kernel not in KERNELS:
        raise ValueError(f"kernel: {facts.kernel!r} given; known are auto, {', '.join(KERNELS)}")
    reasons = {"triton": _refuses_triton(facts), "reference": _refuses_reference(facts)}
    able = [name for name in KERNELS if not reasons[name]]
    refused = {name: reason for name, reason in reasons.items() if reason}
    if facts.kernel in refused:
        raise ValueError(
            f"kernel: {facts.kernel!r} cannot run this call: {refused[facts.kernel]}; or use kernel='auto'"
        )
    if not able:
        raise ValueError("linear_attention: no kernel can run this call: " + _listed(refused))
    chosen = able[0] if facts.kernel == "auto" else facts.kernel
    return Choice(chosen, refused, tuple(name for name in able if name != chosen))


def _listed(refused: dict[str, str]) -> str:
    return "; ".join([f"{name}: {reason}" for name, reason in refused.items()])


def _runner(kernel: str) -> Any:
    if kernel == "reference":
        return linear_attention_reference
    from allears.ops.attention.linear.triton_run import linear_attention_triton

    return linear_attention_triton


@constant_in_graphs
def _missing(device: str) -> str:
    """Why Triton's kernels cannot run beside tensors on such a device, or ``""``."""
    return _missing_beside_gpu() if device == "cuda" else triton_missing()


@cache
def _missing_beside_gpu() -> str:
    """Where there are tensors on a GPU it answers: the search for the package, 30 us, is made once."""
    return triton_missing()


def _refuses_triton(facts: _Facts) -> str:
    missing = _missing(facts.device)
    if missing:
        return missing
    if facts.device != "cuda":
        if torch.cuda.is_available():
            return f"runs on CUDA GPUs; the tensors are on {facts.device}"
        if facts.kernel == "auto":
            return "Triton interprets its kernels here, which is slow: only kernel='triton' asks for it"
    if facts.dtype == torch.float64:
        return "takes float16, bfloat16 and float32, float64 given"
    if facts.head_dim > _LARGEST_TRITON_HEAD:
        return f"takes head sizes up to {_LARGEST_TRITON_HEAD}; {facts.head_dim} given"
    if facts.func:
        return "torch.func has no gradient of its operators; use backward() or torch.autograd.grad"
    return ""


def _refuses_reference(facts: _Facts) -> str:
    if facts.packed and torch.compiler.is_compiling():
        return "torch.compile cannot read cu_seqlens, over which it loops; pad the sequences and give lengths"
    return ""
