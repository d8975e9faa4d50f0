"""Forward of sparse-linear attention by the Triton kernels: what ``reference.py`` computes, on a GPU.

The states of the linear branch take D / 64 times the memory of the keys, so that heads are taken in groups: as many
*units* (key heads of an entry, each with its H / G query heads) as fit into ``scratch_fraction`` of the bytes of q, k
and v, and at least one. Of a group the states and the weights are made, multiplied (``torch.bmm``), and read by the
sparse kernel; the next group takes the same memory. Nothing waits for the GPU.

Shapes: B batch, E entries (B, or S packed sequences), L_q, L_k rows (packed: T_q, T_k), H query heads, G key heads, D
head size, DP = D padded, N_q, N_k blocks of the longest sequence, N_P = N_k padded to a multiple of 16, R width of the
row lists, U units of a group, U_H = U * H / G.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.lowbit.inputs import softmax_scale
from allears.ops.attention.lowbit.triton_host import HOPPER_SHARED_BYTES, LOG2_E, Launch, chip_of, missing_for
from allears.ops.attention.lowbit.triton_quant import on_hardware, padded_head_size
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry
from allears.ops.attention.sparse_linear.inputs import Projection
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.triton_fwd import sparse_linear_forward_kernel
from allears.ops.attention.sparse_linear.triton_pool import pool_keys_triton
from allears.ops.attention.sparse_linear.triton_states import prepare_units_kernel

Copies = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_ALIGNED_BLOCKS = 16  # of the contracted axis of the product of weights and states


class Forward(NamedTuple):
    """What the forward made.

    Args:
        out: like q, contiguous; in the form "sla" that of the softmax branch alone.
        lse: (B, H, L_q) or (H, T_q) float32, natural, of the logits of the given k over the listed keys.
        k_mean: (E, G, D) float32, or None where nothing is smoothed.
        o_linear: like out in the form "sla" (0 where a query block has no linear blocks), else None, as it is where the
            call has the projection, and out the sum.
    """

    out: Tensor
    lse: Tensor
    k_mean: Tensor | None
    o_linear: Tensor | None


class Groups(NamedTuple):
    """units of a group; overlaid: the 8-bit copies are made after the states were used, in the states' memory."""

    units: int
    overlaid: bool


@dataclass(frozen=True)
class UnitBytes:
    """Scratch of a unit: its states, the sums and weights that live beside them, and the 8-bit copies of k and v."""

    states: int
    others: int
    copies: int

    def groups(self, units: int, budget: float) -> Groups:
        """How many of ``units`` go together in ``budget`` bytes, in groups of about one size."""
        whole, overlaid = self.states + self.others + self.copies, self.others + max(self.states, self.copies)
        apart = self.copies > 0 and self.states > 0 and whole > budget
        fitting = max(1, int(budget // max(overlaid if apart else whole, 1)))
        count = -(-units // min(fitting, max(units, 1)))
        return Groups(-(-units // max(count, 1)), apart)


class Repeated:
    """A kernel that is launched again and again with other grids and numbers, and else the same arguments.

    Only its first launch goes through Triton's dispatcher, which takes longer than the work of a small group. Numbers
    that change must be in the kernel's ``do_not_specialize``.
    """

    def __init__(
        self, kernel: Any, arguments: Sequence[Any], constants: dict[str, Any], warps: int, stages: int
    ) -> None:
        self._kernel, self._arguments, self._constants = kernel, list(arguments), constants
        self._options = {"num_warps": warps, "num_stages": stages}
        self._compiled: Any = None
        assert [*kernel.arg_names[len(self._arguments) :]] == [*constants]

    def __call__(self, grid: tuple[int, int], **numbers: int) -> None:
        for name, number in numbers.items():
            self._arguments[self._kernel.arg_names.index(name)] = number
        if self._compiled is None:  # and always in the interpreter, which compiles nothing
            self._compiled = self._kernel[(*grid, 1)](*self._arguments, **self._constants, **self._options)
        else:
            self._compiled[(*grid, 1)](*self._arguments, *self._constants.values())


class Call(NamedTuple):
    """A call: q, k, v as (B, L, heads, D), packed ones with B = 1; what they stand for; and cu_q, cu_k or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Blocks
    options: SparseLinear
    geometry: Geometry
    k_mean: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None

    @property
    def entries(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def units(self) -> int:
        return self.entries * self.k.shape[2]

    @property
    def heads_a_unit(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    @property
    def padded(self) -> int:
        return padded_head_size(self.q.shape[3])

    @property
    def key_blocks(self) -> int:
        """N_P."""
        return -(-self.geometry.n_k // _ALIGNED_BLOCKS) * _ALIGNED_BLOCKS

    @property
    def wide(self) -> bool:
        return self.q.dtype == torch.float32


def forward_launch(
    padded: int, block_q: int, int8: bool, wide: bool = False, shared_bytes: int = HOPPER_SHARED_BYTES
) -> Launch:
    """The sparse kernel's launch by DP, queries of a block, numerics, whether q is float32, and the shared memory of a
    block."""
    if wide:
        return Launch(64, 8 if padded == 256 else 4, 1)
    rows = 64 if padded == 256 else block_q
    held = rows * padded * (1 if int8 else 2)
    stage = 64 * padded * (2 if int8 else 4)
    stages = next((n for n in (3, 2) if held + n * stage <= shared_bytes), 1)
    return Launch(rows, 8 if rows == 128 or padded == 256 else 4, stages)


def unit_bytes(call: Call) -> UnitBytes:
    """Scratch that a unit of the call takes."""
    element, padded, repeats = call.q.element_size(), call.padded, call.heads_a_unit
    state = (padded + 1) * padded * element
    linear = call.options.form != "sparse"
    return UnitBytes(
        states=call.key_blocks * state if linear else 0,
        others=repeats * call.geometry.n_q * (state + call.key_blocks * element) if linear else 0,
        copies=call.key_blocks * (2 * call.geometry.block_k * padded + 8) if call.options.precision != "exact" else 0,
    )


def sparse_linear_forward_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None = None,
    options: SparseLinear | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    k_mean: Tensor | None = None,
    proj: Projection | None = None,
    scratch_fraction: float = 0.1,
    launch: Launch | None = None,
) -> Forward:
    """The forward, without gradients, of arguments that ``inputs.check_call`` has passed.

    Args:
        q: (B, L_q, H, D), or packed (T_q, H, D), any strides, float16, bfloat16 or float32, D at most 256.
        k, v: (B, L_k, G, D) or (T_k, G, D).
        blocks, ratio, options, causal, scale: as in ``sparse_linear_attention``; the lists are not read back.
        cu_seqlens_q, cu_seqlens_k: int32 (S + 1); they need max_seqlen_q and max_seqlen_k.
        k_mean: (E, G, D) float32, contiguous, of a router that has made it already; it is made where needed.
        proj: of the form "sla", (D, D) and (D,) or None in the dtype of q: project the linear branch and add it here.
        scratch_fraction: share of the bytes of q, k and v that a group of heads may take as scratch. Larger groups are
            fewer launches. One unit is taken at least, which is up to (D / 128) / (E * G) of these bytes for 16-bit
            numbers and equal lengths, and a third more in ``int8_fp8``.
        launch: how the sparse kernel is launched; None takes :func:`forward_launch`.

    Raises:
        ValueError: the GPU lacks what the numerics need, packed sequences come without their maximum, or the launch
            does not fit the blocks.
    """
    options = options or SparseLinear()
    int8 = options.precision == "int8_fp8"
    missing = missing_for(q.device, "fp8" if int8 else "int8")
    if missing:
        raise ValueError(f"q: on {q.device}, but {missing}")
    call = gather_call(q, k, v, blocks, options, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, k_mean)
    launch = launch or forward_launch(call.padded, options.block_q, int8, call.wide, chip_of(q.device)[1])
    if options.block_q % launch.rows:
        raise ValueError(f"launch: {launch.rows} rows given; they must divide block_q, {options.block_q}")
    out = torch.empty(call.q.shape, dtype=q.dtype, device=q.device)
    o_linear = torch.empty_like(out) if options.form == "sla" and proj is None else None
    lse = torch.empty(out.shape[0], out.shape[2], out.shape[1], device=q.device)
    if out.numel() and call.geometry.n_k:
        _run(call, ratio, proj, out, o_linear, lse, softmax_scale(scale, q.shape[-1]), scratch_fraction, launch)
    else:
        out.zero_()
        lse.fill_(-torch.inf)
        o_linear = o_linear.zero_() if o_linear is not None else None
    if cu_seqlens_q is not None:
        return Forward(out[0], lse[0], call.k_mean, o_linear[0] if o_linear is not None else None)
    return Forward(out, lse, call.k_mean, o_linear)


def gather_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    options: SparseLinear,
    causal: bool,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    longest_q: int | None,
    longest_k: int | None,
    k_mean: Tensor | None,
) -> Call:
    """The arguments of a call as its kernels take them. The mean of K is made where the call needs one and has none.

    Raises:
        ValueError: packed sequences come without the longest one.
    """
    sizes = (options.block_q, options.block_k, causal)
    if cu_q is not None and cu_k is not None:
        if longest_q is None or longest_k is None:
            raise ValueError(
                "max_seqlen_q, max_seqlen_k: None given with cu_seqlens; give both, they are not read back"
            )
        geometry = Geometry(longest_q, longest_k, *sizes)
    else:
        geometry = Geometry(q.shape[1], k.shape[1], *sizes)
    smooth = options.smooth_k and not causal and (options.form != "sparse" or options.precision != "exact")
    if smooth and k_mean is None:
        k_mean = pool_keys_triton(k, options.block_k, cu_k, longest_k, centre=False).mean
    if cu_q is not None:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    return Call(q, k, v, blocks, options, geometry, k_mean if smooth else None, cu_q, cu_k)


def _run(
    call: Call,
    ratio: Tensor | None,
    proj: Projection | None,
    out: Tensor,
    o_linear: Tensor | None,
    lse: Tensor,
    factor: float,
    fraction: float,
    launch: Launch,
) -> None:
    options, padded, repeats, device = call.options, call.padded, call.heads_a_unit, call.q.device
    n_q, n_p, units = call.geometry.n_q, call.key_blocks, call.units
    int8, linear = options.precision == "int8_fp8", options.form != "sparse"
    each = unit_bytes(call)
    groups = each.groups(units, fraction * call.q.element_size() * (call.q.numel() + 2 * call.k.numel()))
    if not each.states + each.copies:
        groups = Groups(units, False)
    states = sums = weights = None
    copies: Copies = (None, None, None, None)
    memory = torch.empty(0, dtype=call.q.dtype, device=device)
    if linear:
        columns, rows = (padded + 1) * padded, repeats * n_q
        room = max(each.states, each.copies) if groups.overlaid else each.states
        memory = torch.empty(groups.units * room // call.q.element_size(), dtype=call.q.dtype, device=device)
        states = memory[: groups.units * n_p * columns].view(groups.units, n_p, columns)
        sums = torch.empty(groups.units, rows, columns, dtype=call.q.dtype, device=device)
        weights = torch.empty(groups.units, rows, n_p, dtype=call.q.dtype, device=device)
    if int8:
        half = groups.units * n_p * options.block_k * padded
        both = memory.view(torch.uint8) if groups.overlaid else torch.empty(2 * half, dtype=torch.uint8, device=device)
        scales = torch.empty(2, groups.units, n_p, device=device)
        copies = (both[:half].view(torch.int8), scales[0], both[half : 2 * half], scales[1])
    prepare = quantise = None
    if linear or int8:
        prepare = prepared(call, states, weights, copies if not groups.overlaid else (None,) * 4)
    if groups.overlaid:
        quantise = prepared(call, None, None, copies)
    attend = _sparse_kernel(call, ratio, proj, copies, sums, out, o_linear, lse, factor, launch)
    for first in range(0, units, groups.units):
        made = min(groups.units, units - first)
        if prepare is not None:
            prepare(made, first)
        if weights is not None and states is not None and sums is not None:
            torch.bmm(weights[:made], states[:made], out=sums[:made])
        if quantise is not None:
            quantise(made, first)
        attend((made * repeats * n_q * (options.block_q // launch.rows), 1), first=first)


class Prepared:
    """Launches ``prepare_units_kernel`` for one group of units after another; see :func:`prepared`."""

    def __init__(self, kernel: Repeated, programs: int, parts: int) -> None:
        self._kernel, self._programs, self._parts = kernel, programs, parts

    def __call__(self, units: int, first: int) -> None:
        self._kernel((units * self._programs, self._parts), first=first, units=units)


def prepared(
    call: Call,
    states: Tensor | None,
    weights: Tensor | None,
    copies: Copies,
) -> Prepared:
    """What makes states, weights and 8-bit copies of a group of units; each is left out if it is None.

    Args:
        states: (U, N_P, (DP + 1) * DP), in the dtype of q.
        weights: (U, H / G * N_q, N_P), in the dtype of q.
        copies: k8, k_scale, v8 and v_scale, see ``prepare_units_kernel``; v8 as bytes.
    """
    options, geometry, padded, size = call.options, call.geometry, call.padded, call.q.shape[3]
    arguments = (
        call.k,
        call.v,
        call.k_mean,
        call.blocks.rows,
        call.blocks.count,
        call.blocks.linear.view(torch.uint8) if call.blocks.linear is not None else None,
        call.cu_q,
        call.cu_k,
        states,
        weights,
        *copies,
        *call.k.stride(),
        *call.v.stride(),
        geometry.length_q,
        geometry.length_k,
        call.q.shape[2],
        call.k.shape[2],
        size,
        geometry.n_q,
        geometry.n_k,
        call.key_blocks,
        call.blocks.rows.shape[3],
        0,
        0,
    )
    part = padded if states is None else min(padded, 8192 // padded if padded == 256 or call.wide else 128)
    constants = {
        "BLOCK_Q": geometry.block_q,
        "BLOCK_K": geometry.block_k,
        "DP": padded,
        "COLUMNS": part,
        "MAP": options.feature_map,
        "CAUSAL": geometry.causal,
        "PACKED": call.cu_q is not None,
        "CENTRED": call.k_mean is not None,
        "LISTED": call.blocks.linear is not None,
        "STATES": states is not None,
        "WEIGHTS": weights is not None,
        "QUANTISE": copies[0] is not None,
        "HARDWARE": on_hardware(),
    }
    programs = call.key_blocks + (call.heads_a_unit * geometry.n_q if weights is not None else 0)
    return Prepared(Repeated(prepare_units_kernel, arguments, constants, 8, 1), programs, padded // part)


def _sparse_kernel(
    call: Call,
    ratio: Tensor | None,
    proj: Projection | None,
    copies: Copies,
    sums: Tensor | None,
    out: Tensor,
    o_linear: Tensor | None,
    lse: Tensor,
    factor: float,
    launch: Launch,
) -> Repeated:
    options, geometry, padded = call.options, call.geometry, call.padded
    int8 = options.precision == "int8_fp8"
    k8, k_scale, v8, v_scale = copies
    shares = None
    strides = (0, 0, 0)
    if options.form == "sla2":
        assert ratio is not None
        shares = ratio.detach().expand(call.entries, call.q.shape[2], geometry.n_q)
        strides = shares.stride()
    arguments = (
        call.q,
        k8 if int8 else call.k,
        v8.view(torch.float8_e4m3fn) if v8 is not None else call.v,
        call.k_mean if int8 else None,
        k_scale,
        v_scale,
        call.blocks.rows,
        call.blocks.count,
        sums,
        shares,
        *((None, None) if proj is None else (x if x is None else x.contiguous() for x in proj)),
        out,
        o_linear,
        lse,
        call.cu_q,
        call.cu_k,
        *call.q.stride(),
        *call.k.stride(),
        *call.v.stride(),
        *strides,
        geometry.length_q,
        geometry.length_k,
        call.q.shape[2],
        call.k.shape[2],
        call.q.shape[3],
        geometry.n_q,
        call.key_blocks,
        call.blocks.rows.shape[3],
        call.q.shape[1],
        0,
        factor * LOG2_E,
    )
    constants = {
        "ROWS": launch.rows,
        "BLOCK_Q": geometry.block_q,
        "BLOCK_K": geometry.block_k,
        "DP": padded,
        "CHUNK": min(padded, 32 if call.wide else 64),
        "MAP": options.feature_map,
        "FORM": options.form,
        "INT8": int8,
        "CAUSAL": geometry.causal,
        "PACKED": call.cu_q is not None,
        "PADDED": padded != call.q.shape[3],
        "HARDWARE": on_hardware(),
    }
    return Repeated(sparse_linear_forward_kernel, arguments, constants, launch.warps, launch.stages)
