"""torch's scaled_dot_product_attention in our layout: all of it, or its cuDNN, flash or plain kernel by name.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size; T_q and T_k rows of S packed
sequences.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from allears.ops.attention.backend import Backend, Run
from allears.ops.attention.call import Facts, Packing, lacks_func
from allears.ops.attention.dense.flash import flash_cpu, flash_packed
from allears.ops.attention.dense.masks import sight, zero_blind
from allears.ops.attention.dense.packing import run_padded
from allears.ops.attention.spec import AttentionSpec
from allears.ops.constant import constant_in_graphs

HALF = (torch.float16, torch.bfloat16)


def _unit_stride(x: Tensor) -> Tensor:
    """The fused kernels want neighbours along D; any other stride is theirs to take."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _run_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, only: SDPBackend | None
) -> Tensor:
    mask, flag, blind = sight(mask, causal, q.shape[1], k.shape[1], q.dtype, q.device)
    if mask is not None and q.is_cuda and q.shape[2] != k.shape[2]:
        # torch's masked GPU kernels take equal heads only; without this it would fall to the plain kernel
        k, v = _equal_heads(q, k, v)
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}  # a branch: torch takes no symbolic bool
    queries, keys, values = (_unit_stride(x).transpose(1, 2) for x in (q, k, v))
    with nullcontext() if only is None else sdpa_kernel(only):
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=flag,
            scale=scale,
            **grouped,
        )
    return zero_blind(out, blind).transpose(1, 2)


def _equal_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2))


def _make(only: SDPBackend | None) -> Run:
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        return_lse: bool = False,
        **packing: Any,
    ) -> Tensor:
        if packing:
            out = run_padded(run, q, k, v, Packing(**packing), causal, scale, False)
            assert isinstance(out, Tensor)
            return out
        return _run_sdpa(q, k, v, mask, causal, scale, only)

    return run


sdpa_attention = _make(None)
cudnn_attention = _make(SDPBackend.CUDNN_ATTENTION)
math_attention = _make(SDPBackend.MATH)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    **packing: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """torch's flash kernel. On a GPU what its own function does not do (the log-sum-exp, packed sequences, causal with
    L_q < L_k) runs through the form for packed sequences.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if q.is_cuda:
        if packing or return_lse or (causal and q.shape[1] not in (1, k.shape[1])):
            return _flash_gpu(q, k, v, Packing(**packing) if packing else None, causal, scale, return_lse)
    elif packing:
        return run_padded(flash_attention, q, k, v, Packing(**packing), causal, scale, return_lse)
    elif return_lse:
        return _flash_cpu_lse(q, k, v, mask, causal, scale)
    return _run_sdpa(q, k, v, mask, causal, scale, SDPBackend.FLASH_ATTENTION)


def _flash_cpu_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    mask, flag, blind = sight(mask, causal, q.shape[1], k.shape[1], q.dtype, q.device)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    k, v = _equal_heads(q, k, v)
    out, lse = flash_cpu(_unit_stride(q), _unit_stride(k), _unit_stride(v), mask, flag, scale)
    if blind is None:
        return out, lse
    return zero_blind(out.transpose(1, 2), blind).transpose(1, 2), lse.masked_fill(blind[..., 0], -math.inf)


def _flash_gpu(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, causal: bool, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    shape = q.shape
    if packing is None:
        offsets = [
            torch.arange(0, (x.shape[0] + 1) * x.shape[1], x.shape[1], dtype=torch.int32, device=x.device)
            for x in (q, k)
        ]
        packing = Packing(offsets[0], offsets[1], q.shape[1], k.shape[1])
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    spare = -shape[-1] % 8
    q, k, v = (F.pad(x, (0, spare)) if spare else _unit_stride(x) for x in (q, k, v))
    out, lse = flash_packed(q, k, v, *packing, causal, scale)
    out = out[..., : shape[-1]].reshape(shape)
    if not return_lse:
        return out
    lse = lse.masked_fill(lse == math.inf, -math.inf)
    return out, lse if len(shape) == 3 else lse.unflatten(1, shape[:2]).transpose(0, 1)


@constant_in_graphs
def no_gpu() -> str:
    """Why no CUDA GPU can be used, or ``""``."""
    return "" if torch.cuda.is_available() else "no CUDA GPU answers"


def _empty(facts: Facts) -> str:
    return "there are no queries or no keys" if facts.empty else ""


def _without_lse(facts: Facts, spec: AttentionSpec) -> str:
    if facts.lse:
        return "torch's function does not return the log-sum-exp; sdpa-flash, flash-attn-4 and reference do"
    return _empty(facts)


def _refuses_gpu(facts: Facts) -> str:
    if facts.device != "cuda" or facts.capability is None:
        return f"runs on CUDA GPUs; the tensors are on {facts.device}"
    if facts.capability[0] < 8:
        return f"needs compute capability 8.0; this GPU has {facts.capability[0]}.{facts.capability[1]}"
    if facts.dtype not in HALF:
        return f"takes float16 and bfloat16, {facts.dtype} given; cast q, k and v"
    return ""


def _cudnn_refuses(facts: Facts, spec: AttentionSpec) -> str:
    reason = _refuses_gpu(facts) or _without_lse(facts, spec)
    if reason:
        return reason
    limit = 256 if facts.capability is not None and facts.capability[0] >= 9 and not facts.grad else 128
    if facts.head_dim > limit or facts.head_dim % 8:
        return f"takes head sizes that are multiples of 8 up to {limit} here; {facts.head_dim} given"
    if facts.mask == "learned":
        return "gives an added mask no gradient"
    return ""


def _flash_refuses(facts: Facts, spec: AttentionSpec) -> str:
    if facts.mask == "learned":
        return "gives an added mask no gradient"
    if facts.device == "cpu":
        return _empty(facts) or (lacks_func(facts) if facts.lse else "")
    ours = facts.lse or facts.packed or (facts.causal and not facts.square)
    reason = _refuses_gpu(facts) or _empty(facts) or (lacks_func(facts) if ours else "")
    if reason:
        return reason
    if facts.mask != "none":
        return "takes no mask on a GPU"
    if facts.blind:
        return "with more queries than keys, causal attention leaves the first queries without a key"
    if facts.head_dim > 256:
        return f"takes head sizes up to 256; {facts.head_dim} given"
    return ""


def sdpa_backends() -> tuple[Backend, ...]:
    return (
        Backend("sdpa", sdpa_attention, _without_lse),
        Backend("sdpa-flash", flash_attention, _flash_refuses, ragged=True),
        Backend("sdpa-cudnn", cudnn_attention, _cudnn_refuses, missing=no_gpu),
        Backend("sdpa-math", math_attention, _without_lse),
    )
