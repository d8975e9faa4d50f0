"""What causal linear attention carries from one part of a stream to the next. A value: a call returns a new one.

Shapes: B batch (or packed sequences), H heads, D head size, K taps of the convolution of V.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LinearState(NamedTuple):
    """The past of a stream, of a size that does not grow.

    Args:
        kv: (B, H, D, D), sum of phi(k)^T v over the keys so far; the first D is that of the keys. float32, or float64
            for float64.
        k_sum: (B, H, D), sum of phi(k), of the same dtype.
        count: (B,) int64, how many keys there were.
        v_rows: (B, K - 1, H, D), the last rows of v, zeros before the beginning; K = 1 where there is no convolution.
    """

    kv: Tensor
    k_sum: Tensor
    count: Tensor
    v_rows: Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the sums are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_state(v: Tensor, batch: int, taps: int = 1) -> LinearState:
    """The state before the first row of ``batch`` streams whose values have the heads, dtype and device of v.

    Args:
        v: (..., H, D).
        batch: B.
        taps: K of the convolution, 1 for none.
    """
    heads, size = v.shape[-2:]
    wide = wide_dtype(v.dtype)
    return LinearState(
        kv=v.new_zeros(batch, heads, size, size, dtype=wide),
        k_sum=v.new_zeros(batch, heads, size, dtype=wide),
        count=v.new_zeros(batch, dtype=torch.int64),
        v_rows=v.new_zeros(batch, taps - 1, heads, size),
    )


def check_state(state: LinearState, v: Tensor, batch: int, taps: int) -> None:
    """Raise ValueError unless the state is one that :func:`new_state` could have begun; arguments as there."""
    heads, size, wide = v.shape[-2], v.shape[-1], wide_dtype(v.dtype)
    wanted = (
        ((batch, heads, size, size), wide),
        ((batch, heads, size), wide),
        ((batch,), torch.int64),
        ((batch, taps - 1, heads, size), v.dtype),
    )
    if not isinstance(state, LinearState):
        raise ValueError(f"state: {type(state).__name__} given; give the LinearState of the call before, or None")
    for name, given, (shape, dtype) in zip(LinearState._fields, state, wanted, strict=True):
        if tuple(given.shape) != shape or given.dtype != dtype:
            raise ValueError(
                f"state: its {name} is {given.dtype} {tuple(given.shape)}; for {batch} streams of {heads} heads of "
                f"{size} in {v.dtype} and {taps} taps of convolution it must be {dtype} {shape}: give the state that a "
                f"call with the same kind of input returned, or None at the beginning"
            )
        if given.device != v.device:
            raise ValueError(f"state: its {name} is on {given.device}, v on {v.device}; move it there")
