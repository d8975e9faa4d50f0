"""flash-attn-4 (FlashAttention-4 in the CuTe DSL) where its package is installed, for Hopper and Blackwell.

Its kernels are built at the first call of a shape class, which takes seconds. Eager calls go through its public
functions, which differentiate; torch.compile sees the operator ``allears::flash_attention_4``, which is the forward
alone, so that a traced call that needs gradients is refused.

Shapes: B batch, L_q queries, L_k keys, H and G heads, D head size; T_q and T_k rows of packed sequences.
"""

import importlib.util
import math
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.backend import Backend
from allears.ops.attention.call import Facts, lacks_func
from allears.ops.attention.dense.sdpa import HALF, no_gpu
from allears.ops.attention.spec import AttentionSpec
from allears.ops.constant import constant_in_graphs


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    package = import_module("flash_attn.cute")
    common: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "return_lse": True}
    if cu_seqlens_q is None:
        return package.flash_attn_func(q, k, v, **common)
    return package.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        **common,
    )


@torch.library.custom_op("allears::flash_attention_4", mutates_args=(), device_types="cuda")
def flash_attention_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q (B, L_q, H, D), k and v (B, L_k, G, D), or packed (T, heads, D) with offsets, D a multiple of 8.

    Returns the output and the log-sum-exp, (B, H, L_q) or (H, T_q). No gradient.
    """
    out, lse = _call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    return out.contiguous(), lse.contiguous()


@flash_attention_4.register_fake
def _flash_attention_4_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


def flash4_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Head sizes that are no multiple of 8 are padded with zeros, which is exact."""
    size = q.shape[-1]
    scale = 1 / math.sqrt(size) if scale is None else scale
    spare = -size % 8
    if spare:
        q, k, v = (F.pad(x, (0, spare)) for x in (q, k, v))
    run = flash_attention_4 if torch.compiler.is_compiling() else _call
    out, lse = run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    out = out[..., :size] if spare else out
    return (out, lse.masked_fill(lse == math.inf, -math.inf)) if return_lse else out


@constant_in_graphs
def _missing() -> str:
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except (ImportError, ValueError):
        found = False
    wheels = "[cu13]" if (torch.version.cuda or "").startswith("13.") else ""
    return no_gpu() or ("" if found else f"the package is not installed: pip install 'flash-attn-4{wheels}'")


def _refuses(facts: Facts, spec: AttentionSpec) -> str:
    if facts.device != "cuda" or facts.capability is None:
        return f"runs on CUDA GPUs; the tensors are on {facts.device}"
    if facts.capability[0] not in (9, 10):
        found = ".".join(map(str, facts.capability))
        return f"is built for compute capability 9.0 and 10.x; this GPU has {found}"
    if facts.dtype not in HALF:
        return f"takes float16 and bfloat16, {facts.dtype} given; cast q, k and v"
    if facts.mask != "none":
        return "takes no mask"
    if facts.empty:
        return "there are no queries or no keys"
    if facts.blind:
        return "with more queries than keys, causal attention leaves the first queries without a key"
    limit = 256 if facts.capability[0] == 9 and not facts.grad else 128
    if facts.head_dim > limit:
        return f"takes head sizes up to {limit} here; {facts.head_dim} given"
    if facts.tracing and facts.grad:
        return "its backward cannot be traced by torch.compile; call it outside the compiled function"
    return lacks_func(facts)


def flash4_backends() -> tuple[Backend, ...]:
    return (Backend("flash-attn-4", flash4_attention, _refuses, missing=_missing, ragged=True),)
