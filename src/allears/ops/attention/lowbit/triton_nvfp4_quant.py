"""NVFP4 quantisers in Triton: E2M1 codes, two a byte, and an E4M3 scale for each group of 16 (SageAttention3, arXiv
2505.11594, section 3). They follow ``nvfp4.py`` bit for bit.

Rows (q and k) are grouped along the head size; v is transposed and grouped along its tokens, as the second product sums
over tokens. Smoothing is fused: q loses the mean of its block of 128 rows, k the mean that the caller gives. The
arithmetic is plain float32 and integer work, so that these kernels need no FP4 instruction.

Shapes: B batch, L tokens, H heads, D head size; DP = 64 or 128, D padded; LP = L padded to a multiple of 128;
M = LP / 128 blocks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.lowbit.nvfp4 import NVFP4_GROUP
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK

LARGEST_HEAD_SIZE = 128
STEP_TOKENS = 64  # that a program holds at once: with 128, registers are spilled


@triton.jit
def e4m3_code(x):
    """E4M3 bits (int32) of x >= 0 in float32: to nearest, ties to even, at most 448 (126); NaN (127) if not finite."""
    bounded = tl.minimum(x, 448.0)
    bits = bounded.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    # At 2^14 neighbouring floats are 2^-9 apart, E4M3's step below 2^-6, so the sum is rounded to that step.
    small = (bounded + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(bounded < 0.015625, small, normal)
    return tl.where(x < float("inf"), code, 127)


@triton.jit
def e4m3_value(code):
    """float32 value of E4M3 bits 0 to 127 (127: NaN)."""
    normal = ((code + 960) << 20).to(tl.float32, bitcast=True)
    value = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    return tl.where(code == 127, float("nan"), value)


@triton.jit
def e2m1_code(x, unit):
    """E2M1 bits (int32, 0 to 15) of x / unit in float32: to nearest, ties to even, at most 6; 0 where unit is infinite.

    The halves between E2M1's values, times an E4M3 unit, are exact in float32, so that comparing x with them gives what
    rounding the quotient gives, without a division.
    """
    size = tl.abs(x)
    code = (size > 0.25 * unit).to(tl.int32) + (size >= 0.75 * unit).to(tl.int32) + (size > 1.25 * unit).to(tl.int32)
    code += (size >= 1.75 * unit).to(tl.int32) + (size > 2.5 * unit).to(tl.int32) + (size >= 3.5 * unit).to(tl.int32)
    code += (size > 5.0 * unit).to(tl.int32)
    return code | tl.where((x < 0.0) & (unit < float("inf")), 8, 0)


@triton.jit
def pack_pairs(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) codes -> (ROWS, COLUMNS / 2) bytes; the first of two lies in the lower half."""
    low, high = tl.split(tl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def quantise_groups(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 (ROWS, COLUMNS), grouped along COLUMNS -> bytes (ROWS, COLUMNS / 2), E4M3 bits (ROWS, COLUMNS / 16)."""
    groups = tl.reshape(x, (ROWS, COLUMNS // 16, 16))
    # As integers, the bits of sizes are in the order of the sizes, with NaN above infinity: this maximum sees a NaN.
    bits = tl.max(tl.abs(groups).to(tl.int32, bitcast=True), axis=2)
    largest = bits.to(tl.float32, bitcast=True)
    scale_code = e4m3_code(tl.div_rn(largest, 6.0))
    scale = e4m3_value(scale_code)
    unit = tl.where(scale > 0.0, scale, float("inf"))  # a scale that is 0 or NaN has codes 0
    codes = e2m1_code(groups, unit[:, :, None])
    return pack_pairs(tl.reshape(codes, (ROWS, COLUMNS)), ROWS, COLUMNS), scale_code.to(tl.uint8)


@triton.jit
def _load_rows(x, rows, columns, stride_l, stride_d, L, D):
    """float32 (rows, columns), 0 beyond L and D, and where it is inside."""
    inside = (rows < L)[:, None] & (columns < D)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride_l + columns[None, :] * stride_d
    return tl.load(at, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def quantise_rows_kernel(
    x,
    mean,
    codes,
    scales,
    block_mean,
    shift,
    stride_b,
    stride_l,
    stride_h,
    stride_d,
    mean_stride_b,
    mean_stride_h,
    L,
    H,
    D,
    BLOCKS,
    HEADS_A_MEAN,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DP: tl.constexpr,
    CENTRE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """128 tokens of one head. CENTRE: "none"; "given" subtracts mean (B, G, D); "block" subtracts the mean of the
    tokens and stores it in block_mean (B, H, M, DP). SHIFT stores x . mean in shift (B, H, L).
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    columns = tl.arange(0, DP)
    x += b * stride_b + h * stride_h
    given = tl.zeros((DP,), tl.float32)
    if CENTRE == "given" or SHIFT:
        at_mean = mean + b * mean_stride_b + (h // HEADS_A_MEAN) * mean_stride_h + columns
        given = tl.load(at_mean, mask=columns < D, other=0.0)
    centre = given
    if CENTRE == "block":
        total = tl.zeros((DP,), tl.float32)
        for part in range(ROWS // STEP):
            rows = block * ROWS + part * STEP + tl.arange(0, STEP)
            values, inside = _load_rows(x, rows, columns, stride_l, stride_d, L, D)
            total += tl.sum(values, axis=0)
        count = tl.minimum(L - block * ROWS, ROWS).to(tl.float32)
        centre = tl.div_rn(total, tl.full((DP,), 1.0, tl.float32) * count)
        tl.store(block_mean + (head * BLOCKS + block) * DP + columns, centre)
    for part in range(ROWS // STEP):
        rows = block * ROWS + part * STEP + tl.arange(0, STEP)
        values, inside = _load_rows(x, rows, columns, stride_l, stride_d, L, D)
        if SHIFT:
            tl.store(shift + head * L + rows, tl.sum(values * given[None, :], axis=1), mask=rows < L)
        if CENTRE != "none":
            values = tl.where(inside, values - centre[None, :], 0.0)
        packed, scale = quantise_groups(values, STEP, DP)
        first = head * BLOCKS * ROWS + rows
        tl.store(codes + first[:, None] * (DP // 2) + tl.arange(0, DP // 2)[None, :], packed)
        tl.store(scales + first[:, None] * (DP // 16) + tl.arange(0, DP // 16)[None, :], scale)


@triton.jit
def quantise_columns_kernel(
    x,
    codes,
    scales,
    stride_b,
    stride_l,
    stride_h,
    stride_d,
    L,
    H,
    D,
    TILES,
    TOKENS: tl.constexpr,
    DP: tl.constexpr,
):
    """TOKENS tokens of one head, transposed: codes (B, H, DP, LP / 2), scales (B, H, DP, LP / 16)."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // H, head % H
    tokens = tile * TOKENS + tl.arange(0, TOKENS)
    columns = tl.arange(0, DP)
    values, _ = _load_rows(x + b * stride_b + h * stride_h, tokens, columns, stride_l, stride_d, L, D)
    packed, scale = quantise_groups(tl.trans(values), DP, TOKENS)
    first = (head * DP + columns)[:, None] * TILES + tile
    tl.store(codes + first * (TOKENS // 2) + tl.arange(0, TOKENS // 2)[None, :], packed)
    tl.store(scales + first * (TOKENS // 16) + tl.arange(0, TOKENS // 16)[None, :], scale)


@dataclass(frozen=True)
class Nvfp4Rows:
    """``codes`` (B, H, LP, DP / 2) uint8, ``scales`` (B, H, LP, DP / 16) float8_e4m3fn; ``block_mean`` (B, H, M, DP)
    float32 if it was taken off, ``shift`` (B, H, L) float32 = x . mean if it was asked for. Padding is zero.
    """

    codes: Tensor
    scales: Tensor
    block_mean: Tensor | None
    shift: Tensor | None


def padded_head_size(head_size: int) -> int:
    """64 or 128: the head sizes that the kernels know; zeros appended to q, k and v change nothing."""
    if not 1 <= head_size <= LARGEST_HEAD_SIZE:
        raise ValueError(f"x: head size {head_size} given; the NVFP4 kernels take 1 to {LARGEST_HEAD_SIZE}")
    return 64 if head_size <= 64 else 128


def quantise_rows(
    x: Tensor, mean: Tensor | None = None, subtract_block_mean: bool = False, with_shift: bool = False
) -> Nvfp4Rows:
    """NVFP4 of x (B, L, H, D), any strides, grouped by 16 along D.

    Args:
        mean: (B, G, D) float32, H a multiple of G; subtracted, unless ``with_shift`` only asks for x . mean.
        subtract_block_mean: subtract the mean of each 128 tokens (of the tokens that are there, in the last block).
        with_shift: store x . mean, and do not subtract ``mean``.
    """
    batch, length, heads, size = x.shape
    padded = padded_head_size(size)
    blocks = triton.cdiv(length, QUERY_BLOCK)
    rows = (batch, heads, blocks * QUERY_BLOCK)
    codes = torch.empty(*rows, padded // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*rows, padded // NVFP4_GROUP, dtype=torch.uint8, device=x.device)
    block_mean = torch.empty(batch, heads, blocks, padded, device=x.device) if subtract_block_mean else None
    shift = torch.empty(batch, heads, length, device=x.device) if with_shift else None
    if mean is not None:
        mean = mean.float().contiguous()
    centre = "block" if subtract_block_mean else "none" if mean is None or with_shift else "given"
    quantise_rows_kernel[(blocks, batch * heads)](
        x,
        mean,
        codes,
        scales,
        block_mean,
        shift,
        *x.stride(),
        mean.stride(0) if mean is not None else 0,
        mean.stride(1) if mean is not None else 0,
        length,
        heads,
        size,
        blocks,
        heads // mean.shape[1] if mean is not None else 1,
        ROWS=QUERY_BLOCK,
        STEP=STEP_TOKENS,
        DP=padded,
        CENTRE=centre,
        SHIFT=with_shift,
        num_warps=8,
    )
    return Nvfp4Rows(codes, scales.view(torch.float8_e4m3fn), block_mean, shift)


def quantise_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 of x (B, L, H, D), any strides, transposed and grouped by 16 along L: codes (B, H, DP, LP / 2) uint8 and
    scales (B, H, DP, LP / 16) float8_e4m3fn. Padding is zero.
    """
    batch, length, heads, size = x.shape
    padded = padded_head_size(size)
    tokens = triton.cdiv(length, QUERY_BLOCK) * QUERY_BLOCK
    tiles = tokens // STEP_TOKENS
    codes = torch.empty(batch, heads, padded, tokens // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(batch, heads, padded, tokens // NVFP4_GROUP, dtype=torch.uint8, device=x.device)
    quantise_columns_kernel[(tiles, batch * heads)](
        x, codes, scales, *x.stride(), length, heads, size, tiles, TOKENS=STEP_TOKENS, DP=padded, num_warps=8
    )
    return codes, scales.view(torch.float8_e4m3fn)


def aot_cases() -> list[AotCase]:
    """The quantisers as head size 128 takes them; they use no matrix instruction."""
    strides = dict.fromkeys(("stride_b", "stride_l", "stride_h"), "i32")
    places = {"x": "*bf16", "codes": "*u8", "scales": "*u8"}
    means = {"mean": "*fp32", "block_mean": "*fp32", "shift": "*fp32"}
    sizes = dict.fromkeys(("L", "H", "D", "BLOCKS", "HEADS_A_MEAN", "mean_stride_b", "mean_stride_h"), "i32")
    fixed = {"stride_d": 1, "DP": 128}
    rows = AotCase(
        name="nvfp4_quantise_rows",
        kernel=quantise_rows_kernel,
        signature=places | means | strides | sizes,
        constexprs=fixed | {"ROWS": QUERY_BLOCK, "STEP": STEP_TOKENS, "CENTRE": "block", "SHIFT": True},
        instructions=dict.fromkeys(CAPABILITIES, ()),
        num_warps=8,
        aligned=(*places, *means, *strides, "D"),
    )
    columns = AotCase(
        name="nvfp4_quantise_columns",
        kernel=quantise_columns_kernel,
        signature=places | strides | dict.fromkeys(("L", "H", "D", "TILES"), "i32"),
        constexprs=fixed | {"TOKENS": STEP_TOKENS},
        instructions=dict.fromkeys(CAPABILITIES, ()),
        num_warps=8,
        aligned=(*places, *strides, "D"),
    )
    return [rows, columns]
