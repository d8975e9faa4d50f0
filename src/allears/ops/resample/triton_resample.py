"""Audio read between its samples in Triton: a sample's 16 taps stay in registers, and nothing is padded or scattered.

A program of the laying kernel makes a block of one row: it goes through the row's stretches, in their order, so the
sums are the same in every run. Where all are brought to one level, a kernel before it leaves the energy of each
stretch, block by block.

Shapes: S stretches, R rows, T samples of a row, N samples read of each stretch, P blocks of the longest stretch.
Tiles: BLOCK samples.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from allears.core.host_arrays import on_device
from allears.ops.aot import AotCase
from allears.ops.resample.reference import FADE, QUIETEST, TAPS
from allears.ops.resample.stretches import COLUMNS, Stretches

_BLOCK = 256
_PI = tl.constexpr(3.141592653589793)
_HALF = tl.constexpr(TAPS // 2)
_WIDE = tl.constexpr(TAPS + 1)
_FADE = tl.constexpr(FADE)
_QUIETEST = tl.constexpr(QUIETEST)
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _sine(x):
    """sin(pi x) for |x| of 1/2 at most, by its series; the next term is below 1e-9."""
    z = x * x
    series = 0.000466302806
    series = -0.00737043095 + z * series
    series = 0.0821458866 + z * series
    series = -0.599264529 + z * series
    series = 2.55016404 + z * series
    series = -5.16771278 + z * series
    return x * (3.14159265 + z * series)


@triton.jit
def _sinc_weight(distance, cutoff):
    """cutoff * sinc(cutoff * distance) * window, for |distance| of TAPS / 2 at most."""
    place = cutoff * distance
    whole = tl.floor(place + 0.5)
    sine = _sine(place - whole)
    sine = tl.where((whole.to(tl.int32) & 1) == 0, sine, -sine)
    window = _sine(0.5 - tl.abs(distance) / _WIDE)
    middle = distance == 0
    sinc = tl.where(middle, cutoff, sine / tl.where(middle, 1.0, _PI * distance))
    return sinc * window * window


@triton.jit
def _read(flat, first, last, speed, position, there):
    """``flat`` at position (BLOCK,), float64, where ``there``; first, last and speed are one number each."""
    floor = tl.floor(position)
    fraction = (position - floor).to(tl.float32)
    room = last - first
    base = tl.minimum(tl.maximum(floor.to(tl.int64) - first, -2 * _HALF), room + 2 * _HALF).to(tl.int32)
    cutoff = tl.where(speed > 1, 0.97 / speed, 1.0)
    total = tl.zeros_like(fraction)
    for tap in tl.static_range(1 - _HALF, _HALF + 1):
        index = base + tap
        sample = tl.load(flat + first + index, mask=there & (index >= 0) & (index < room), other=0).to(tl.float32)
        total += sample * _sinc_weight(tap - fraction, cutoff)
    return total


@triton.jit
def _stretch(flat, entry, n):
    """Samples n (BLOCK,) of the stretch whose numbers begin at ``entry``, faded; zeros before and after it."""
    first = tl.load(entry).to(tl.int64)
    last = tl.load(entry + 1).to(tl.int64)
    begin = tl.load(entry + 2)
    length = tl.load(entry + 3).to(tl.int32)
    speed = tl.load(entry + 6)
    there = (n >= 0) & (n < length)
    values = _read(flat, first, last, speed.to(tl.float32), begin + speed * n.to(tl.float64), there) / 32768.0
    ramp = tl.minimum(tl.maximum(tl.minimum(n + 1, length - n), 0), _FADE).to(tl.float32) / _FADE
    return values * ramp


@triton.jit(do_not_specialize=["N"])
def read_kernel(flat, first, last, position, speed, out, N, BLOCK: tl.constexpr):
    """position (S, N) to out (S, N), both contiguous."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < N
    place = row * N + n
    where = tl.load(position + place, mask=there, other=0.0)
    values = _read(flat, tl.load(first + row), tl.load(last + row), tl.load(speed + row), where, there)
    tl.store(out + place, values, mask=there)


@triton.jit(do_not_specialize=["P"])
def energy_kernel(flat, table, out, P, BLOCK: tl.constexpr):
    """The energy of each block of each stretch, out (S, P)."""
    place = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    entry = table + place * _COLUMNS
    energy = 0.0
    if block * BLOCK < tl.load(entry + 3).to(tl.int32):
        values = _stretch(flat, entry, block * BLOCK + tl.arange(0, BLOCK))
        energy = tl.sum(values * values, axis=0)
    tl.store(out + place * P + block, energy)


@triton.jit(do_not_specialize=["T", "P"])
def lay_kernel(flat, bounds, table, energy, out, T, P, EVEN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """bounds (R + 1,), table (S, 8) with the rows in order, and if EVEN energy (S, P) to out (R, T). PARTS is P or
    more."""
    row = tl.program_id(1)
    begin = tl.program_id(0) * BLOCK
    t = begin + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in range(tl.load(bounds + row).to(tl.int32), tl.load(bounds + row + 1).to(tl.int32)):
        entry = table + place * _COLUMNS
        length = tl.load(entry + 3).to(tl.int32)
        at = tl.load(entry + 5).to(tl.int32)
        if (at < begin + BLOCK) & (at + length > begin):
            values = _stretch(flat, entry, t - at)
            if EVEN:
                part = tl.arange(0, PARTS)
                parts = tl.load(energy + place * P.to(tl.int64) + part, mask=part < P, other=0.0)
                level = tl.sqrt(tl.sum(parts, axis=0) / length.to(tl.float32))
                values = values / tl.maximum(level, _QUIETEST)
            total += values * tl.load(entry + 7).to(tl.float32)
    tl.store(out + row.to(tl.int64) * T + t, total, mask=t < T)


def read_forward(flat: Tensor, first: Tensor, last: Tensor, position: Tensor, speed: Tensor) -> Tensor:
    """See :func:`~allears.ops.resample.call.read_at`."""
    position = position.to(torch.float64).contiguous()
    out = position.new_empty(position.shape, dtype=torch.float32)
    if out.numel():
        first, last, speed = (x.contiguous() for x in (first, last, speed.to(torch.float32)))
        count, samples = position.shape
        with torch.cuda.device_of(flat):
            read_kernel[(triton.cdiv(samples, _BLOCK), count)](
                flat, first, last, position, speed, out, samples, BLOCK=_BLOCK, num_warps=4
            )
    return out


def lay_forward(flat: Tensor, stretches: Stretches, rows: int, frames: int, even_level: bool) -> Tensor:
    """See :func:`~allears.ops.resample.call.lay`."""
    out = flat.new_empty((rows, frames), dtype=torch.float32)
    count = len(stretches.table)
    if not count or not out.numel():
        return out.zero_()
    numbers = on_device(flat.device, stretches.by_row(rows), "float64")
    bounds, table = numbers[: rows + 1], numbers[rows + 1 :]
    blocks = triton.cdiv(int(stretches.table[:, 3].max()), _BLOCK) if even_level else 1
    energy = out.new_empty((count, blocks)) if even_level else out
    with torch.cuda.device_of(flat):
        if even_level:
            energy_kernel[(blocks, count)](flat, table, energy, blocks, BLOCK=_BLOCK, num_warps=4)
        lay_kernel[(triton.cdiv(frames, _BLOCK), rows)](
            flat,
            bounds,
            table,
            energy,
            out,
            frames,
            blocks,
            EVEN=even_level,
            PARTS=triton.next_power_of_2(blocks),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out


def aot_cases() -> list[AotCase]:
    """Of recordings of 16 bits, and on Hopper of signals of 32, which need no conversion."""
    floats = {"position": "*fp64", "speed": "*fp32", "out": "*fp32"}
    cases = []
    for name, kind, capabilities in (("int16", "*i16", (80, 90, 100, 120)), ("float32", "*fp32", (90,))):
        chips = dict.fromkeys(capabilities, ())
        read = {"flat": kind, "first": "*i64", "last": "*i64", **floats, "N": "i32"}
        cases.append(AotCase(f"read_{name}", read_kernel, read, {"BLOCK": _BLOCK}, chips, aligned=("flat", "out")))
        shared = {"flat": kind, "table": "*fp64", "out": "*fp32", "P": "i32"}
        cases.append(AotCase(f"energy_{name}", energy_kernel, shared, {"BLOCK": _BLOCK}, chips, aligned=("flat",)))
        laid = {**shared, "bounds": "*fp64", "energy": "*fp32", "T": "i32"}
        for even in (False, True):
            sizes = {"EVEN": even, "PARTS": 256 if even else 1, "BLOCK": _BLOCK}
            cases.append(AotCase(f"lay_{name}_{even}", lay_kernel, laid, sizes, chips, aligned=("flat", "out")))
    return cases
