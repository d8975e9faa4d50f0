"""Tiles of linear attention in Triton: rows in and out of memory, feature maps and their gradients, products per head.

A tile is (ROWS, C): some rows of SIDE heads beside one another, C = SIDE * W channels, W the head size padded to 16,
32, 64 or 128. In this shape a thread keeps its channels from tile to tile, and a norm over all heads is one sum; only
the products see (SIDE, ROWS, W). What stands in padding, of heads or of channels, is 0.

The focused map of y = (relu(x) + floor) / scale is y^p * |y| / |y^p|. Features are computed as ``unit * y``, where the
unit keeps the squares of a power within float32: 64 up to the third power (right for 1e-6 <= y <= 40,000), beyond it
1 / |y| of the row. The map is homogeneous, so the unit goes out again, and the gradient never sees it.

Shapes: ROWS rows, SIDE heads, W padded head size, C = SIDE * W, H heads, D head size, E entries: B of a batch or S
packed sequences.
"""

from typing import Any

import triton
import triton.language as tl

from allears.ops.aot import AotCase

FLOOR = tl.constexpr(1e-6)  # that of ``features.FLOOR``
UNIT = tl.constexpr(64.0)
DIRECT_POWER = tl.constexpr(3)  # up to which UNIT is enough


@triton.jit
def entry_rows(cu, lengths, entry, L, PACKED: tl.constexpr, LENGTHS: tl.constexpr):
    """Of an entry: its place in the batch, the rows before it in memory, its rows, and its place among all rows."""
    batch = entry.to(tl.int64)
    first = batch * 0
    rows = L
    flat = batch * L
    if PACKED:
        first = tl.load(cu + entry).to(tl.int64)
        rows = (tl.load(cu + entry + 1) - first).to(tl.int32)
        batch = batch * 0
        flat = first
    if LENGTHS:
        rows = tl.minimum(tl.maximum(tl.load(lengths + entry).to(tl.int32), 0), L)
    return batch, first, rows, flat


@triton.jit
def part_of(part, parts, rows, ROWS: tl.constexpr):
    """The first row of a part of a sequence, and the one after its last: whole tiles, shared out evenly."""
    length = tl.cdiv(tl.cdiv(rows, ROWS), parts) * ROWS
    return tl.minimum(part * length, rows), tl.minimum((part + 1) * length, rows)


@triton.jit
def channels(group, H: tl.constexpr, D: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """Of each channel of a tile: its head, its place in the head, and whether both exist."""
    c = tl.arange(0, SIDE * W)
    head = group * SIDE + c // W
    within = c % W
    return head, within, (head < H) & (within < D)


@triton.jit
def load_tile(
    x,
    first,
    at,
    offset,
    row,
    rows,
    stride_l: tl.constexpr,
    real,
    MASKED: tl.constexpr,
    SHIFTED: tl.constexpr = False,
    INNER: tl.constexpr = False,
):
    """Rows ``at + row`` behind ``first`` (int64) of x, in its dtype: 0 from ``rows`` on, below 0 (if SHIFTED), and
    where a channel does not exist (if MASKED). INNER: the rows exist."""
    inside = real[None, :]
    if not INNER:
        there = at + row < rows
        if SHIFTED:
            there = there & (at + row >= 0)
        inside = there[:, None] & inside if MASKED else there[:, None]
    at_tile = x + (first + at) * stride_l + offset
    if INNER and not MASKED:
        tile = tl.load(at_tile)
    else:
        tile = tl.load(at_tile, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    x,
    first,
    value,
    at,
    offset,
    row,
    rows,
    stride_l: tl.constexpr,
    real,
    MASKED: tl.constexpr,
    INNER: tl.constexpr = False,
):
    """The reverse of :func:`load_tile`."""
    at_tile = x + (first + at) * stride_l + offset
    value = value.to(x.dtype.element_ty)
    if INNER and not MASKED:
        tl.store(at_tile, value)
    else:
        inside = (at + row < rows)[:, None]
        tl.store(at_tile, value, mask=inside & real[None, :] if MASKED else inside)


@triton.jit
def apart(x, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """(ROWS, C) to (SIDE, ROWS, W)."""
    return tl.permute(tl.reshape(x, (ROWS, SIDE, W)), (1, 0, 2))


@triton.jit
def beside(x, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """(SIDE, ROWS, W) to (ROWS, C)."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), (ROWS, SIDE * W))


@triton.jit
def product(a, b, onto, SIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """onto (SIDE, M, N) + a (SIDE, M, K) times b (SIDE, K, N), in float32; float32 factors keep their precision: in
    three products of TF32, or without matrix instructions where their parts would overflow shared memory."""
    PRECISION: tl.constexpr = "tf32x3" if N * K < 16384 else "ieee"
    if SIDE == 1:
        flat = tl.reshape(onto, (M, N))
        flat = tl.dot(tl.reshape(a, (M, K)), tl.reshape(b, (K, N)), flat, input_precision=PRECISION)
        onto = tl.reshape(flat, (1, M, N))
    else:
        onto = tl.dot(a, b, onto, input_precision=PRECISION)
    return onto


@triton.jit
def row_product(x, b, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """Rows x (ROWS, C), in the dtype of the product, times a matrix of each head b (SIDE, W, W): (ROWS, C)."""
    nothing = tl.zeros((SIDE, ROWS, W), tl.float32)
    return beside(product(apart(x, ROWS, SIDE, W), b, nothing, SIDE, ROWS, W, W), ROWS, SIDE, W)


@triton.jit
def outer_product(x, y, onto, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """onto (SIDE, W, W) + x^T y of each head, of rows x and y (ROWS, C)."""
    left = tl.permute(tl.reshape(x, (ROWS, SIDE, W)), (1, 2, 0))
    return product(left, apart(y, ROWS, SIDE, W), onto, SIDE, W, W, ROWS)


@triton.jit
def per_head(x, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """Sums over each head's channels: (ROWS, C) to (ROWS, SIDE)."""
    return tl.sum(tl.reshape(x, (ROWS, SIDE, W)), axis=2)


@triton.jit
def spread(x, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr):
    """A number of each head for all its channels: (ROWS, SIDE) to (ROWS, C)."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, SIDE, W)), (ROWS, SIDE * W))


@triton.jit
def add_rows(total, x, ROWS: tl.constexpr, C: tl.constexpr):
    """total (4, C) plus the rows of x (ROWS, C), four of them apart: no thread needs another's rows."""
    return total + tl.sum(tl.reshape(x, (ROWS // 4, 4, C)), axis=0)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def relu(x):
    """max(x, 0), and NaN of NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def to_power(y, POWER: tl.constexpr):
    result = y
    for _ in tl.static_range(POWER - 1):
        result = result * y
    return result


@triton.jit
def rectified(x, inverse, real, MASKED: tl.constexpr):
    """UNIT * (relu(x) + floor) / scale, of float32 x; ``inverse`` is UNIT / scale of each channel."""
    y = (relu(x) + FLOOR) * inverse[None, :]
    if MASKED:
        y = tl.where(real[None, :], y, 0.0)
    return y


@triton.jit
def squares(x, ROWS: tl.constexpr, SIDE: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr):
    """Sums of x over what a norm is taken of, for each channel: (ROWS, 1), or by head (ROWS, C)."""
    if NORM == "head":
        total = spread(per_head(x, ROWS, SIDE, W), ROWS, SIDE, W)
    else:
        total = tl.sum(x, axis=1)[:, None]
    return total


@triton.jit
def _focused(
    y,
    first,
    second,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """Of the rectified y: base (y times some unit), base^(p - 1), |base|^2, |base^p|^2, and what takes base^p times
    the root of their quotient to the features. ``first`` and ``second`` are read where NORM is "given": (ROWS, 1)."""
    back = 1.0 / UNIT
    if POWER <= DIRECT_POWER:
        lower = to_power(y, POWER - 1) if POWER > 1 else y * 0.0 + 1.0
        if NORM != "given":
            top = lower * y
            if NORM == "channels":
                first, second = tl.reduce((y * y, top * top), 1, _both)
                first = first[:, None]
                second = second[:, None]
            else:
                first = squares(y * y, ROWS, SIDE, W, NORM)
                second = squares(top * top, ROWS, SIDE, W, NORM)
    else:
        if NORM != "given":
            first = squares(y * y, ROWS, SIDE, W, NORM)
        size = tl.sqrt(tl.where(first == 0.0, 1.0, first))
        y = y / size
        lower = to_power(y, POWER - 1)
        if NORM != "given":
            second = squares(lower * lower * y * y, ROWS, SIDE, W, NORM)
        back = size / UNIT
        first = y * 0.0 + 1.0 if NORM == "head" else first * 0.0 + 1.0
    return y, lower, first, second, back


@triton.jit
def features(
    x,
    inverse,
    keep,
    real,
    given_first,
    given_second,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """phi(x) in float32, times ``keep`` (ROWS, 1), of float32 x (ROWS, C). ``inverse`` (C): see :func:`rectified`."""
    if KIND == "focused":
        y = rectified(x, inverse, real, MASKED)
        if POWER == 1:
            phi = y * (keep * (1.0 / UNIT))
        else:
            y, lower, first, second, back = _focused(y, given_first, given_second, POWER, NORM, ROWS, SIDE, W)
            # Rows without a real channel have sums of 0.
            ratio = tl.sqrt(tl.where(second == 0.0, 0.0, first / tl.where(second == 0.0, 1.0, second)))
            phi = lower * y * (ratio * back * keep)
    else:
        if KIND == "softmax":
            if MASKED:
                x = tl.where(real[None, :], x, -1e30)
            heads = tl.reshape(x, (ROWS, SIDE, W))
            heads = tl.exp(heads - tl.max(heads, axis=2)[:, :, None])
            phi = tl.reshape(heads / tl.sum(heads, axis=2)[:, :, None], (ROWS, SIDE * W))
        elif KIND == "elu":
            phi = tl.where(x <= 0.0, tl.exp(tl.minimum(x, 0.0)), x + 1.0)
        else:
            phi = relu(x) + FLOOR
        if MASKED:
            phi = tl.where(real[None, :], phi, 0.0)
        phi = phi * keep
    return phi


@triton.jit
def feature_dot(
    x,
    d_phi,
    inverse,
    real,
    given_first,
    given_second,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """sum d_phi * base^p over the channels of a tile, (ROWS,): a part of what :func:`features_gradient` is given where
    the norm is over more heads than a tile has."""
    y = rectified(x, inverse, real, MASKED)
    y, lower, _first, _second, _back = _focused(y, given_first, given_second, POWER, "given", ROWS, SIDE, W)
    return tl.sum(d_phi * lower * y, axis=1)


@triton.jit
def features_gradient(
    x,
    phi,
    d_phi,
    inverse,
    real,
    given_first,
    given_second,
    given_dot,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORM: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """Gradients of x, and of the logarithm of 1 / scale, (ROWS, C) each, from phi(x) and its gradient.

    With s = y^p, a = |y|, b = |s| and u = sum(d_phi * s): d_y = a / b * p * y^(p-1) * (d_phi - u / b^2 * s) +
    u / (a * b) * y.
    """
    if KIND == "focused":
        raw = rectified(x, inverse, real, MASKED)
        d_y = d_phi
        if POWER > 1:
            y, lower, first, second, _back = _focused(raw, given_first, given_second, POWER, NORM, ROWS, SIDE, W)
            top = lower * y
            if NORM == "given":
                dot = given_dot
            else:
                dot = squares(d_phi * top, ROWS, SIDE, W, NORM)
            safe_first = tl.where(first == 0.0, 1.0, first)
            safe_second = tl.where(second == 0.0, 1.0, second)
            towards = (d_phi - dot / safe_second * top) * lower * (POWER * tl.sqrt(safe_first / safe_second))
            d_y = towards + y * (dot / tl.sqrt(safe_first) / tl.sqrt(safe_second))
        d_x = tl.where(x > 0.0, d_y * inverse[None, :] * (1.0 / UNIT), 0.0)
        d_log = d_y * raw * (1.0 / UNIT)
    else:
        if KIND == "softmax":
            d_x = phi * (d_phi - spread(per_head(phi * d_phi, ROWS, SIDE, W), ROWS, SIDE, W))
        elif KIND == "elu":
            d_x = d_phi * tl.where(x > 0.0, 1.0, phi)
        else:
            d_x = tl.where(x > 0.0, d_phi, 0.0)
        d_log = d_x
    return d_x, d_log


_POINTERS = dict.fromkeys(("q", "k", "v", "x", "y", "out", "d_out", "d_q", "d_k", "d_v", "matrix", "d_matrix"), "*bf16")
_POINTERS |= {"cu": "*i32", "lengths": "*i32", "past": "*i64"}
_NUMBERS = {"L": "i32", "L_q": "i32", "L_k": "i32", "P": "i32", "TOTAL": "i32", "eps": "fp32"}
_OPTIONAL = ("cu", "lengths", "scale", "norms", "q_norms", "k_norms", "dots", "weight", "shift", "past", "conv", "bias")
_OPTIONAL += ("d_scale", "d_conv", "initial", "inverse")
_BF16 = r"mma\.sync\S*\.bf16"
MATRIX = {80: (_BF16,), 90: (rf"{_BF16}|wgmma\S*\.bf16",), 120: (_BF16,)}
MATRIX[100] = (rf"{_BF16}|tcgen05\.mma\S*kind::f16",)


def aot_case(
    name: str,
    kernel: Any,
    chips: tuple[int, ...],
    launch: tuple[int, int],
    constants: dict[str, Any],
    given: tuple[str, ...] = (),
    spills: int = 0,
) -> AotCase:
    """A kernel for bfloat16 with adjoining channels. ``launch``: warps and stages; ``given``: those of the optional
    pointers that are not None. Its products, where it has any, must be matrix instructions."""
    fixed = {name: 1 for name in kernel.arg_names if name.endswith("stride_d")}
    adjoining = constants.get("H", 1) * constants.get("D", 1)
    fixed |= {name: adjoining for name in kernel.arg_names if name.endswith("stride_l")}
    fixed |= {name: None for name in _OPTIONAL if name not in given}
    fixed = {name: value for name, value in (fixed | constants).items() if name in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument not in fixed:
            kind = "i32" if "stride" in argument else _NUMBERS.get(argument, "*fp32")
            signature[argument] = _POINTERS.get(argument, kind)
    return AotCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=fixed,
        instructions={chip: MATRIX[chip] if {"NORM", "JOINT"} & {*kernel.arg_names} else () for chip in chips},
        num_warps=launch[0],
        num_stages=launch[1],
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name),
        spills=spills,
    )


@triton.jit(do_not_specialize=["L", "TOTAL"])
def norms_kernel(
    x,
    scale,
    norms,
    x_stride_b,
    x_stride_l: tl.constexpr,
    x_stride_h,
    x_stride_d,
    L,
    TOTAL,
    H: tl.constexpr,
    D: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
    W: tl.constexpr,
):
    """A tile of rows: the squares of base and base^p (see ``triton_features.py``), summed over all heads, to norms (2,
    TOTAL)."""
    at = tl.program_id(0) * ROWS
    batch = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    MASKED: tl.constexpr = H % SIDE != 0 or D != W
    first = tl.zeros((ROWS,), tl.float32)
    second = tl.zeros((ROWS,), tl.float32)
    size = tl.zeros((ROWS, 1), tl.float32) + 1.0
    for turn in tl.static_range(1 if POWER <= DIRECT_POWER else 2):
        for group in range((H + SIDE - 1) // SIDE):
            head, within, real = channels(group, H, D, SIDE, W)
            offset = row[:, None] * x_stride_l + (head * x_stride_h + within * x_stride_d)[None, :]
            tile = load_tile(x + batch * x_stride_b, batch * 0, at, offset, row, L, x_stride_l, real, MASKED).to(
                tl.float32
            )
            inverse = tl.zeros((SIDE * W,), tl.float32) + UNIT
            if scale is not None:
                inverse = UNIT / tl.load(scale + head * D + within, mask=real, other=1.0)
            y = rectified(tile, inverse, real, MASKED)
            if turn == 0:
                first += tl.sum(y * y, axis=1)
            if turn == 1 or POWER <= DIRECT_POWER:
                top = to_power(y / size, POWER)
                second += tl.sum(top * top, axis=1)
        if POWER > DIRECT_POWER:
            size = tl.sqrt(tl.where(first == 0.0, 1.0, first))[:, None]
    flat = batch * L + at + row
    tl.store(norms + flat, first, mask=at + row < L)
    tl.store(norms + TOTAL + flat, second, mask=at + row < L)


def aot_cases() -> list[AotCase]:
    """The norms of twelve heads of 128."""
    shape = {"H": 12, "D": 128, "W": 128, "SIDE": 1, "ROWS": 64, "POWER": 3}
    return [aot_case("linear_norms", norms_kernel, (80, 90, 100, 120), (8, 3), shape, ("norms",))]
