"""How the two kernels of SageBwd's backward are compiled ahead of time."""

from typing import Any, NamedTuple

from allears.ops.aot import AotCase
from allears.ops.attention.lowbit.smooth import QUERY_BLOCK

_POINTERS = dict.fromkeys(("q8", "k8"), "*i8") | dict.fromkeys(("k_scale", "q_scale", "row_shift", "row_lse"), "*fp32")
_POINTERS |= dict.fromkeys(("v", "d_out"), "*bf16")
_STRIDES = {f"{tensor}_stride_{axis}": "i32" for tensor in ("v", "do") for axis in ("b", "l", "h")}
_SIZES = dict.fromkeys(("L_q", "L_k", "H", "G", "D", "N", "NQ", "S", "T_q"), "i32")
_FACTORS = {"factor": "fp32", "log2_factor": "fp32"}
_OFFSETS = {"cu_q": "*i32", "cu_k": "*i32"}
_SYNC = (r"mma\.sync\S*\.s32\.s8\.s8", r"mma\.sync\S*\.bf16")
_PRODUCTS = {
    80: _SYNC,
    90: (r"wgmma\S*\.s32\.s8\.s8", r"wgmma\S*\.bf16"),
    100: (r"tcgen05\.mma\S*kind::i8|" + _SYNC[0], r"tcgen05\.mma\S*kind::f16|" + _SYNC[1]),
    120: _SYNC,
}


class _Build(NamedTuple):
    """A scale for each row (and smoothed Q if ``centred``), or if ``packed`` causal, packed, with a scale for each tile
    and the gradient of the log-sum-exp; ``rows`` of a tile."""

    suffix: str
    packed: bool
    stages: int
    chips: tuple[int, ...]
    padded: int = 128
    rows: int = 128
    centred: bool = False


_BUILDS = (
    _Build("", False, 2, (80, 90)),
    _Build("_tile_causal_packed", True, 2, (90, 100)),
    _Build("_one_stage", False, 1, (120,)),
    _Build("_centred", False, 2, (80, 90), centred=True),
    _Build("_256", False, 1, (80, 90, 100, 120), padded=256, rows=32),
)


def backward_cases(
    name: str,
    kernel: Any,
    own: dict[str, str],
    lse: dict[str, str],
    means: dict[str, str],
    constants: dict[str, int],
    spills: tuple[int, ...],
) -> list[AotCase]:
    """One of the kernels for each chip, at head size 128 (the shared memory of the last chip holds one stage) and 256.

    Args:
        own: types of the arguments that the other kernel has not and every build has.
        lse: those for the gradient of the log-sum-exp, in the packed build alone.
        means: those for smoothed Q, in the centred build alone.
        constants: of this kernel alone.
        spills: bound of the local memory in each build, in bytes a thread.
    """
    return [_case(name, kernel, own, lse, means, constants, *pair) for pair in zip(_BUILDS, spills, strict=True)]


def _case(
    name: str,
    kernel: Any,
    own: dict[str, str],
    lse: dict[str, str],
    means: dict[str, str],
    constants: dict[str, int],
    build: _Build,
    spills: int,
) -> AotCase:
    optional = {**_OFFSETS, **lse}
    given = {**(optional if build.packed else {}), **(means if build.centred else {})}
    signature = {**_POINTERS, **own, **_STRIDES, **_SIZES, **_FACTORS, **given}
    fixed = {
        "DP": build.padded,
        "PADDED": False,
        "HARDWARE": True,
        "v_stride_d": 1,
        "do_stride_d": 1,
        "QUERIES": 64,
        "ROWS": build.rows,
        "CAUSAL": build.packed,
        "PACKED": build.packed,
        "PER_TILE": build.packed,
        "MEAN_OF": QUERY_BLOCK if build.centred else 0,
    }
    if lse:
        fixed["LSE_GRADIENT"] = build.packed
    absent = dict.fromkeys(name for name in {**optional, **means} if name not in given)
    return AotCase(
        name=f"sagebwd_{name}{build.suffix}",
        kernel=kernel,
        signature=signature,
        constexprs={**fixed, **constants, **absent},
        instructions={chip: _PRODUCTS[chip] if build.rows >= 64 else _SYNC for chip in build.chips},
        num_warps=8,
        num_stages=build.stages,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*") or "stride" in name),
        spills=spills,
    )
