"""What every low-bit reference asks of its inputs.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size.
"""

import math

import torch
from torch import Tensor

LARGEST_HEAD_SIZE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (B, L_q, H, D), k and v (B, L_k, G, D), of one dtype and device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or D is above 256.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(x.shape)} given; attention takes (B, L, H, D)")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: {x.dtype} given; take float16, bfloat16 or float32")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: {x.dtype} on {x.device} given beside q of {q.dtype} on {q.device}; give all three alike"
            )
    if k.shape != v.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} differs from k's {tuple(k.shape)}; both must be (B, L_k, G, D)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}; B and D must be equal")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} heads do not divide q's {q.shape[2]}; give q a multiple of k's heads")
    if not 1 <= q.shape[3] <= LARGEST_HEAD_SIZE:
        raise ValueError(f"q: head size {q.shape[3]} given; it must be 1 to {LARGEST_HEAD_SIZE}")


def softmax_scale(scale: float | None, head_size: int) -> float:
    """The factor on the logits: ``scale``, or ``1 / sqrt(D)`` for ``None``.

    Raises:
        ValueError: ``scale`` is not a positive finite number.
    """
    if scale is None:
        return 1 / math.sqrt(head_size)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale: {scale} given; it must be positive and finite, or None for 1 / sqrt(D)")
    return scale
