"""What the forward and the backward of the 8-bit attention kernels in Triton do with a tile of numbers, and its order.

Shapes: a tile of ROWS queries and TOKENS keys; B batch, G key heads, DP head size, padded, N blocks of 128 keys.
"""

import triton
import triton.language as tl

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.lowbit.quantise import KEY_BLOCK
from allears.ops.attention.lowbit.triton_nvfp4_quant import e4m3_code
from allears.ops.attention.lowbit.triton_quant import largest, scale_of, token_order


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


@triton.jit
def load_16(x, row, channel, stride_l, stride_d, LENGTH, D, PADDED: tl.constexpr):
    """(rows, channels) in the dtype of x, 0 beyond LENGTH and (if PADDED) D."""
    at = x + row.to(tl.int64)[:, None] * stride_l + channel[None, :] * stride_d
    if PADDED:
        return tl.load(at, mask=(row < LENGTH)[:, None] & (channel < D)[None, :], other=0.0)
    return tl.load(at, mask=(row < LENGTH)[:, None], other=0.0)


@triton.jit
def row_scales(amax, ROWS: tl.constexpr, SHARED: tl.constexpr, HARDWARE: tl.constexpr):
    """INT8 scales of rows with the given largest magnitudes; SHARED rows in succession have one."""
    if SHARED > 1:
        of_tile = largest(tl.reshape(amax, (ROWS // SHARED, SHARED)), 1, HARDWARE)
        amax = tl.reshape(tl.broadcast_to(of_tile[:, None], (ROWS // SHARED, SHARED)), (ROWS,))
    return scale_of(amax, 127.0)


@triton.jit
def transpose_keys_kernel(k8, k8t, N, BLOCK: tl.constexpr, DP: tl.constexpr):
    """k8 (B, G, N * 128, DP) -> k8t (B, G, DP, N * 128), in the order of ``token_order``."""
    block = tl.program_id(0) % N
    head = (tl.program_id(0) // N).to(tl.int64)
    position = tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    at = k8 + (head * N + block) * (BLOCK * DP) + token_order(position)[:, None] * DP + channel[None, :]
    to = k8t + (head * DP + channel[:, None]) * (N * BLOCK) + block * BLOCK + position[None, :]
    tl.store(to, tl.trans(tl.load(at)))


def aot_cases() -> list[AotCase]:
    """The kernel; the functions above are compiled within those that call them."""
    return [
        AotCase(
            "transpose_keys",
            transpose_keys_kernel,
            {"k8": "*i8", "k8t": "*i8", "N": "i32"},
            {"BLOCK": KEY_BLOCK, "DP": 128},
            dict.fromkeys(CAPABILITIES, ()),
            num_warps=4,
            aligned=("k8", "k8t"),
        )
    ]
