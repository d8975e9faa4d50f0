"""SageAttention3's forward in Triton (arXiv 2505.11594, section 3): both products in NVFP4 with block-scaled dots.

Compiled, not run: the code for compute capability 10.0 and 12.0 is built ahead of time and its matrix instructions
are checked, and Triton's interpreter runs the arithmetic against ``nvfp4_reference.py``; no such chip has run it. Older
chips have no FP4 instruction: there ``nvfp4_reference.py`` gives the numbers.

The term that smoothed queries lose, q_mean . k, is a product of each tile of keys with one row, in 16-bit parts that
lose nothing; no matrix of (L_q / 128) x L_k lies in memory, as it does in the paper's implementation.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size; DP = 64 or
128, D padded; LP = a length padded to a multiple of 128; M = LP / 128 blocks.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.inputs import check_inputs, softmax_scale
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK
from allears.ops.attention.lowbit.triton_nvfp4_quant import (
    LARGEST_HEAD_SIZE,
    e2m1_code,
    e4m3_code,
    e4m3_value,
    pack_pairs,
    padded_head_size,
    quantise_columns,
    quantise_rows,
)

TWO_LEVEL_LOG2 = math.log2(448 * 6)


@triton.jit
def _e2m1_pairs(low, high):
    """Bytes of E2M1 codes by the instruction of compute capability 10.0 and above; ``low`` goes to the lower half."""
    wide = tl.inline_asm_elementwise(
        "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
        constraints="=r,f,f",
        args=[low, high],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return wide.to(tl.uint8)


@triton.jit
def quantise_weights(p, group_max, ROWS: tl.constexpr, KEYS: tl.constexpr, HARDWARE: tl.constexpr):
    """Weights p (ROWS, KEYS) >= 0 and the largest of each 16 keys -> bytes (ROWS, KEYS / 2), E4M3 (ROWS, KEYS / 16)."""
    scale_code = e4m3_code(group_max * (1.0 / 6.0))
    scale = e4m3_value(scale_code)
    inverse = tl.where(scale == 0.0, 0.0, 1.0 / tl.where(scale == 0.0, 1.0, scale))
    scaled = tl.reshape(tl.reshape(p, (ROWS, KEYS // 16, 16)) * inverse[:, :, None], (ROWS, KEYS))
    if HARDWARE:
        low, high = tl.split(tl.reshape(scaled, (ROWS, KEYS // 2, 2)))
        packed = _e2m1_pairs(low, high)
    else:
        packed = pack_pairs(e2m1_code(scaled, 1.0), ROWS, KEYS)
    return packed, scale_code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _tile(
    acc,
    row_sum,
    row_max,
    q_codes,
    q_scales,
    centre,
    centre_shift,
    start,
    k_codes,
    k_scales,
    v_codes,
    v_scales,
    k,
    stride_kl,
    stride_kd,
    rows,
    L_k,
    D,
    LAST_KEY,
    LP_K,
    log2_scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    CENTRED: tl.constexpr,
    SCALED_P_LOG2: tl.constexpr,
    PERMUTED: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """One tile of keys: returns acc, row_sum and row_max brought up to date."""
    column = tl.arange(0, KEYS)
    if PERMUTED:
        # Column c of S is the key that makes the accumulator's registers be those of the second product's operand.
        order = (column // 32) * 32 + ((column % 8) // 2) * 8 + ((column % 32) // 8) * 2 + column % 2
    else:
        order = column
    packed = tl.arange(0, DP // 2)
    group = tl.arange(0, DP // 16)
    channel = tl.arange(0, DP)
    loaded = start + order
    kt = tl.load(k_codes + loaded[None, :] * (DP // 2) + packed[:, None])
    ks = tl.load(k_scales + loaded[:, None] * (DP // 16) + group[None, :])
    if CENTRED:
        # Keys are the rows of this product, so that it is spread over the warps.
        inside = (loaded < L_k)[:, None] & (channel < D)[None, :]
        at_k = k + loaded.to(tl.int64)[:, None] * stride_kl + channel[None, :] * stride_kd
        correction = tl.sum(tl.dot(tl.load(at_k, mask=inside, other=0.0), centre), axis=1) - centre_shift
    else:
        # Zero, but not to the compiler: for 10.x, Triton 3.6 fails on a block-scaled dot in a loop that starts at 0.
        correction = tl.full((KEYS,), 0.0, tl.float32) + (log2_scale - log2_scale)
    added = tl.broadcast_to(correction[None, :], (ROWS, KEYS))
    s = tl.dot_scaled(q_codes, q_scales, "e2m1", kt, ks, "e2m1", added) * log2_scale
    if PERMUTED:
        s = tl.permute(tl.reshape(s, (ROWS, KEYS // 32, 4, 4, 2)), (0, 1, 3, 2, 4))
        s = tl.reshape(s, (ROWS, KEYS))
    if MASKED:
        seen = (start + column)[None, :] < L_k
        if CAUSAL:
            seen = seen & ((start + column)[None, :] <= rows[:, None] + LAST_KEY)
        s = tl.where(seen, s, float("-inf"))
    group_max = tl.max(tl.reshape(s, (ROWS, KEYS // 16, 16)), axis=2)
    new_max = tl.maximum(row_max, tl.max(group_max, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max) - SCALED_P_LOG2
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(row_max - SCALED_P_LOG2 - shift)
    row_sum = row_sum * decay + tl.sum(p, axis=1)
    p_codes, p_scales = quantise_weights(p, tl.exp2(group_max - shift[:, None]), ROWS, KEYS, HARDWARE)
    token_pair = start // 2 + tl.arange(0, KEYS // 2)
    token_group = start // 16 + tl.arange(0, KEYS // 16)
    v = tl.load(v_codes + channel[None, :] * (LP_K // 2) + token_pair[:, None])
    vs = tl.load(v_scales + channel[:, None] * (LP_K // 16) + token_group[None, :])
    acc = tl.dot_scaled(p_codes, p_scales, "e2m1", v, vs, "e2m1", acc * decay[:, None])
    return acc, row_sum, new_max


@triton.jit
def nvfp4_forward_kernel(
    q_codes,
    q_scales,
    k_codes,
    k_scales,
    v_codes,
    v_scales,
    block_mean,
    k,
    k_mean,
    q_shift,
    out,
    lse,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_kd,
    stride_ob,
    stride_ol,
    stride_oh,
    L_q,
    L_k,
    H,
    HEADS_A_GROUP,
    D,
    BLOCKS_Q,
    LP_K,
    scale,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    CAUSAL: tl.constexpr,
    CENTRED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    SCALED_P_LOG2: tl.constexpr,
    PERMUTED: tl.constexpr,
    HARDWARE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """128 queries of one head against all keys. CENTRED: q lost block_mean (B, H, M, DP), whose products with k are
    added back to S. SMOOTHED: k lost k_mean (B, G, DP), and q_shift (B, H, L_q) = q . k_mean goes into lse (B, H, L_q).
    """
    block = BLOCKS_Q - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    b = head // H
    kv_head = b * (H // HEADS_A_GROUP) + (head % H) // HEADS_A_GROUP
    rows = block * ROWS + tl.arange(0, ROWS)
    first = (head * BLOCKS_Q + block) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    qc = tl.load(q_codes + first[:, None] * (DP // 2) + tl.arange(0, DP // 2)[None, :])
    qs = tl.load(q_scales + first[:, None] * (DP // 16) + tl.arange(0, DP // 16)[None, :])
    k += b * stride_kb + (kv_head % (H // HEADS_A_GROUP)) * stride_kh
    centre = tl.zeros((DP, PARTS), k.dtype.element_ty)
    centre_shift = 0.0
    if CENTRED:
        # The row in three 16-bit parts, so that the product loses nothing of its float32; k's own values are 16-bit.
        whole = tl.load(block_mean + (head * BLOCKS_Q + block) * DP + channel)
        part0 = whole.to(k.dtype.element_ty)
        rest = whole - part0.to(tl.float32)
        part1 = rest.to(k.dtype.element_ty)
        part2 = (rest - part1.to(tl.float32)).to(k.dtype.element_ty)
        part = tl.arange(0, PARTS)[None, :]
        centre = tl.where(part == 0, part0[:, None], centre)
        centre = tl.where(part == 1, part1[:, None], centre)
        centre = tl.where(part == 2, part2[:, None], centre)
        if SMOOTHED:
            centre_shift = tl.sum(whole * tl.load(k_mean + kv_head * DP + channel))
    k_codes += kv_head * LP_K * (DP // 2)
    k_scales += kv_head * LP_K * (DP // 16)
    v_codes += kv_head * DP * (LP_K // 2)
    v_scales += kv_head * DP * (LP_K // 16)
    acc = tl.zeros((ROWS, DP), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    row_max = tl.full((ROWS,), float("-inf"), tl.float32)
    log2_scale = scale * 1.4426950408889634
    last_key = L_k - L_q
    end = L_k
    whole_tiles = L_k // KEYS
    if CAUSAL:
        end = tl.maximum(tl.minimum(L_k, (block + 1) * ROWS + last_key), 0)
        whole_tiles = tl.minimum(whole_tiles, tl.maximum(block * ROWS + last_key + 1, 0) // KEYS)
    for tile in range(0, whole_tiles):
        acc, row_sum, row_max = _tile(
            acc, row_sum, row_max, qc, qs, centre, centre_shift, tile * KEYS, k_codes, k_scales, v_codes, v_scales, k,
            stride_kl, stride_kd, rows, L_k, D, last_key, LP_K, log2_scale, ROWS, KEYS, DP, False, CAUSAL, CENTRED,
            SCALED_P_LOG2, PERMUTED, HARDWARE,
        )  # fmt: skip
    for tile in range(whole_tiles, tl.cdiv(end, KEYS)):
        acc, row_sum, row_max = _tile(
            acc, row_sum, row_max, qc, qs, centre, centre_shift, tile * KEYS, k_codes, k_scales, v_codes, v_scales, k,
            stride_kl, stride_kd, rows, L_k, D, last_key, LP_K, log2_scale, ROWS, KEYS, DP, True, CAUSAL, CENTRED,
            SCALED_P_LOG2, PERMUTED, HARDWARE,
        )  # fmt: skip
    blind = row_sum == 0.0
    safe = tl.where(blind, 1.0, row_sum)
    inside = rows < L_q
    at_out = out + b * stride_ob + (head % H) * stride_oh + rows.to(tl.int64)[:, None] * stride_ol + channel[None, :]
    result = acc * (1.0 / safe)[:, None]
    tl.store(at_out, result.to(out.dtype.element_ty), mask=inside[:, None] & (channel < D)[None, :])
    log_sum = (row_max + tl.log2(safe) - SCALED_P_LOG2) * 0.6931471805599453
    if SMOOTHED:
        log_sum += scale * tl.load(q_shift + head * L_q + rows, mask=inside, other=0.0)
    tl.store(lse + head * L_q + rows, tl.where(blind, float("-inf"), log_sum), mask=inside)


@dataclass(frozen=True)
class Nvfp4Tiling:
    """How the forward is cut for a chip.

    Args:
        keys: keys a tile of the online softmax: 128, as in the reference, or 64.
        num_warps, num_stages: as Triton takes them.
        permuted: order the keys of a tile so that the weights leave the first product in the registers from which the
            second one takes them (mma.sync; tensor memory needs no such order).
        hardware: round to E2M1 by the chip's instruction; the interpreter does it by comparisons, with the same result.
        parts: columns of the product that adds the queries' mean back; three are used.
    """

    keys: int = 128
    num_warps: int = 8
    num_stages: int = 2
    permuted: bool = False
    hardware: bool = True
    parts: int = 8


TILINGS = {10: Nvfp4Tiling(), 11: Nvfp4Tiling(), 12: Nvfp4Tiling(keys=64, num_stages=3, permuted=True)}
"""By the major compute capability. 12.x has 99 KiB of shared memory a block, and its accumulators are registers."""


def device_refusal(device: torch.device) -> str:
    """Why the NVFP4 kernel cannot run on ``device``; empty where it can."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, and {device} is none"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in TILINGS:
        name = torch.cuda.get_device_name(device)
        known = ", ".join(f"{known}.x" for known in TILINGS)
        return f"{name} has compute capability {major}.{minor}; the FP4 instructions that it uses are those of {known}"
    return ""


def nvfp4_refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why the NVFP4 kernel cannot run this call; empty where it can."""
    return device_refusal(q.device) or _input_refusal(q, k, v)


def _input_refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, and q is {q.dtype}"
    if q.shape[-1] > LARGEST_HEAD_SIZE:
        return f"it takes head sizes up to {LARGEST_HEAD_SIZE}, and q has {q.shape[-1]}"
    return ""


def nvfp4_forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    tiling: Nvfp4Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``nvfp4_reference.nvfp4_forward``, in the order of the additions apart: q, k, v and the weights in NVFP4.

    On 12.x a tile has 64 keys where the reference has 128, so that weights are rounded relative to other maxima.

    Args:
        q: (B, L_q, H, D), bfloat16 or float16, any strides; D at most 128.
        k, v: (B, L_k, G, D), H a multiple of G.
        causal: query i sees keys up to i + L_k - L_q.
        scale: factor on the logits; None: 1 / sqrt(D).
        options: ``smooth_k``, ``smooth_q`` (None: on) and ``two_level_p`` count here.
        tiling: None takes the one of the device, and refuses a device that has none.

    Returns:
        The output (B, L_q, H, D) in q's dtype, and the natural log-sum-exp of the logits of the given k, (B, H, L_q) in
        float32. A query without keys gives 0 and -inf.

    Raises:
        ValueError: the device has no FP4 instruction, or a shape or dtype does not fit.
    """
    check_inputs(q, k, v)
    reason = _input_refusal(q, k, v) if tiling else nvfp4_refusal(q, k, v)
    if reason:
        raise ValueError(
            f"q: the NVFP4 kernel cannot run this call: {reason}; use kernel='auto', which takes the emulation"
        )
    tiling = tiling or TILINGS[torch.cuda.get_device_capability(q.device)[0]]
    options = options or LowBit()
    smooth_q = options.smooth_q is not False
    factor = softmax_scale(scale, q.shape[-1])
    batch, queries, heads, size = q.shape
    keys, groups = k.shape[1], k.shape[2]
    out = torch.empty(batch, queries, heads, size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if not keys or not queries or not batch * heads:
        return out.zero_(), lse.fill_(-math.inf)
    padded = padded_head_size(size)
    k_mean = torch.mean(k, 1, dtype=torch.float32) if options.smooth_k else None
    q_rows = quantise_rows(q, k_mean, subtract_block_mean=smooth_q, with_shift=options.smooth_k)
    k_rows = quantise_rows(k, k_mean)
    v_codes, v_scales = quantise_columns(v)
    blocks = triton.cdiv(queries, QUERY_BLOCK)
    nvfp4_forward_kernel[(blocks, batch * heads)](
        q_rows.codes,
        q_rows.scales,
        k_rows.codes,
        k_rows.scales,
        v_codes,
        v_scales,
        q_rows.block_mean,
        k,
        F.pad(k_mean, (0, padded - size)).contiguous() if k_mean is not None else None,
        q_rows.shift,
        out,
        lse,
        *k.stride(),
        *out.stride()[:3],
        queries,
        keys,
        heads,
        heads // groups,
        size,
        blocks,
        v_codes.shape[-1] * 2,
        factor,
        ROWS=QUERY_BLOCK,
        KEYS=tiling.keys,
        DP=padded,
        CAUSAL=causal,
        CENTRED=smooth_q,
        SMOOTHED=options.smooth_k,
        SCALED_P_LOG2=TWO_LEVEL_LOG2 if options.two_level_p else 0.0,
        PERMUTED=tiling.permuted,
        HARDWARE=tiling.hardware,
        PARTS=tiling.parts,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out, lse


def aot_cases() -> list[AotCase]:
    """The forward for both chips that have FP4 instructions, causal, head size 128."""
    pointers = dict.fromkeys(("q_codes", "k_codes", "v_codes"), "*u8")
    pointers |= dict.fromkeys(("q_scales", "k_scales", "v_scales"), "*fp8e4nv")
    pointers |= {
        "block_mean": "*fp32",
        "k": "*bf16",
        "k_mean": "*fp32",
        "q_shift": "*fp32",
        "out": "*bf16",
        "lse": "*fp32",
    }
    strides = ("stride_kb", "stride_kl", "stride_kh", "stride_ob", "stride_ol", "stride_oh", "LP_K")
    sizes = dict.fromkeys((*strides, "L_q", "L_k", "H", "HEADS_A_GROUP", "D", "BLOCKS_Q"), "i32")
    fixed = {
        "stride_kd": 1,
        "DP": 128,
        "CAUSAL": True,
        "ROWS": QUERY_BLOCK,
        "CENTRED": True,
        "SMOOTHED": True,
        "SCALED_P_LOG2": TWO_LEVEL_LOG2,
    }
    # Two products in each of two loops, with and without masks. Tensor memory: 2 + 2 steps of 64 along the sums. Warps
    # of 16 rows: 8 * 2 + 16 * 1 tiles of 8 columns and 64 terms.
    rounding = r"cvt\.rn\.satfinite\.e2m1x2"
    patterns = {
        100: ((r"tcgen05\.mma\S*mxf4nvf4\S*block_scale", 8), rounding),
        120: ((r"mma\.sync\S*mxf4nvf4\S*block_scale\S*scale_vec::4X", 64), rounding),
    }
    cases = []
    for capability, wanted in patterns.items():
        tiling = TILINGS[capability // 10]
        chosen = {"KEYS": tiling.keys, "PERMUTED": tiling.permuted, "HARDWARE": tiling.hardware, "PARTS": tiling.parts}
        case = AotCase(
            name="nvfp4_forward",
            kernel=nvfp4_forward_kernel,
            signature={**pointers, **sizes, "scale": "fp32"},
            constexprs={**fixed, **chosen},
            instructions={capability: wanted},
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            aligned=(*pointers, "stride_kl", "stride_kb", "stride_kh", "LP_K", "D"),
        )
        cases.append(case)
    return cases
