"""8-bit attention by the Triton kernels: what the references of the same names compute, on a GPU.

Dense calls take (B, L, H, D); packed ones take (T, H, D) with ``cu_seqlens_q`` and ``cu_seqlens_k``, and never wait for
the GPU. Nothing is tuned at run time: how a kernel is launched is a :class:`Launch`, chosen by :func:`forward_launch`
and :func:`backward_launch` unless the caller gives one.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads (H a multiple of G), D head size, DP = D padded to
32, 64, 128 or 256; of S packed sequences B = 1, and L_q, L_k are all queries and keys; E = S if packed else B; N blocks
of 128 keys, NQ tiles of 64 queries (see ``triton_quant.py``), M blocks of 128 queries.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
import triton
from torch import Tensor

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.inputs import check_inputs, softmax_scale
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.lowbit.quantise import KEY_BLOCK, QUERY_TILE
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK
from allears.ops.attention.lowbit.triton_bwd_keys import sagebwd_keys_kernel
from allears.ops.attention.lowbit.triton_bwd_queries import sagebwd_queries_kernel
from allears.ops.attention.lowbit.triton_fwd import int8_forward_kernel
from allears.ops.attention.lowbit.triton_quant import (
    QuantisedKeys,
    Sizes,
    on_hardware,
    prepare_backward_kernel,
    quantise_keys_values,
    quantise_queries,
    sizes_of,
)
from allears.ops.attention.lowbit.triton_smooth_q import query_correction, query_means
from allears.ops.attention.lowbit.triton_tiles import transpose_keys_kernel

HOPPER_SHARED_BYTES = 227 * 1024
LOG2_E = 1.4426950408889634
Values = Literal["fp8", "fp16"]


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: rows of its tile (queries, or in the dK and dV kernel keys), warps, and stages of its
    loop."""

    rows: int
    warps: int
    stages: int


class TritonSaved(NamedTuple):
    """What the backward needs.

    q8 int8 (B, H, L_q, DP), q_scale (B, H, L_q); k8 int8 (B, G, N * 128, DP), k_scale (B, G, N); v as given; k_mean (E,
    G, DP) or None without smoothing; out as returned; lse (B, H, L_q), natural, of the smoothed scores; cu_q, cu_k or
    None; with smoothed Q its means q_mean (B, H, M, DP), and k as given.
    """

    q8: Tensor
    q_scale: Tensor
    k8: Tensor
    k_scale: Tensor
    v: Tensor
    k_mean: Tensor | None
    out: Tensor
    lse: Tensor
    cu_q: Tensor | None
    cu_k: Tensor | None
    q_mean: Tensor | None = None
    k: Tensor | None = None


def missing_for(device: torch.device, pv: str) -> str:
    """What a device lacks for the kernels, or ``""``: FP8 products need compute capability 8.9."""
    if not on_hardware():
        return ""
    if device.type != "cuda":
        return f"its Triton kernels run on a CUDA GPU, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"compute capability {major}.{minor} has no INT8 product of 32 values; it needs 8.0"
    if pv == "fp8" and (major, minor) < (8, 9):
        return f"compute capability {major}.{minor} has no FP8; it needs 8.9, or take numerics='int8_fp16'"
    return ""


def forward_launch(
    pv: str, padded: int, wide: bool = False, major: int = 9, shared_bytes: int = HOPPER_SHARED_BYTES
) -> Launch:
    """The forward's launch by the product P V, DP, V in float32 (``wide``), the major compute capability, and the
    shared memory of a block. On Hopper two small blocks share a multiprocessor, so that one multiplies while the other
    takes exponentials; a head of 64 with P V in float16 leaves registers for twice the rows (427 TFLOP/s for 392).
    """
    if wide or padded == 256:
        return Launch(rows=64, warps=8 if padded == 256 else 4, stages=1)
    stage = KEY_BLOCK * padded * (3 if pv == "fp16" else 2)
    if major == 9:
        if pv == "fp16" and padded == 64 and 4 * stage + 128 * padded <= shared_bytes:
            return Launch(rows=128, warps=4, stages=4)
        return Launch(rows=64, warps=4, stages=3 if 2 * (3 * stage + 128 * padded) <= shared_bytes else 2)
    return Launch(rows=128, warps=8, stages=3 if 3 * stage + 128 * padded <= shared_bytes else 2)


def backward_launch(
    padded: int, per_tile: bool, wide: bool = False, shared_bytes: int = HOPPER_SHARED_BYTES
) -> tuple[Launch, Launch]:
    """The launches of dK and dV (rows: keys), and of dQ (rows: queries); see :func:`forward_launch`."""
    element = 4 if wide else 2
    if wide or padded == 256:
        if (
            padded == 256 and not per_tile
        ):  # of what registers hold; more rows spill, or are a trap on compute capability 10
            return Launch(32, 8, 1), Launch(32, 8, 1)
        return Launch(128 if per_tile else 32, 8, 1), Launch(64, 4, 1)
    keys = 128 * padded * (1 + element) + 2 * 64 * padded * (3 + element)
    queries = 128 * padded * (1 + element) + 2 * 128 * padded * (2 + element)
    return Launch(128, 8, 2 if keys <= shared_bytes else 1), Launch(128, 8, 2 if queries <= shared_bytes else 1)


def chip_of(device: torch.device) -> tuple[int, int]:
    """Major compute capability, and bytes of shared memory that a block may take."""
    return _gpu(device.index) if device.type == "cuda" else (9, HOPPER_SHARED_BYTES)


@cache
def _gpu(index: int) -> tuple[int, int]:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return torch.cuda.get_device_capability(index)[0], properties["max_shared_mem"]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, pv: str) -> Sizes:
    check_inputs(q, k, v)
    if (cu_q is None) != (cu_k is None):
        raise ValueError("cu_seqlens_q, cu_seqlens_k: one given without the other; self-attention gives the same twice")
    missing = missing_for(q.device, pv)
    if missing:
        raise ValueError(f"q: on {q.device}, but {missing}")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu is not None and (cu.dim() != 1 or cu.dtype != torch.int32 or cu.device != q.device):
            raise ValueError(
                f"{name}: {cu.dtype} {tuple(cu.shape)} on {cu.device} given; give int32 (S + 1,) on {q.device}"
            )
    if cu_q is not None and cu_k is not None and cu_q.shape != cu_k.shape:
        raise ValueError(
            f"cu_seqlens_k: {cu_k.shape[0]} offsets beside {cu_q.shape[0]} in cu_seqlens_q; make them equal"
        )
    return sizes_of(q, k, cu_k)


def _forward(
    q8: Tensor,
    q_scale: Tensor,
    keys: QuantisedKeys,
    v: Tensor,
    out: Tensor,
    cu: tuple[Tensor | None, Tensor | None],
    sizes: Sizes,
    pv: Literal["fp8", "fp16", "int8"],
    causal: bool,
    factor: float,
    with_lse: bool,
    launch: Launch | None,
    correction: Tensor | None = None,
) -> Tensor | None:
    lse = torch.empty(sizes.batch, sizes.heads, sizes.queries, device=v.device) if with_lse else None
    if not q8.numel():
        return lse
    wide = pv == "fp16" and v.dtype == torch.float32
    launch = launch or forward_launch(pv, sizes.padded, wide, *chip_of(v.device))
    tiles = sizes.query_tiles(launch.rows)
    int8_forward_kernel[(tiles * sizes.batch * sizes.heads,)](
        q8,
        q_scale,
        keys.k8,
        keys.k_scale,
        v if pv == "fp16" else keys.v8,
        keys.v_scale,
        out,
        lse,
        correction,
        *cu,
        *v.stride(),
        *out.stride(),
        sizes.queries,
        sizes.keys,
        sizes.heads,
        sizes.groups,
        sizes.size,
        sizes.blocks,
        sizes.sequences,
        sizes.queries,
        tiles,
        factor * LOG2_E,
        ROWS=launch.rows,
        KEYS=KEY_BLOCK,
        DP=sizes.padded,
        PV=pv,
        CAUSAL=causal,
        PACKED=sizes.packed,
        PADDED=sizes.padded != sizes.size,
        LSE=with_lse,
        MEAN_OF=QUERY_BLOCK if correction is not None else 0,
        HARDWARE=on_hardware(),
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=True,
    )
    return lse


def _batched(*tensors: Tensor, packed: bool) -> tuple[Tensor, ...]:
    """Packed (T, H, D) tensors as (1, T, H, D)."""
    for tensor in tensors:
        if packed and tensor.dim() != 3:
            raise ValueError(
                f"q, k, v: shape {tuple(tensor.shape)} given with cu_seqlens; packed sequences are (T, H, D)"
            )
    return tuple(tensor.unsqueeze(0) for tensor in tensors) if packed else tensors


def _refuse_smooth_q(options: LowBit, why: str) -> None:
    if options.smooth_q:
        raise ValueError(f"smooth_q: True given; {why}: use the reference, or leave it None")


def int8_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pv: Values,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with INT8 Q and K, as ``int8_reference.int8_forward``.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D), any strides, float16, bfloat16 or float32, D at most 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        pv: ``"fp8"``: probabilities and V in E4M3; ``"fp16"``: both in V's own dtype.
        causal, scale, options: as the reference takes them, without ``smooth_q``.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1), where packed sequences begin, and the end.
        return_lse: return the log-sum-exp of the logits of the given k too.
        launch: how the kernel is launched; None takes :func:`forward_launch`.

    Returns:
        Output like q, contiguous, and the natural log-sum-exp, float32 (B, H, L_q) or (H, T_q), or None.

    Raises:
        ValueError: the inputs do not fit, or the GPU lacks what ``pv`` needs.
    """
    packed = cu_seqlens_q is not None
    q4, k4, v4 = _batched(q, k, v, packed=packed)
    if pv not in get_args(Values):
        raise ValueError(f"pv: {pv!r} given; it must be 'fp8' or 'fp16'")
    sizes = _check(q4, k4, v4, cu_seqlens_q, cu_seqlens_k, pv)
    options = options or LowBit()
    _refuse_smooth_q(options, "the Triton kernels of int8_fp8 and int8_fp16 do not smooth Q")
    factor = softmax_scale(scale, sizes.size)
    keys = quantise_keys_values(k4, v4, cu_seqlens_k, sizes, options.smooth_k, "fp8" if pv == "fp8" else "none")
    q8, q_scale, shift = quantise_queries(q4, cu_seqlens_q, sizes, keys.k_mean if return_lse else None, False)
    out = torch.empty(q4.shape, dtype=q.dtype, device=q.device)
    cu = (cu_seqlens_q, cu_seqlens_k)
    lse = _forward(q8, q_scale, keys, v4, out, cu, sizes, pv, causal, factor, return_lse, launch)
    if lse is not None and shift is not None:
        lse = lse + factor * shift
    if packed:
        return out[0], lse[0] if lse is not None else None
    return out, lse


def sagebwd_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, TritonSaved]:
    """SageBwd's forward, as ``sagebwd_reference.sagebwd_forward``; arguments as :func:`int8_forward`.

    Returns:
        Output like q, contiguous; the natural log-sum-exp of the logits of the given k, float32 (B, H, L_q) or (H,
        T_q); and what :func:`sagebwd_backward` needs.

    Raises:
        ValueError: the inputs do not fit, the GPU lacks INT8 products, or Q of packed sequences is to be smoothed.
    """
    packed = cu_seqlens_q is not None
    q4, k4, v4 = _batched(q, k, v, packed=packed)
    sizes = _check(q4, k4, v4, cu_seqlens_q, cu_seqlens_k, "int8")
    options = options or LowBit()
    if packed:
        _refuse_smooth_q(options, "the Triton kernels smooth Q of dense batches alone, and cu_seqlens_q is given")
    factor = softmax_scale(scale, sizes.size)
    keys = quantise_keys_values(k4, v4, cu_seqlens_k, sizes, options.smooth_k, "int8")
    q_mean = correction = None
    if options.smooth_q:
        q_mean = query_means(q4, sizes)
        correction = query_correction(q_mean, k4, keys.k_mean, sizes, factor * LOG2_E)
    per_tile = options.grad_scales == "tile"
    q8, q_scale, shift = quantise_queries(q4, cu_seqlens_q, sizes, keys.k_mean, per_tile, q_mean)
    out = torch.empty(q4.shape, dtype=q.dtype, device=q.device)
    cu = (cu_seqlens_q, cu_seqlens_k)
    smoothed = _forward(q8, q_scale, keys, v4, out, cu, sizes, "int8", causal, factor, True, launch, correction)
    assert smoothed is not None
    lse = smoothed + factor * shift if shift is not None else smoothed.clone()
    if packed:
        out, lse = out[0], lse[0]
    saved = TritonSaved(q8, q_scale, keys.k8, keys.k_scale, v, keys.k_mean, out, smoothed, cu_seqlens_q, cu_seqlens_k)
    return out, lse, saved._replace(q_mean=q_mean, k=k) if q_mean is not None else saved


def sagebwd_backward(
    d_out: Tensor,
    saved: TritonSaved,
    *,
    d_lse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    options: LowBit | None = None,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """SageBwd's gradients, as ``sagebwd_reference.sagebwd_backward``; they repeat bit for bit.

    Args:
        d_out: like the output, any strides, in the dtype of v.
        saved: from :func:`sagebwd_forward`, called with the same ``causal``, ``scale`` and ``options``.
        d_lse: (B, H, L_q) or (H, T_q), the gradient of the returned log-sum-exp, if it has one.
        launches: of the kernel of dK and dV and of that of dQ; None takes :func:`backward_launch`.

    Returns:
        dQ like q, dK and dV like k, contiguous, in the dtype of v.

    Raises:
        ValueError: ``d_out`` or ``d_lse`` does not fit the output, or a launch does not fit the tiles of the numerics.
    """
    options = options or LowBit()
    per_tile = options.grad_scales == "tile"
    if d_out.shape != saved.out.shape or d_out.dtype != saved.v.dtype or d_out.device != saved.v.device:
        raise ValueError(
            f"d_out: {d_out.dtype} {tuple(d_out.shape)} on {d_out.device} given; it must be like the output, "
            f"{saved.v.dtype} {tuple(saved.out.shape)} on {saved.v.device}"
        )
    if d_lse is not None and d_lse.shape != saved.q_scale.shape[1 if saved.cu_q is not None else 0 :]:
        raise ValueError(f"d_lse: shape {tuple(d_lse.shape)} given; it must be that of the log-sum-exp")
    packed = saved.cu_q is not None
    d_out, out, v = _batched(d_out, saved.out, saved.v, packed=packed)
    batch, heads, queries, padded = saved.q8.shape
    _, keys, groups, size = v.shape
    sequences = saved.cu_q.shape[0] - 1 if saved.cu_q is not None else 0
    sizes = Sizes(batch, queries, keys, heads, groups, size, padded, sequences, saved.k_scale.shape[2], packed)
    factor = softmax_scale(scale, size)
    of_keys, of_queries = launches or backward_launch(padded, per_tile, v.dtype == torch.float32, chip_of(v.device)[1])
    key_rows, query_rows = ((KEY_BLOCK,), (64, 128)) if per_tile else ((32, 64, 128), (32, 64, 128))
    if of_queries.rows not in query_rows or of_keys.rows not in key_rows:
        raise ValueError(
            f"launches: {of_keys.rows} keys and {of_queries.rows} queries given; the scales of {options.grad_scales!r} "
            f"need {' or '.join(map(str, key_rows))} keys and {' or '.join(map(str, query_rows))} queries"
        )
    d_q = torch.empty(batch, queries, heads, size, dtype=v.dtype, device=v.device)
    d_k, d_v = (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
    )
    correction = None
    if saved.q_mean is not None and saved.k is not None:
        correction = query_correction(saved.q_mean, saved.k, saved.k_mean, sizes, factor * LOG2_E)
    rows = _query_operands(
        d_out, out, saved, d_lse.float().contiguous() if d_lse is not None else None, sizes, per_tile
    )
    same = {
        "DP": padded,
        "CAUSAL": causal,
        "PACKED": packed,
        "PADDED": padded != size,
        "PER_TILE": per_tile,
        "MEAN_OF": QUERY_BLOCK if correction is not None else 0,
        "HARDWARE": on_hardware(),
    }
    numbers = (queries, keys, heads, groups, size, sizes.blocks, rows.tiles, sequences, queries)
    factors = (factor, factor * LOG2_E)
    if d_k.numel():
        sagebwd_keys_kernel[(sizes.blocks * (KEY_BLOCK // of_keys.rows) * batch * groups,)](
            saved.q8,
            rows.q8t,
            saved.k8,
            saved.k_scale,
            v,
            d_out,
            rows.do8t,
            rows.q_scale,
            rows.do_scale,
            rows.row_shift if per_tile else rows.folded_shift,
            rows.row_lse if per_tile else rows.folded_lse,
            correction,
            saved.q_mean,
            d_k,
            d_v,
            saved.cu_q,
            saved.cu_k,
            *v.stride(),
            *d_out.stride(),
            *numbers,
            keys,
            *factors,
            ROWS=of_keys.rows,
            BLOCK=KEY_BLOCK,
            QUERIES=QUERY_TILE,
            **same,
            num_warps=of_keys.warps,
            num_stages=of_keys.stages,
            enable_fp_fusion=True,
        )
    if d_q.numel():
        k8t = torch.empty(batch, groups, padded, sizes.blocks * KEY_BLOCK, dtype=torch.int8, device=v.device)
        if k8t.numel():
            transpose_keys_kernel[(sizes.blocks * batch * groups,)](
                saved.k8, k8t, sizes.blocks, BLOCK=KEY_BLOCK, DP=padded, num_warps=4
            )
        with_mean = d_lse is not None and saved.k_mean is not None
        tiles = sizes.query_tiles(of_queries.rows)
        sagebwd_queries_kernel[(tiles * batch * heads,)](
            saved.q8,
            saved.k8,
            k8t,
            saved.k_scale,
            v,
            d_out,
            rows.q_scale,
            rows.row_shift,
            rows.row_lse,
            correction,
            d_q,
            rows.row_d_lse if with_mean else None,
            saved.k_mean if with_mean else None,
            saved.cu_q,
            saved.cu_k,
            *v.stride(),
            *d_out.stride(),
            *numbers,
            tiles,
            *factors,
            ROWS=of_queries.rows,
            QUERIES=QUERY_TILE,
            KEYS=KEY_BLOCK,
            LSE_GRADIENT=with_mean,
            **same,
            num_warps=of_queries.warps,
            num_stages=of_queries.stages,
            enable_fp_fusion=True,
        )
    return (d_q[0], d_k[0], d_v[0]) if packed else (d_q, d_k, d_v)


class _QueryOperands(NamedTuple):
    """do8t, q8t (B, H, DP, NQ * 64); the rest (B, H, NQ * 64). See ``prepare_backward_kernel``."""

    do8t: Tensor
    q8t: Tensor
    do_scale: Tensor
    q_scale: Tensor
    row_shift: Tensor
    row_lse: Tensor
    row_d_lse: Tensor | None
    folded_shift: Tensor
    folded_lse: Tensor
    tiles: int


def _query_operands(
    d_out: Tensor, out: Tensor, saved: TritonSaved, d_lse: Tensor | None, sizes: Sizes, per_tile: bool
) -> _QueryOperands:
    tiles = sizes.query_tiles(QUERY_TILE)
    rows = (sizes.batch, sizes.heads, tiles * QUERY_TILE)
    columns = (sizes.batch, sizes.heads, sizes.padded, tiles * QUERY_TILE)
    do8t, q8t = (torch.empty(columns, dtype=torch.int8, device=d_out.device) for _ in range(2))
    do_scale, q_scale, row_shift, row_lse = (torch.empty(rows, device=d_out.device) for _ in range(4))
    folded_shift, folded_lse = (torch.empty(0 if per_tile else rows, device=d_out.device) for _ in range(2))
    row_d_lse = torch.empty(rows, device=d_out.device) if d_lse is not None else None
    if do8t.numel():
        prepare_backward_kernel[(tiles * sizes.batch * sizes.heads,)](
            d_out,
            out,
            saved.lse,
            d_lse,
            saved.q8,
            saved.q_scale,
            saved.cu_q,
            do8t,
            q8t,
            do_scale,
            q_scale,
            row_shift,
            row_lse,
            row_d_lse,
            folded_shift,
            folded_lse,
            *d_out.stride(),
            *out.stride(),
            sizes.queries,
            sizes.heads,
            sizes.size,
            sizes.sequences,
            sizes.queries,
            tiles,
            BLOCK=QUERY_TILE,
            DP=sizes.padded,
            PACKED=sizes.packed,
            PER_TILE=per_tile,
            LSE_GRADIENT=d_lse is not None,
            CENTRED=saved.q_mean is not None,
            HARDWARE=on_hardware(),
            num_warps=4,
        )
    return _QueryOperands(do8t, q8t, do_scale, q_scale, row_shift, row_lse, row_d_lse, folded_shift, folded_lse, tiles)


def aot_cases() -> list[AotCase]:
    """None: the kernels that this file launches are compiled by the files that hold them."""
    return []
