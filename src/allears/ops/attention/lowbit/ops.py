"""Forward attention in 8 and 4 bits by GPU kernels, as ``torch.library`` operators without a gradient.

Each returns ``(out, lse)``, contiguous; an lse that was not asked for is empty. None of them waits for the GPU, so that
CUDA graphs can hold them once a first call has compiled the kernels.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size; packed T_q, T_k
rows of S sequences.
"""

import torch
from torch import Tensor

from allears.ops.attention.lowbit.options import LowBit


def like_output(q: Tensor, with_lse: bool = True) -> tuple[Tensor, Tensor]:
    """Empty (B, L_q, H, D) or (T_q, H, D) as q, and float32 (B, H, L_q) or (H, T_q), or (0,) without ``with_lse``."""
    sums = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32) if with_lse else no_sums(q)
    return q.new_empty(q.shape), sums


def no_sums(q: Tensor) -> Tensor:
    """What stands for an lse that was not asked for: float32 (0,)."""
    return q.new_empty(0, dtype=torch.float32)


def aligned_rows(x: Tensor) -> Tensor:
    """x where its last stride is 1 and every row begins at a multiple of 16 bytes, else a contiguous copy of it."""
    steps = (stride * x.element_size() for stride in x.stride()[:-1])
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("allears::int8_attention_hopper", mutates_args=())
def int8_attention_hopper(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, smooth_k: bool, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """int8_fp8 by the kernel for Hopper.

    Args:
        q: (B, L_q, H, D), float16 or bfloat16, D 64 or 128, any strides (what is not aligned is copied).
        k, v: (B, L_k, G, D).
        scale: factor on the logits.
        smooth_k: see :class:`LowBit`.
    """
    from allears.ops.attention.lowbit.hopper.host import attend, quantise_kv

    with torch.cuda.device_of(q):
        kv = quantise_kv(aligned_rows(k), aligned_rows(v), "fp8", smooth_k)
        made = attend(aligned_rows(q), kv, k.shape[1], "fp8", causal, scale, need_lse=return_lse, save_q=False)
    return made.out, made.lse if made.lse is not None else no_sums(q)


@int8_attention_hopper.register_fake
def _int8_hopper_fake(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, smooth_k: bool, return_lse: bool
) -> tuple[Tensor, Tensor]:
    return like_output(q, return_lse)


@torch.library.custom_op("allears::int8_attention_triton", mutates_args=())
def int8_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    fp8: bool,
    causal: bool,
    scale: float,
    smooth_k: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """int8_fp8 or, without ``fp8``, int8_fp16 by the Triton kernels.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D), any strides, float16, bfloat16 or float32, D up to 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1) of packed sequences.
        scale: factor on the logits.
        smooth_k: see :class:`LowBit`.
    """
    from allears.ops.attention.lowbit import triton_host

    with torch.cuda.device_of(q):
        out, lse = triton_host.int8_forward(
            q,
            k,
            v,
            pv="fp8" if fp8 else "fp16",
            causal=causal,
            scale=scale,
            options=LowBit(smooth_k=smooth_k),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            return_lse=return_lse,
        )
    return out, lse if lse is not None else no_sums(q)


@int8_attention_triton.register_fake
def _int8_triton_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    fp8: bool,
    causal: bool,
    scale: float,
    smooth_k: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    return like_output(q, return_lse)


@torch.library.custom_op("allears::nvfp4_attention_triton", mutates_args=())
def nvfp4_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool,
    two_level_p: bool,
) -> tuple[Tensor, Tensor]:
    """nvfp4 by the Triton kernel for chips with FP4 products: q (B, L_q, H, D), float16 or bfloat16, D up to 128, k and
    v (B, L_k, G, D), any strides; the switches are those of :class:`LowBit`.
    """
    from allears.ops.attention.lowbit.triton_nvfp4 import nvfp4_forward_triton

    options = LowBit(smooth_k=smooth_k, smooth_q=smooth_q, two_level_p=two_level_p)
    with torch.cuda.device_of(q):
        return nvfp4_forward_triton(q, k, v, causal=causal, scale=scale, options=options)


@nvfp4_attention_triton.register_fake
def _nvfp4_triton_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    smooth_k: bool,
    smooth_q: bool,
    two_level_p: bool,
) -> tuple[Tensor, Tensor]:
    return like_output(q)
