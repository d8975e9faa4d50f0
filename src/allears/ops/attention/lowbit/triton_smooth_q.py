"""Smoothed Q of the 8-bit kernels in Triton: the mean of each block of 128 queries, and what the scores lose by it.

As ``smooth.py`` defines them, for dense batches (SageAttention3, arXiv 2505.11594; SageBwd, 2603.02170). The kernels of
the forward and of the backward add a row of the correction to a tile of scores, whose queries share one mean.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size, DP = D padded, N blocks of 128 keys, M
blocks of 128 queries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import CAPABILITIES, AotCase
from allears.ops.attention.lowbit.quantise import KEY_BLOCK
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK
from allears.ops.attention.lowbit.triton_quant import Sizes, load_rows

_MEANS = 16  # of a product of the correction


def _keys(padded: int) -> int:
    """Keys of a program of the correction, by DP: what 99 KB of shared memory hold, which the smallest chips have."""
    return 32 if padded == 256 else 64


@triton.jit
def query_mean_kernel(
    q,
    mean,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    q_stride_d,
    L,
    H,
    D,
    M,
    BLOCK: tl.constexpr,
    DP: tl.constexpr,
):
    """The mean of a block of queries of a head, of those that there are: to mean (B, H, M, DP)."""
    block = tl.program_id(0) % M
    head = (tl.program_id(0) // M).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, DP)
    at_q = q + (head // H) * q_stride_b + (head % H) * q_stride_h
    total = tl.sum(load_rows(at_q, row, channel, q_stride_l, q_stride_d, L, D), axis=0)
    count = tl.minimum(L - block * BLOCK, BLOCK).to(tl.float32)
    tl.store(mean + (head * M + block) * DP + channel, tl.div_rn(total, tl.zeros((DP,), tl.float32) + count))


@triton.jit
def query_correction_kernel(
    q_mean,
    k,
    k_mean,
    correction,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    L,
    H,
    G,
    D,
    N,
    M,
    log2_factor,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    MEANS: tl.constexpr,
    DP: tl.constexpr,
    SMOOTH_K: tl.constexpr,
):
    """KEYS keys of a query head: q_mean (B, H, M, DP) times k with its strides, less k_mean (B, G, DP) if SMOOTH_K, and
    times log2_factor: to correction (B, H, M, N * 128), 0 after the last key."""
    parts = N * (BLOCK // KEYS)
    part = tl.program_id(0) % parts
    head = (tl.program_id(0) // parts).to(tl.int64)
    b, g = head // H, (head % H) // (H // G)
    key = part * KEYS + tl.arange(0, KEYS)
    channel = tl.arange(0, DP)
    keys = load_rows(k + b * k_stride_b + g * k_stride_h, key, channel, k_stride_l, k_stride_d, L, D)
    if SMOOTH_K:
        centre = tl.load(k_mean + (b * G + g) * DP + channel)
        keys = tl.where((key < L)[:, None], keys - centre[None, :], 0.0)
    keys = tl.trans(keys)
    for start in range(0, M, MEANS):
        block = start + tl.arange(0, MEANS)
        at = head * M + block
        means = tl.load(q_mean + at[:, None] * DP + channel[None, :], mask=(block < M)[:, None], other=0.0)
        product = tl.dot(means, keys, input_precision="tf32x3") * log2_factor
        tl.store(correction + at[:, None] * (N * BLOCK) + key[None, :], product, mask=(block < M)[:, None])


def query_means(q: Tensor, sizes: Sizes) -> Tensor:
    """The means of q (B, L_q, H, D), float32 (B, H, M, DP)."""
    blocks = -(-sizes.queries // QUERY_BLOCK)
    mean = torch.empty(sizes.batch, sizes.heads, blocks, sizes.padded, device=q.device)
    if mean.numel():
        query_mean_kernel[(blocks * sizes.batch * sizes.heads,)](
            q,
            mean,
            *q.stride(),
            sizes.queries,
            sizes.heads,
            sizes.size,
            blocks,
            BLOCK=QUERY_BLOCK,
            DP=sizes.padded,
            num_warps=8,
        )
    return mean


def query_correction(q_mean: Tensor, k: Tensor, k_mean: Tensor | None, sizes: Sizes, log2_factor: float) -> Tensor:
    """What the scores of smoothed queries lose, in base 2: float32 (B, H, M, N * 128), for ``query_means`` of q.

    Args:
        q_mean: (B, H, M, DP).
        k: (B, L_k, G, D), as given; k_mean (B, G, DP) is taken off if there is one.
        log2_factor: factor on the logits, times log2(e).
    """
    blocks = q_mean.shape[2]
    rows = sizes.blocks * KEY_BLOCK
    correction = torch.empty(sizes.batch, sizes.heads, blocks, rows, device=k.device)
    if correction.numel():
        query_correction_kernel[(rows // _keys(sizes.padded) * sizes.batch * sizes.heads,)](
            q_mean,
            k,
            k_mean,
            correction,
            *k.stride(),
            sizes.keys,
            sizes.heads,
            sizes.groups,
            sizes.size,
            sizes.blocks,
            blocks,
            log2_factor,
            BLOCK=KEY_BLOCK,
            KEYS=_keys(sizes.padded),
            MEANS=_MEANS,
            DP=sizes.padded,
            SMOOTH_K=k_mean is not None,
            num_warps=4,
        )
    return correction


def _case(name: str, kernel, warps: int, products: dict[int, tuple[str, ...]], **fixed) -> AotCase:
    types = dict.fromkeys(("q", "k"), "*bf16") | dict.fromkeys(("q_mean", "k_mean", "mean", "correction"), "*fp32")
    types |= {"log2_factor": "fp32"}
    fixed |= {name: 1 for name in kernel.arg_names if name.endswith("stride_d")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in fixed}
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name)
    return AotCase(name, kernel, signature, fixed, products, num_warps=warps, aligned=aligned)


def aot_cases() -> list[AotCase]:
    """Both kernels at head size 128, and the products at 256."""
    nothing: dict[int, tuple[str, ...]] = dict.fromkeys(CAPABILITIES, ())
    tf32: dict[int, tuple[str, ...]] = {
        80: (r"mma\.sync\S*\.tf32",),
        90: (r"mma\S*\.tf32",),
        100: (r"mma\S*tf32",),
        120: (r"mma\.sync\S*\.tf32",),
    }
    keys = {"BLOCK": KEY_BLOCK, "MEANS": _MEANS, "SMOOTH_K": True}
    return [
        _case("query_mean", query_mean_kernel, 8, nothing, BLOCK=QUERY_BLOCK, DP=128),
        *(
            _case(f"query_correction_{size}", query_correction_kernel, 4, tf32, **keys, DP=size, KEYS=_keys(size))
            for size in (128, 256)
        ),
    ]
