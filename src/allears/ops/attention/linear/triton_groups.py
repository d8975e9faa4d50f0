"""Forward of linear attention over both directions where channels adjoin: 64 channels of all heads at a time.

The tiles of ``triton_fwd.py`` hold all heads side by side, and a norm over them goes through all warps. Here a program
takes the channels of its rows in groups of 64, one head of 64 or several smaller ones, one group after another: a norm
is a sum within a warp, and the products are those of whole matrices, whose blocks between two heads are thrown away.
Otherwise as there: :func:`group_states_kernel` leaves sums of parts, ``triton_fwd.mean_kernel`` adds them, and
:func:`group_output_kernel` reads queries, and values for the convolution.

Shapes: C = H * D channels in GROUPS groups of 64, D 16, 32 or 64; P parts of a sequence, E entries, K taps.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.linear.triton_features import (
    FLOOR,
    UNIT,
    aot_case,
    entry_rows,
    features,
    part_of,
    per_head,
    relu,
    spread,
    to_power,
)

GROUP = tl.constexpr(64)
ONES = tl.constexpr(16)


@triton.jit
def _load(x, at, row, stride_l: tl.constexpr, first: tl.constexpr, low, high, INNER: tl.constexpr):
    """Channels ``first`` to ``first`` + 64 of the rows ``at`` (int64) + ``row`` of x; 0 where ``row`` is not in ``low``
    to ``high``. INNER: all rows exist."""
    place = row[:, None] * stride_l + (tl.arange(0, GROUP) + first)[None, :]
    at = x + at * stride_l + place
    if INNER:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=((row >= low) & (row < high))[:, None], other=0.0)
    return tile


@triton.jit
def _base(tile, inverse, at, first: tl.constexpr):
    """UNIT * (relu(tile) + floor) / scale in float32, ``inverse`` being 1 / scale of all channels. These are read
    from the cache for each tile, as if they lay at ``at``, since all at once are too many registers."""
    tile = relu(tile.to(tl.float32))
    if inverse is None:
        base = (tile + FLOOR) * UNIT
    else:
        factor = tl.zeros((GROUP,), tl.float32)
        if at >= 0:
            factor = tl.load(inverse + tl.arange(0, GROUP) + first) * UNIT
        base = tile * factor[None, :] + (factor * FLOOR)[None, :]
    return base


@triton.jit
def _by_head(
    tile,
    inverse,
    keep,
    first: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """Features whose heads do not know of one another, times ``keep`` (ROWS, 1)."""
    factor = tl.zeros((GROUP,), tl.float32) + UNIT
    if inverse is not None:
        factor = tl.load(inverse + tl.arange(0, GROUP) + first) * UNIT
    tile = tile.to(tl.float32)
    return features(tile, factor, keep, None, None, None, KIND, POWER, "head", False, ROWS, GROUP // D, D)


@triton.jit
def _within(D: tl.constexpr):
    """Of a matrix of a group: whether row and column are of one head, and the place in the group's (heads, D, D)."""
    i = tl.arange(0, GROUP)[:, None]
    j = tl.arange(0, GROUP)[None, :]
    return i // D == j // D, i * D + j % D


@triton.jit
def _norm_factor(first, second):
    """What takes base^p to the features, (ROWS, 1), from the squares of base and base^p, (ROWS, 64) and not yet
    added."""
    first = tl.sum(first, axis=1)[:, None]
    second = tl.sum(second, axis=1)[:, None]
    return tl.sqrt(tl.where(second == 0.0, 0.0, first / tl.where(second == 0.0, 1.0, second))) * (1.0 / UNIT)


@triton.jit(do_not_specialize=["L"])
def group_states_kernel(
    x,
    y,
    inverse,
    cu,
    lengths,
    parts,
    x_stride_b,
    x_stride_l: tl.constexpr,
    y_stride_b,
    y_stride_l: tl.constexpr,
    L,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    JOINT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A part of a sequence: phi(x)^T y and sum phi(x) of all heads to parts (E, P, H * (D * D + D))."""
    part = tl.program_id(0)
    entry = tl.program_id(1)
    GROUPS: tl.constexpr = H * D // GROUP
    batch, first_row, rows, _ = entry_rows(cu, lengths, entry, L, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L, cu is not None, lengths is not None)
    start, stop = part_of(part, tl.num_programs(0), rows, ROWS)
    stop = tl.minimum(stop, keys)
    x += batch * x_stride_b + first_row * x_stride_l
    y += batch * y_stride_b + first_row * y_stride_l
    ones = tl.full((ROWS, ONES), 1.0, y.dtype.element_ty)
    matrices = ()
    sums = ()
    for _ in tl.static_range(GROUPS):
        matrices = matrices + (tl.zeros((GROUP, GROUP), tl.float32),)  # noqa: RUF005
        sums = sums + (tl.zeros((GROUP, ONES), tl.float32),)  # noqa: RUF005
    for at in range(start, stop, ROWS):
        wide = first_row * 0 + at
        row = tl.arange(0, ROWS)
        left = stop - at
        keep = (row < left).to(tl.float32)[:, None]
        tops = ()
        factor = keep
        if JOINT:
            first = tl.zeros((ROWS, GROUP), tl.float32)
            second = tl.zeros((ROWS, GROUP), tl.float32)
            for g in tl.static_range(GROUPS):
                tile = _load(x, wide, row, x_stride_l, g * GROUP, 0, left, False)
                base = _base(tile, inverse, at, g * GROUP)
                top = to_power(base, POWER)
                first += base * base
                second += top * top
                tops = tops + (top,)  # noqa: RUF005
            factor = keep * _norm_factor(first, second)
        new_matrices = ()
        new_sums = ()
        for g in tl.static_range(GROUPS):
            if JOINT:
                phi = tops[g] * factor
            else:
                tile = _load(x, wide, row, x_stride_l, g * GROUP, 0, left, False)
                phi = _by_head(tile, inverse, keep, g * GROUP, KIND, POWER, ROWS, D)
            value = _load(y, wide, row, y_stride_l, g * GROUP, 0, left, False)
            turned = tl.trans(phi.to(value.dtype))
            new_matrices = new_matrices + (tl.dot(turned, value, matrices[g]),)  # noqa: RUF005
            new_sums = new_sums + (tl.dot(turned, ones, sums[g]),)  # noqa: RUF005
        matrices = new_matrices
        sums = new_sums
    to = parts + (entry.to(tl.int64) * tl.num_programs(0) + part) * (H * (D * D + D))
    same, place = _within(D)
    i = tl.arange(0, GROUP)
    for g in tl.static_range(GROUPS):
        tl.store(to + g * (GROUP * D) + place, matrices[g], mask=same)
        tl.store(to + H * D * D + i + g * GROUP, tl.max(sums[g], axis=1))


@triton.jit
def _ahead(x, row, stride_l: tl.constexpr, high, C: tl.constexpr):
    """Ask for rows of x, which a later tile needs, to be brought into the second-level cache."""
    LINES: tl.constexpr = C // GROUP
    line = tl.arange(0, LINES) * GROUP
    at = x + tl.minimum(row, high - 1).to(tl.int64)[:, None] * stride_l + line[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["L_q", "L_k"])
def group_output_kernel(
    q,
    v,
    inverse,
    matrix,
    sums,
    conv,
    bias,
    cu,
    lengths,
    out,
    q_stride_b,
    q_stride_l: tl.constexpr,
    v_stride_b,
    v_stride_l: tl.constexpr,
    o_stride_b,
    o_stride_l: tl.constexpr,
    L_q,
    L_k,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    JOINT: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Some tiles of queries, all heads: phi(q) matrix / (phi(q) . sums + eps) + convolution of v, to out."""
    part = tl.program_id(0)
    entry = tl.program_id(1)
    C: tl.constexpr = H * D
    GROUPS: tl.constexpr = C // GROUP
    LEFT: tl.constexpr = (TAPS - 1) // 2 if TAPS > 0 else 0
    batch, first_row, rows, _ = entry_rows(cu, lengths, entry, L_q, cu is not None, False)
    _, _, keys, _ = entry_rows(cu, lengths, entry, L_k, cu is not None, lengths is not None)
    start, stop = part_of(part, tl.num_programs(0), rows, ROWS)
    q += batch * q_stride_b + first_row * q_stride_l
    v += batch * v_stride_b + first_row * v_stride_l
    out += batch * o_stride_b + first_row * o_stride_l
    same, place = _within(D)
    states = ()
    for g in tl.static_range(GROUPS):
        at_matrix = matrix + (entry.to(tl.int64) * C + g * GROUP) * D
        states = states + (tl.load(at_matrix + place, mask=same, other=0.0),)  # noqa: RUF005
    sums += entry.to(tl.int64) * C
    channel = tl.arange(0, GROUP)
    # The two halves of a tile are its even and its odd rows: so a thread has neighbours, which the convolution shares.
    half = tl.arange(0, ROWS) % (ROWS // 2)
    row = 2 * half + tl.arange(0, ROWS) // (ROWS // 2)
    for at in range(start, stop, ROWS):
        wide = first_row * 0 + at
        left = stop - at
        if AHEAD and TAPS > 0:
            _ahead(v, at + ROWS + row, v_stride_l, tl.maximum(keys, 1), C)
        if AHEAD:
            _ahead(q, at + ROWS + row, q_stride_l, stop, C)
        factor = tl.zeros((ROWS, 1), tl.float32)
        inner = (at >= LEFT) & (at + ROWS + TAPS <= keys)
        if JOINT:
            first = tl.zeros((ROWS, GROUP), tl.float32)
            second = tl.zeros((ROWS, GROUP), tl.float32)
            for g in tl.static_range(GROUPS):
                base = _base(_load(q, wide, row, q_stride_l, g * GROUP, 0, left, False), inverse, at, g * GROUP)
                top = to_power(base, POWER)
                first += base * base
                second += top * top
            factor = _norm_factor(first, second)
        for g in tl.static_range(GROUPS):
            tile = _load(q, wide, row, q_stride_l, g * GROUP, 0, left, False)  # again, from the cache
            if JOINT:
                phi = to_power(_base(tile, inverse, at, g * GROUP), POWER) * factor
            else:
                phi = _by_head(tile, inverse, factor + 1.0, g * GROUP, KIND, POWER, ROWS, D)
            k_mean = tl.load(sums + channel + g * GROUP)
            below = per_head(phi * k_mean[None, :], ROWS, GROUP // D, D) + eps
            share = spread(tl.where(keys > 0, 1.0 / tl.where(keys > 0, below, 1.0), 0.0), ROWS, GROUP // D, D)
            added = tl.zeros((ROWS // 2, GROUP), tl.float32)
            if bias is not None:
                added += tl.load(bias + channel + g * GROUP)[None, :]
            even = added
            odd = added
            if TAPS > 0:
                if inner:
                    even, odd = _convolve(added, v, wide, conv, v_stride_l, g * GROUP, at, keys, C, TAPS, ROWS, True)
                else:
                    even, odd = _convolve(added, v, wide, conv, v_stride_l, g * GROUP, at, keys, C, TAPS, ROWS, False)
            added = tl.reshape(tl.permute(tl.join(even, odd), (2, 0, 1)), (ROWS, GROUP))
            result = tl.dot(phi.to(q.dtype.element_ty), states[g]) * share + added
            target = row[:, None] * o_stride_l + (channel + g * GROUP)[None, :]
            to = out + wide * o_stride_l + target
            tl.store(to, result.to(out.dtype.element_ty), mask=(row < left)[:, None])


@triton.jit
def _convolve(
    onto,
    v,
    wide,
    conv,
    stride_l: tl.constexpr,
    first: tl.constexpr,
    at,
    keys,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """onto + sum_t conv[t] * v[row + t - left] for the even and for the odd rows of a tile, 64 channels from ``first``
    on. INNER: all these rows exist."""
    even = onto
    odd = onto
    before = tl.zeros((GROUP,), tl.float32)
    row = 2 * tl.arange(0, ROWS // 2)
    for t in tl.static_range(TAPS + 1):
        value = _load(v, wide, row + (t - (TAPS - 1) // 2), stride_l, first, -at, keys - at, INNER).to(tl.float32)
        if t > 0:
            odd += value * before[None, :]
        if t < TAPS:
            before = tl.load(conv + tl.arange(0, GROUP) + (t * C + first))
            even += value * before[None, :]
    return even, odd


def aot_cases() -> list[AotCase]:
    """Both passes at 8 heads of 64 and of 16, focused with a joint norm, and by head. The first holds the sums of all
    heads in registers, which leaves some bytes for local memory."""
    wide = {"H": 8, "D": 64, "KIND": "focused", "POWER": 3, "JOINT": True, "ROWS": 32}
    output = {**wide, "ROWS": 64, "TAPS": 5, "AHEAD": True}
    given = ("inverse", "conv", "bias")
    alone = {"D": 16, "KIND": "softmax", "POWER": 1, "JOINT": False}
    chips = (90,)
    return [
        aot_case("linear_group_states_64", group_states_kernel, chips, (8, 2), wide, ("inverse",), 48),
        aot_case("linear_group_states_16", group_states_kernel, chips, (4, 2), {**wide, "H": 8, "D": 16}, ("inverse",)),
        aot_case("linear_group_states_by_head", group_states_kernel, (90,), (4, 2), {**wide, **alone}),
        aot_case("linear_group_output_64", group_output_kernel, chips, (8, 1), output, given),
        aot_case("linear_group_output_16", group_output_kernel, chips, (8, 1), {**output, "D": 16}, given),
        aot_case("linear_group_output_by_head", group_output_kernel, (90,), (8, 1), {**output, **alone, "TAPS": 0}),
    ]
