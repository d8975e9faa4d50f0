"""Rows of a transformer block in one pass each, in Triton: gated residual, norm, modulation, activation, 8 bits.

``h = x + branch * gate; y = norm(h) * weight + bias; y = y * (1 + scale) + shift; y = activation(y)``, each part only
where it is asked for, then y as it is or as 8-bit values with a scale. A row's scale needs the row alone; that of a
128 x 128 tile needs 128 rows, so there ``rows_kernel`` leaves mean and deviation, and ``tiles_kernel`` does the rest.

Shapes: M rows, L of which share an entry of the modulation, C channels, KP = C rounded up to 16. Tiles: ROWS rows,
WIDTH channels.
"""

import triton
import triton.language as tl

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.triton_nvfp4_quant import e4m3_code
from allears.ops.attention.lowbit.triton_quant import inverse_of, largest, scale_of, to_int8

INT8, FP8 = 1, 2
PADDED = tl.constexpr(16)
"""With fewer channels, a thread may hold padding alone, so that pairs of its E4M3 numbers are known to be equal, and
PTXAS 12.8 (Triton 3.6) then packs them with half of a register that nothing wrote. There, integers make the codes."""


@triton.jit
def eight_bits(y, inverse, TO: tl.constexpr, HARDWARE: tl.constexpr):
    """Bytes of float32 y times the inverse of its scale: int8 (TO 1) or E4M3 (TO 2)."""
    if TO == 1:
        code = to_int8(y, inverse).to(tl.uint8, bitcast=True)
    else:
        scaled = tl.where(inverse == 0.0, 0.0, y * inverse)
        if HARDWARE:
            code = tl.clamp(scaled, -448.0, 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            sign = tl.where(scaled.to(tl.int32, bitcast=True) < 0, 128, 0)
            code = (e4m3_code(tl.abs(scaled)) | sign).to(tl.uint8)
    return code


@triton.jit
def scale_to(amax, TO: tl.constexpr):
    """The scale of a group whose largest magnitude is ``amax``."""
    return scale_of(amax, 127.0) if TO == 1 else scale_of(amax, 448.0)


@triton.jit
def activate(y, ACT: tl.constexpr):
    """ACT "gelu_tanh" or "silu"; anything else leaves y as it is."""
    if ACT == "gelu_tanh":
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACT == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def modulate(y, weight, bias, scale, shift, entry, inside, channel, stride_b, stride_l, there):
    """y (rows, channels) times ``weight`` plus ``bias``, times ``1 + scale`` plus ``shift`` of its entry and row."""
    if weight is not None:
        y = y * tl.load(weight + channel[None, :], mask=there, other=0.0).to(tl.float32)
    if bias is not None:
        y = y + tl.load(bias + channel[None, :], mask=there, other=0.0).to(tl.float32)
    place = (entry * stride_b + inside * stride_l)[:, None] + channel[None, :]
    if scale is not None:
        y = y * (1.0 + tl.load(scale + place, mask=there, other=0.0).to(tl.float32))
    if shift is not None:
        y = y + tl.load(shift + place, mask=there, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M", "L"])
def rows_kernel(
    x,
    branch,
    gate,
    total,
    weight,
    bias,
    scale,
    shift,
    out,
    out_scale,
    moments,
    M,
    L,
    eps,
    x_stride,
    branch_stride,
    gate_stride_b,
    gate_stride_l,
    mod_stride_b,
    mod_stride_l,
    C: tl.constexpr,
    KP: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    TO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """x (M, C) to out: (M, C), or bytes (M, KP) with out_scale (M,). ``total`` (M, C) gets the residual sum, and
    ``moments`` (2, M) mean and inverse deviation; where it is given, there is no out."""
    short = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = short.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    real = (channel < C)[None, :]
    there = (row < M)[:, None] & real
    entry, inside = (short // L).to(tl.int64), (short % L).to(tl.int64)
    h = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + row[:, None] * branch_stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
        if gate is not None:
            at = (entry * gate_stride_b + inside * gate_stride_l)[:, None] + channel[None, :]
            added = added * tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
        rounded = (h + added).to(x.dtype.element_ty)
        if total is not None:
            tl.store(total + row[:, None] * C + channel[None, :], rounded, mask=there)
        h = rounded.to(tl.float32)
    y = h
    if NORM == "layer":
        mean = tl.sum(h, axis=1) / C
        if moments is not None:
            tl.store(moments + row, mean, mask=row < M)
        y = tl.where(real, h - mean[:, None], 0.0)
    if NORM != "none":
        inverse = tl.rsqrt(tl.sum(y * y, axis=1) / C + eps)
        if moments is not None:
            tl.store(moments + M + row, inverse, mask=row < M)
        y = y * inverse[:, None]
    if moments is None and out is not None:
        y = modulate(y, weight, bias, scale, shift, entry, inside, channel, mod_stride_b, mod_stride_l, there)
        y = activate(y, ACT)
        if TO == 0:
            tl.store(out + row[:, None] * C + channel[None, :], y.to(out.dtype.element_ty), mask=there)
        else:
            y = tl.where(real, y, 0.0)
            factor = scale_to(largest(y, 1, HARDWARE), TO)
            code = eight_bits(y, inverse_of(factor)[:, None], TO, HARDWARE and C >= PADDED)
            stored = (row < M)[:, None] & (channel < KP)[None, :]
            tl.store(out + row[:, None] * KP + channel[None, :], code, mask=stored)
            tl.store(out_scale + row, factor, mask=row < M)


@triton.jit(do_not_specialize=["M", "L"])
def tiles_kernel(
    x,
    weight,
    bias,
    scale,
    shift,
    out,
    out_scale,
    moments,
    M,
    L,
    x_stride,
    mod_stride_b,
    mod_stride_l,
    C: tl.constexpr,
    KP: tl.constexpr,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    TO: tl.constexpr,
    TILE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """A tile of x (M, C) to bytes out (M, KP) and out_scale (ceil(M / TILE), ceil(C / TILE))."""
    down, across = tl.program_id(0), tl.program_id(1)
    short = down * TILE + tl.arange(0, TILE)
    row = short.to(tl.int64)
    channel = across * TILE + tl.arange(0, TILE)
    there = (row < M)[:, None] & (channel < C)[None, :]
    y = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=there, other=0.0).to(tl.float32)
    if NORM == "layer":
        y = y - tl.load(moments + row, mask=row < M, other=0.0)[:, None]
    if NORM != "none":
        y = y * tl.load(moments + M + row, mask=row < M, other=0.0)[:, None]
    entry, inside = (short // L).to(tl.int64), (short % L).to(tl.int64)
    y = modulate(y, weight, bias, scale, shift, entry, inside, channel, mod_stride_b, mod_stride_l, there)
    y = tl.where(there, activate(y, ACT), 0.0)
    factor = scale_to(largest(largest(y, 1, HARDWARE), 0, HARDWARE), TO)
    code = eight_bits(y, inverse_of(factor), TO, HARDWARE and C >= PADDED)
    stored = (row < M)[:, None] & (channel < KP)[None, :]
    tl.store(out + row[:, None] * KP + channel[None, :], code, mask=stored)
    tl.store(out_scale + down * tl.cdiv(C, TILE) + across, factor)


def row_sizes(channels: int) -> tuple[int, int, int]:
    """ROWS, WIDTH and warps of ``rows_kernel``."""
    width = max(16, triton.next_power_of_2(channels))
    rows = max(1, 2048 // width)
    return rows, width, min(16, max(4, width // 1024))


def aot_cases() -> list[AotCase]:
    """A modulated layer norm with residual, a plain quantiser, an activation, for the widths of Wan's layers."""
    pointers = {"x": "*bf16", "branch": "*bf16", "gate": "*fp32", "total": "*bf16", "weight": "*fp32", "bias": "*fp32"}
    pointers |= {"scale": "*fp32", "shift": "*fp32", "out": "*u8", "out_scale": "*fp32", "moments": "*fp32"}
    numbers = {"M": "i32", "L": "i32", "eps": "fp32", "x_stride": "i32", "branch_stride": "i32"}
    numbers |= dict.fromkeys(("gate_stride_b", "gate_stride_l", "mod_stride_b", "mod_stride_l"), "i32")
    strides = tuple(name for name in numbers if "stride" in name)
    cases = []

    def add(name, kernel, given, consts, chips, instructions=(), **launch):
        names = [n for n in kernel.arg_names if n not in consts]
        signature = {n: {**pointers, **numbers}[n] for n in names if n in given or n in numbers}
        absent = {n: None for n in names if n not in signature}
        aligned = tuple(n for n in signature if n in pointers or n in strides)
        asked = dict.fromkeys(chips, instructions)
        cases.append(AotCase(name, kernel, signature, {**absent, **consts}, asked, aligned=aligned, **launch))

    everything = ("x", "branch", "gate", "total", "scale", "shift", "out", "out_scale")
    for channels, to, chips in ((1536, 2, (90, 100, 120)), (5120, 1, (80, 90, 100, 120)), (13_824, 2, (90, 120))):
        rows, width, warps = row_sizes(channels)
        consts = {"C": channels, "KP": channels, "TO": to, "ROWS": rows, "WIDTH": width, "HARDWARE": True}
        full = {**consts, "NORM": "layer", "ACT": "none"}
        plain = {**consts, "NORM": "none", "ACT": "gelu_tanh"}
        if channels < 8192:
            add(f"fused_rows_layer_{channels}_{to}", rows_kernel, everything, full, chips, num_warps=warps)
        add(f"fused_rows_gelu_{channels}_{to}", rows_kernel, ("x", "out", "out_scale"), plain, chips, num_warps=warps)
    for to, chips in ((1, (80, 90, 100, 120)), (2, (90, 100, 120))):
        consts = {"C": 1536, "KP": 1536, "TO": to, "TILE": 128, "HARDWARE": True}
        full, plain = {**consts, "NORM": "layer", "ACT": "none"}, {**consts, "NORM": "none", "ACT": "none"}
        given = ("x", "scale", "shift", "out", "out_scale", "moments")
        add(f"fused_tiles_layer_{to}", tiles_kernel, given, full, chips, num_warps=8)
        add(f"fused_tiles_plain_{to}", tiles_kernel, ("x", "out", "out_scale"), plain, chips, num_warps=8)
    rows, width, warps = row_sizes(5)
    consts = {"C": 5, "KP": 16, "TO": 2, "HARDWARE": True, "NORM": "none", "ACT": "none"}
    integers = (r"0f46800000",)  # the 2^14 of e4m3_code
    plain = {**consts, "ROWS": rows, "WIDTH": width}
    add("fused_rows_padded", rows_kernel, ("x", "out", "out_scale"), plain, (90,), integers, num_warps=warps)
    plain = {**consts, "TILE": 128}
    add("fused_tiles_padded", tiles_kernel, ("x", "out", "out_scale"), plain, (90,), integers, num_warps=8)
    return cases
