"""Linear attention over both directions by the kernels of ``triton_groups.py``: for which calls, and how launched.
Most calls on a GPU go to the CUDA C++ kernels of ``hopper/``, which do the same from less waiting.

Shapes: B batch, L_q queries, L_k keys, H heads, D head size, C = H * D channels, K taps of the convolution of V; packed
sequences are (1, T, H, D) with E = S entries, else E = B; P parts of a sequence.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.linear.hopper import host as hopper
from allears.ops.attention.linear.one_call import Call, processors
from allears.ops.attention.linear.triton_features import DIRECT_POWER
from allears.ops.attention.linear.triton_fwd import mean_kernel
from allears.ops.attention.linear.triton_groups import GROUP, group_output_kernel, group_states_kernel
from allears.ops.launches import Known

HOPPER_STATES = True
"""Whether calls that it fits go to ``hopper/states.cu``; else to :func:`group_states_kernel`."""
HOPPER_OUTPUT = True
"""Whether calls that it fits go to ``hopper/output.cu``; else to :func:`group_output_kernel`."""
_MOST_GROUPS = 8  # whose sums fit the registers of a program
_CAPABILITY = 9  # for other chips Triton 3.6 cannot compile the sums over the keys
_MEAN_BLOCK, _MEAN_STEP = 128, 16
_STATES, _MEAN, _OUTPUT = Known(group_states_kernel), Known(mean_kernel), Known(group_output_kernel)


class Launch(NamedTuple):
    """Rows of a tile, warps, stages, most registers a thread (0: any), and programs a multiprocessor."""

    rows: int
    warps: int
    stages: int
    registers: int
    programs: int

    def options(self) -> dict[str, int]:
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def states_launch(channels: int) -> Launch:
    """How the sums over the keys are launched."""
    return Launch(32, 8, 2, 0, 1) if channels > 128 else Launch(32, 4, 2, 0, 3)


def output_launch(channels: int) -> Launch:
    """How the pass over the queries is launched."""
    return Launch(64, 8, 1, 128, 2)


def takes(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether these kernels run the call: on Hopper, 16-bit numbers, heads of 16, 32 or 64 that fill up to 8 groups of
    64 channels, adjoining in memory, and a norm over all heads at most of the third power."""
    heads, size = q.shape[2:]
    if q.element_size() != 2 or size not in (16, 32, 64) or heads * size % GROUP.value:
        return False
    if heads * size > _MOST_GROUPS * GROUP.value or (call.joint and call.power > DIRECT_POWER.value):
        return False
    adjoining = all(x.stride(3) == 1 and x.stride(2) == size for x in (q, k, v))
    return adjoining and capability(q.device) == _CAPABILITY


def capability(device: torch.device) -> int:
    """Major compute capability; in Triton's interpreter that of the chip these kernels are for."""
    return _capability(device.index) if device.type == "cuda" else _CAPABILITY


@cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_capability(index)[0]


def group_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``triton_host.linear_forward``, of calls that :func:`takes` takes.

    Args:
        conv_weight: (H, D, K), or (D, K) of all heads.
        conv_bias: (H, D) or (D,).
    """
    (heads, size), device = q.shape[2:], q.device
    channels, entries = heads * size, call.entries(q)
    in_cuda = HOPPER_STATES and hopper.states_fit(k, v, call)
    count = hopper.part_count(k, call) if in_cuda else parts_of(k, call, states_launch(channels))
    parts = torch.empty(entries, count, channels * (size + 1), device=device)
    matrix = torch.empty(entries, heads, size, size, dtype=q.dtype, device=device)
    sums = torch.empty(entries, heads, size, device=device)
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    if parts.numel():
        if in_cuda:
            hopper.part_states(k, v, scale, parts, call)
        else:
            _part_states(k, v, scale, parts, call)
        sizes = {"MATRIX": channels * size, "SUMS": channels, "STEP": _MEAN_STEP, "BLOCK": _MEAN_BLOCK}
        arguments = (parts, call.cu, call.lengths, matrix, sums, k.shape[1], count)
        _MEAN((-(-parts.shape[2] // _MEAN_BLOCK), entries, 1), arguments, sizes, num_warps=4)
    if out.numel() and entries:
        taps = 0 if conv_weight is None else conv_weight.shape[-1]
        run = hopper.output if HOPPER_OUTPUT and hopper.output_fits(q, v, taps, call) else _output
        run(q, v, matrix, sums, scale, conv_weight, conv_bias, out, call)
    return out, matrix, sums


def _fixed(x: Tensor, call: Call) -> dict[str, object]:
    """What both kernels are compiled for."""
    power = call.power if call.kind == "focused" else 1
    return {"H": x.shape[2], "D": x.shape[3], "KIND": call.kind, "POWER": power, "JOINT": call.joint}


def _inverse(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float().reciprocal()


def _part_states(k: Tensor, v: Tensor, scale: Tensor | None, parts: Tensor, call: Call) -> None:
    """phi(k)^T v and sum phi(k) of each part to parts (E, P, C * (D + 1))."""
    how = states_launch(k.shape[2] * k.shape[3])
    steps = (*k.stride()[:2], *v.stride()[:2])
    arguments = (k, v, _inverse(scale), call.cu, call.lengths, parts, *steps, k.shape[1])
    constants = {**_fixed(k, call), "ROWS": how.rows}
    _STATES((parts.shape[1], parts.shape[0], 1), arguments, constants, _steps(k, v), **how.options())


def _output(
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
    """phi(q) matrix / (phi(q) . sums + eps) + convolution of v, to out."""
    heads = q.shape[2]
    taps = 0 if conv_weight is None else conv_weight.shape[-1]
    conv = None if conv_weight is None else _of_heads(conv_weight.float().movedim(-1, 0), heads)
    bias = None if conv_weight is None or conv_bias is None else _of_heads(conv_bias.float()[None], heads)
    how = output_launch(heads * q.shape[3])
    tensors = (q, v, _inverse(scale), matrix, sums, conv, bias, call.cu, call.lengths, out)
    steps = (*q.stride()[:2], *v.stride()[:2], *out.stride()[:2])
    constants = {**_fixed(q, call), "TAPS": taps, "ROWS": how.rows, "AHEAD": q.is_cuda and v.numel() > 0}
    arguments = (*tensors, *steps, q.shape[1], v.shape[1], call.eps)
    _OUTPUT((parts_of(q, call, how), call.entries(q), 1), arguments, constants, _steps(q, v, out), **how.options())


def parts_of(x: Tensor, call: Call, how: Launch) -> int:
    """P: as many parts of the rows of x as run at once, or fewer where there are no two tiles for each."""
    entries = max(1, call.entries(x))
    rows = -(-x.shape[1] // entries) if call.cu is not None else x.shape[1]
    return max(1, min(-(-processors(x.device) * how.programs // entries), -(-rows // (2 * how.rows))))


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """(K, D) of all heads as (K, H, D), contiguous; (K, H, D) likewise."""
    if x.dim() == 3:
        return x.contiguous()
    return x[:, None].expand(x.shape[0], heads, x.shape[1]).contiguous()


def _steps(*tensors: Tensor) -> tuple[object, ...]:
    """What a kernel is compiled for of the strides."""
    return tuple((x.stride(1), x.stride(0) % 16 == 0, x.stride(0) == 1, x.stride(0) >= 2**31) for x in tensors)
