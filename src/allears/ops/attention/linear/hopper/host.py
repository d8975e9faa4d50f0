"""Linear attention over both directions on Hopper by the CUDA C++ kernels of this folder: for which calls, and how
launched.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, C = H * D channels in G groups of 64, K taps of the
convolution of V; packed sequences are (1, T, H, D) with E = S entries, else E = B; P parts of a sequence.
"""

import ctypes
from ctypes import c_float, c_int, c_longlong, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from allears.ops.attention.linear.hopper.forms import GROUP, ROWS, Form, form_of
from allears.ops.attention.linear.one_call import Call, processors
from allears.ops.attention.lowbit.hopper.host import kernel
from allears.ops.nvrtc import Kernel, TensorMap, tensor_map

FOLDER = Path(__file__).parent
THREADS = 384
_MOST_TAPS = 7
_MOST_POWER = 3
_ALIGNMENT = 16  # bytes, of what bulk copies read
_MOST_MAPS = 256
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _StatesParams(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("parts", "scale", "cu", "lengths")) + tuple(
        (name, c_int) for name in ("wide", "keys")
    )


class _OutputParams(ctypes.Structure):
    _fields_ = tuple(
        (name, c_void_p) for name in ("matrix", "sums", "scale", "conv", "bias", "cu", "lengths", "out")
    ) + tuple(
        (name, c_longlong) for name in ("conv_head", "conv_channel", "conv_tap", "bias_head", "bias_channel")
    ) + tuple(
        (name, c_int) for name in ("conv_kind", "bias_kind", "wide", "entries", "queries", "keys")
    ) + (("eps", c_float),)  # fmt: skip


def states_fit(k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether :func:`part_states` runs the pass over the keys of a call that ``triton_groups_host.takes`` takes: on a
    GPU, focused features of the second or third power with a norm over all heads, and rows and entries that begin at
    multiples of 16 bytes."""
    if not (k.is_cuda and call.joint and call.power <= _MOST_POWER and k.numel()):
        return False
    return call.entries(k) < 2**16 and copied_in_bulk(k) and copied_in_bulk(v)


def output_fits(q: Tensor, v: Tensor, taps: int, call: Call) -> bool:
    """Whether :func:`output` runs the pass over the queries: as :func:`states_fit`, with no taps or an odd number up
    to 7."""
    if not states_fit(q, v, call) or not v.shape[1]:
        return False
    tiles = -(-q.shape[1] // ROWS) * q.shape[0]
    return taps <= _MOST_TAPS and (taps == 0 or taps % 2 == 1) and tiles < 2**30


def copied_in_bulk(x: Tensor) -> bool:
    """Whether a bulk copy can read x (B, L, H, D), whose channels adjoin. Steps in a dimension of one do not count."""
    if x.data_ptr() % _ALIGNMENT:
        return False
    each = _ALIGNMENT // x.element_size()
    return all(n == 1 or (step > 0 and step % each == 0) for n, step in zip(x.shape[:2], x.stride()[:2], strict=True))


def part_count(k: Tensor, call: Call) -> int:
    """P: as many parts of each entry's keys as run at once, or one a tile."""
    entries = call.entries(k)
    rows = -(-k.shape[0] * k.shape[1] // entries)
    return max(1, min(-(-processors(k.device) // entries), -(-rows // form_of(k, call.power).tile_rows)))


def part_states(k: Tensor, v: Tensor, scale: Tensor | None, parts: Tensor, call: Call) -> None:
    """phi(k)^T v and sum phi(k) of each part to parts (E, P, C * (D + 1)) float32; of calls that :func:`states_fit`.

    Args:
        k, v: (B, L_k, H, D), 16 bit, adjoining channels, not empty.
        scale: (H, D) or None.
    """
    form = form_of(k, call.power)
    scale = None if scale is None else scale.float().contiguous()
    cu, lengths, wide = _bounds(call)
    params = _StatesParams(parts.data_ptr(), _pointer(scale), _pointer(cu), _pointer(lengths), wide, k.shape[1])
    maps = rows_map(k, form.groups, ROWS), rows_map(v, form.groups, ROWS)
    _kernel("states.cu", "linear_states", form, k.device)((parts.shape[1], parts.shape[0], 1), THREADS, *maps, params)


def output(
    q: Tensor,
    v: Tensor,
    matrix: Tensor,
    sums: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    out: Tensor,
    call: Call,
) -> None:
    """phi(q) matrix / (phi(q) . sums + eps) + convolution of v, to out; of calls that :func:`output_fits`.

    Args:
        q, v: (B, L_q, H, D) and (B, L_k, H, D), 16 bit, adjoining channels, not empty.
        matrix: (E, H, D, D) in the dtype of q, contiguous.
        sums: (E, H, D) float32, contiguous.
        scale: (H, D) or None.
        conv_weight: (H, D, K), or (D, K) of all heads, or None.
        conv_bias: (H, D), or (D,), or None; read only beside a weight.
        out: like q, contiguous.
    """
    batch, queries = q.shape[:2]
    entries = call.entries(q)
    form = form_of(q, call.power, 0 if conv_weight is None else conv_weight.shape[-1])
    scale = None if scale is None else scale.float().contiguous()
    weight, bias = _numbers(conv_weight), None if conv_weight is None else _numbers(conv_bias)
    cu, lengths, wide = _bounds(call)
    params = _OutputParams(
        matrix.data_ptr(), sums.data_ptr(), _pointer(scale), _pointer(weight), _pointer(bias), _pointer(cu),
        _pointer(lengths), out.data_ptr(),
        *((0, 0, 0) if weight is None else (0, *weight.stride())[-3:]),
        *((0, 0) if bias is None else (0, *bias.stride())[-2:]),
        0 if weight is None else _KINDS[weight.dtype], 0 if bias is None else _KINDS[bias.dtype],
        wide, entries, queries, v.shape[1], call.eps,
    )  # fmt: skip
    q_map = rows_map(q, form.groups, ROWS)
    v_map = rows_map(v, form.groups, form.v_rows) if form.taps else q_map
    parallel = processors(q.device)
    if cu is not None:
        grid = (max(1, min(-(-parallel // entries), -(-queries // (entries * form.tile_rows)))), entries, 1)
    else:
        grid = (min(parallel, -(-queries // form.tile_rows) * batch), 1, 1)
    _kernel("output.cu", "linear_output", form, q.device)(grid, THREADS, q_map, v_map, params)


@cache
def _kernel(file: str, function: str, form: Form, device: torch.device) -> Kernel:
    return kernel(file, function, device, form.shared_bytes, FOLDER, **form.defines())


_maps: dict[tuple[object, ...], TensorMap] = {}


def rows_map(x: Tensor, groups: int, rows: int) -> TensorMap:
    """For copies of ``rows`` rows of all channels of x (B, L, H, D) as (G, rows, 64), rows of 128 bytes swizzled.

    A map holds an address and sizes, nothing of a tensor; the last ones are kept, since one takes longer than a launch.
    """
    batch, length = x.shape[:2]
    step_b, step_l = x.stride()[:2]
    step_l = step_l if length > 1 else groups * GROUP
    step_b = step_b if batch > 1 else step_l * length
    key = (x.data_ptr(), batch, length, step_b, step_l, groups, rows, x.dtype)
    made = _maps.get(key)
    if made is None:
        if len(_maps) >= _MOST_MAPS:
            _maps.clear()
        seen = x.as_strided((batch, groups, length, GROUP), (step_b, GROUP, step_l, 1))
        made = _maps[key] = tensor_map(seen, (1, groups, rows, GROUP), 2 * GROUP)
    return made


def _bounds(call: Call) -> tuple[Tensor | None, Tensor | None, int]:
    """cu, lengths, and whether the one that is given has 64 bit."""
    cu = None if call.cu is None else call.cu.contiguous()
    lengths = None if call.lengths is None else call.lengths.contiguous()
    given = lengths if cu is None else cu
    return cu, lengths, int(given is not None and given.dtype == torch.int64)


def _numbers(x: Tensor | None) -> Tensor | None:
    """As the kernel reads them: float32, bfloat16 or float16."""
    return x if x is None or x.dtype in _KINDS else x.float()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
