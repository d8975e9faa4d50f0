"""The product of 8-bit matrices in Triton: scales applied at the end (a scale a row) or after each 128 of K (tiles).

Programs are persistent: each takes output tiles in turn, ordered so that neighbours share rows and columns in the
second-level cache. On compute capability 9.0 and later, tiles come through tensor maps (``TMA``); elsewhere, and for
what a map cannot describe, through pointers. Both operands are stored with K contiguous.

Shapes: M rows, N columns, K summed, KP = K rounded up to 16 (stored, zeros beyond K). Tiles: BM, BN, BK; TILE = 128.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.gemm.tuned import CANDIDATES, Config


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, column after column."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    return first + (tile % width) % high, (tile % width) // high


@triton.jit
def _load_rows(x, row_0, k_0, M, KP, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """The tile (HIGH, WIDE) of x (M, KP) at row_0 and k_0, zeros outside."""
    row, k = row_0 + tl.arange(0, HIGH), k_0 + tl.arange(0, WIDE)
    there = (row < M)[:, None] & (k < KP)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * KP + k[None, :], mask=there, other=0.0)


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    a,
    b,
    a_scale,
    b_scale,
    bias,
    out,
    M,
    N,
    KP,
    out_stride,
    TILED: tl.constexpr,
    INT8: tl.constexpr,
    TMA: tl.constexpr,
    MAP_OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SPECIALISE: tl.constexpr,
    TILE: tl.constexpr,
):
    """a (M, KP), b (N, KP), or tensor maps of them with boxes (BM, BK) and (BN, BK), to out (M, N), or with MAP_OUT a
    tensor map of it with boxes (BM, BN).

    a_scale, b_scale: (M,) and (N,), or with TILED (ceil(M / TILE), ceil(K / TILE)) and (ceil(N / TILE), same); then
    BM, BN and BK are at most TILE. bias: (N,) or None. SPECIALISE: one warp group loads, the others multiply.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    steps = tl.cdiv(KP, BK)
    blocks = tl.cdiv(KP, TILE)
    kind: tl.constexpr = tl.int32 if INT8 else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), warp_specialize=SPECIALISE):
        down, across = _place(tile, tiles_m, tiles_n, GROUP)
        row_0, column_0 = down * BM, across * BN
        acc = tl.zeros((BM, BN), tl.float32 if TILED else kind)
        for step in range(steps):
            if TMA:
                left = a.load([row_0, step * BK])
                right = b.load([column_0, step * BK])
            else:
                left = _load_rows(a, row_0, step * BK, M, KP, BM, BK)
                right = _load_rows(b, column_0, step * BK, N, KP, BN, BK)
            if TILED:
                block = step * BK // TILE
                factor = tl.load(a_scale + row_0 // TILE * blocks + block)
                factor *= tl.load(b_scale + column_0 // TILE * blocks + block)
                acc += tl.dot(left, right.T, out_dtype=kind).to(tl.float32) * factor
            else:
                acc = tl.dot(left, right.T, acc, out_dtype=kind)
        row, column = row_0 + tl.arange(0, BM), column_0 + tl.arange(0, BN)
        result = acc.to(tl.float32)
        if not TILED:
            of_rows = tl.load(a_scale + row, mask=row < M, other=0.0)
            of_columns = tl.load(b_scale + column, mask=column < N, other=0.0)
            result = result * of_rows[:, None] * of_columns[None, :]
        if bias is not None:
            result += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if MAP_OUT:
            out.store([row_0, column_0], result.to(out.dtype))
        else:
            to = out + row.to(tl.int64)[:, None] * out_stride + column[None, :]
            tl.store(to, result.to(out.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def aot_cases() -> list[AotCase]:
    """Each scheme with its first candidate of every chip, by tensor maps where the chip has them."""
    return [_aot_case(chip, kind, candidates[0]) for (chip, kind), candidates in CANDIDATES.items()]


def _aot_case(chip: int, kind: str, config: Config) -> AotCase:
    int8 = kind.startswith("int8")
    element = "i8" if int8 else "fp8e4nv"
    maps = chip >= 90
    signature = {"a": f"*{element}", "b": f"*{element}", "out": "*bf16"}
    if maps:
        boxes = {"a": (config.bm, config.bk), "b": (config.bn, config.bk)}
        signature |= {name: f"tensordesc<{element}[{high}, {wide}]>" for name, (high, wide) in boxes.items()}
        if config.map_out:
            signature["out"] = f"tensordesc<bf16[{config.bm}, {config.bn}]>"
    signature |= {"a_scale": "*fp32", "b_scale": "*fp32", "bias": "*bf16"}
    signature |= dict.fromkeys(("M", "N", "KP", "out_stride"), "i32")
    consts = {"TILED": kind.endswith("tile"), "INT8": int8, "TMA": maps, "TILE": 128, **config.constants()}
    consts["MAP_OUT"] = consts["MAP_OUT"] and maps
    aligned = tuple(n for n, t in signature.items() if n != "M" and not t.startswith("tensordesc"))
    product = {80: r"mma\.sync\S*s8", 90: r"wgmma\S*(s8|e4m3)", 100: r"tcgen05\.mma|mma\.sync", 120: r"mma\.sync"}
    name = f"gemm_{kind}_sm{chip}_{config.name}"
    asked = {chip: (product[chip],)}
    return AotCase(name, gemm_kernel, signature, consts, asked, config.warps, config.stages, aligned)
