"""What the forward and the backward of the 8-bit attention kernels in Triton do with a tile of numbers.

Shapes: a tile of ROWS queries and TOKENS keys.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_nvfp4_quant import e4m3_code


@triton.jit
def in_token_order(x, ROWS: tl.constexpr, TOKENS: tl.constexpr):
    """The columns of x (ROWS, TOKENS) in the order of ``token_order``; in an accumulator's layout nothing moves."""
    pairs = tl.reshape(x, (ROWS, TOKENS // 16, 2, 4, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2, 4)), (ROWS, TOKENS))


@triton.jit
def to_e4m3(x, HARDWARE: tl.constexpr):
    """E4M3 of float32 from 0 to 448, to nearest, half to even; the interpreter's own conversion rounds otherwise."""
    if HARDWARE:
        return x.to(tl.float8e4nv)
    return e4m3_code(x).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def load_values(v, token, channel, stride_l, stride_d, LENGTH, D, MASKED: tl.constexpr, PADDED: tl.constexpr):
    """(tokens, channels) of V in its dtype, 0 beyond its tokens (if MASKED) and channels (if PADDED)."""
    at = v + token.to(tl.int64)[:, None] * stride_l + channel[None, :] * stride_d
    if MASKED and PADDED:
        return tl.load(at, mask=(token < LENGTH)[:, None] & (channel < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=(token < LENGTH)[:, None], other=0.0)
    if PADDED:
        return tl.load(at, mask=(channel < D)[None, :], other=0.0)
    return tl.load(at)


def aot_cases() -> list[AotCase]:
    """None: these functions are compiled within the kernels that call them."""
    return []
