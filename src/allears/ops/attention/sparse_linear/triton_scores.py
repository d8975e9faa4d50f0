"""Scores of blocks in Triton, from their means to the logits that the hard router ranks: two launches.

:func:`project_kernel` takes the mean of all keys off the pools of the keys and multiplies those of queries and keys by
the projections of their heads, as exactly as float32; :func:`score_kernel` multiplies the two by TF32, whose 10 bits
of mantissa leave the order of scores as it is but for near ties: 2 to 4 of 10,000 chosen blocks change (normal scores,
3 % kept). ``routers.block_scores`` is the reference.

Shapes: E batch entries or packed sequences, H query heads, G key heads, D head size, DP = D padded to 32, 64, 128 or
256, N_q and N_k blocks of queries and keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_quant import padded_head_size
from allears.ops.launches import Known

_ROWS, _STEP = 32, 32  # of the projections
_TILE = (64, 128, 32)  # query blocks, key blocks and channels of a step of the scores


@triton.jit
def _project(
    pools,
    mean,
    matrix,
    to,
    factor,
    tile,
    head,
    HEADS,
    N,
    D,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    """ROWS blocks of a head, of ``HEADS`` an entry: (pools - mean) matrix * factor; the matrix is that of the head."""
    row = tile * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DP)
    wide = head.to(tl.int64)
    total = tl.zeros((ROWS, DP), tl.float32)
    for start in range(0, DP, STEP):
        part = start + tl.arange(0, STEP)
        at = pools + wide * N * D + row[:, None] * D + part[None, :]
        x = tl.load(at, mask=(row < N)[:, None] & (part < D)[None, :], other=0.0)
        if mean is not None:
            x = x - tl.load(mean + wide * D + part, mask=part < D, other=0.0)[None, :]
        at = matrix + (head % HEADS) * D * D + part[:, None] * D + channel[None, :]
        weight = tl.load(at, mask=(part < D)[:, None] & (channel < D)[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="tf32x3")
    at = to + wide * N * D + row[:, None] * D + channel[None, :]
    tl.store(at, total * factor, mask=(row < N)[:, None] & (channel < D)[None, :])


@triton.jit(do_not_specialize=["factor", "ENTRIES", "H", "G", "N_q", "N_k"])
def project_kernel(
    q_pool,
    k_pool,
    k_mean,
    proj_q,
    proj_k,
    q_to,
    k_to,
    factor,
    ENTRIES,
    H,
    G,
    D,
    N_q,
    N_k,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
):
    """Some pools of a head, of queries (E, H, N_q, D) or, in the later programs, of keys (E, G, N_k, D), projected; the
    queries also times ``factor``."""
    tiles = tl.cdiv(N_q, ROWS)
    of_q = tiles * H * ENTRIES
    program = tl.program_id(0)
    if program < of_q:
        _project(q_pool, None, proj_q, q_to, factor, program % tiles, program // tiles, H, N_q, D, ROWS, DP, STEP)
    else:
        tiles = tl.cdiv(N_k, ROWS)
        program = program - of_q
        _project(k_pool, k_mean, proj_k, k_to, 1.0, program % tiles, program // tiles, G, N_k, D, ROWS, DP, STEP)


@triton.jit(do_not_specialize=["factor", "H", "G", "N_q", "N_k"])
def score_kernel(
    q,
    k,
    mean,
    scores,
    factor,
    H,
    G,
    D,
    N_q,
    N_k,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DP: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of scores (E, H, N_q, N_k): factor * q (E, H, N_q, D) times k (E, G, N_k, D), less their mean (E, G, D)
    where it is given."""
    head = tl.program_id(2).to(tl.int64)
    of_k = head // H * G + head % H // (H // G)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    part = tl.arange(0, STEP)
    total = tl.zeros((ROWS, KEYS), tl.float32)
    at_q = q + head * N_q * D + row[:, None] * D + part[None, :]
    at_k = k + of_k * N_k * D + key[:, None] * D + part[None, :]
    for start in range(0, DP, STEP):
        a = tl.load(at_q + start, mask=(row < N_q)[:, None] & (start + part < D)[None, :], other=0.0)
        b = tl.load(at_k + start, mask=(key < N_k)[:, None] & (start + part < D)[None, :], other=0.0)
        if mean is not None:
            b = b - tl.load(mean + of_k * D + start + part, mask=start + part < D, other=0.0)[None, :]
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    at = scores + head * N_q * N_k + row.to(tl.int64)[:, None] * N_k + key[None, :]
    tl.store(at, total * factor, mask=(row < N_q)[:, None] & (key < N_k)[None, :])


_PROJECT, _SCORE = Known(project_kernel), Known(score_kernel)


def scores_triton(
    q_pool: Tensor,
    k_pool: Tensor,
    k_mean: Tensor | None,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    scale: float,
    precision: str = "tf32",
) -> Tensor:
    """scale * (q_pool proj_q) . ((k_pool - k_mean) proj_k) of each pair of blocks, (E, H, N_q, N_k) float32.

    Args:
        q_pool: (E, H, N_q, D) float32, D at most 256.
        k_pool: (E, G, N_k, D); ``k_mean`` (E, G, D) is taken off, if given.
        proj_q, proj_k: (H, D, D) and (G, D, D) float32, or None for both.
        precision: of the scores' product: ``"tf32"``, ``"tf32x3"`` or ``"ieee"``.
    """
    q_pool, k_pool = q_pool.contiguous(), k_pool.contiguous()
    entries, heads, n_q, size = q_pool.shape
    groups, n_k = k_pool.shape[1:3]
    scores = q_pool.new_empty(entries, heads, n_q, n_k)
    if not scores.numel():
        return scores
    padded, mean, factor = padded_head_size(size), k_mean, scale
    if proj_q is not None and proj_k is not None:
        q_to, k_to = torch.empty_like(q_pool), torch.empty_like(k_pool)
        programs = entries * (heads * -(-n_q // _ROWS) + groups * -(-n_k // _ROWS))
        arguments = (q_pool, k_pool, mean, proj_q.contiguous(), proj_k.contiguous(), q_to, k_to, scale, entries)
        constants = {"ROWS": _ROWS, "DP": padded, "STEP": _STEP}
        _PROJECT((programs, 1, 1), (*arguments, heads, groups, size, n_q, n_k), constants, size, num_warps=4)
        q_pool, k_pool, mean, factor = q_to, k_to, None, 1.0
    rows, keys, step = _TILE
    constants = {"ROWS": rows, "KEYS": keys, "DP": padded, "STEP": step, "PRECISION": precision}
    arguments = (q_pool, k_pool, mean, scores, factor, heads, groups, size, n_q, n_k)
    grid = (-(-n_k // keys), -(-n_q // rows), entries * heads)
    _SCORE(grid, arguments, constants, size, num_warps=4, num_stages=3)
    return scores


def aot_cases() -> list[AotCase]:
    """Both at head size 128, which must run on matrix units."""
    sizes = dict.fromkeys(("D", "N_q", "N_k", "H", "G"), "i32")
    names = ("q_pool", "k_pool", "k_mean", "proj_q", "proj_k", "q_to", "k_to")
    project = {**dict.fromkeys(names, "*fp32"), "factor": "fp32", "ENTRIES": "i32", **sizes}
    score = {**dict.fromkeys(("q", "k", "scores"), "*fp32"), "factor": "fp32", **sizes}
    centred = {**score, "mean": "*fp32"}
    fixed = {"ROWS": _ROWS, "DP": 128, "STEP": _STEP}
    tile = dict(zip(("ROWS", "KEYS", "STEP"), _TILE, strict=True)) | {"DP": 128, "PRECISION": "tf32"}
    sync = r"mma\.sync\S*\.tf32"
    units = {80: (sync,), 90: (rf"{sync}|wgmma\S*\.tf32",), 120: (sync,)}
    units[100] = (rf"{sync}|tcgen05\.mma\S*kind::tf32",)
    return [
        AotCase("sparse_linear_project", project_kernel, project, fixed, units, aligned=(*names, "D")),
        AotCase(
            "sparse_linear_scores",
            score_kernel,
            score,
            {**tile, "mean": None},
            units,
            aligned=("q", "k", "scores", "D"),
        ),
        AotCase(
            "sparse_linear_scores_centred",
            score_kernel,
            centred,
            tile,
            {90: units[90]},
            aligned=("q", "k", "mean", "D"),
        ),
    ]
