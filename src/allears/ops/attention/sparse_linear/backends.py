"""The kernels of sparse-linear attention as its door sees them: Hopper's, Triton's, the CPU's, and the reference.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from allears.ops import nvrtc
from allears.ops.attention.backend import nothing_missing
from allears.ops.attention.call import Facts, lacks_func
from allears.ops.attention.lowbit.backends import HALF
from allears.ops.attention.lowbit.inputs import DTYPES, LARGEST_HEAD_SIZE
from allears.ops.attention.sparse_linear.gathered import sparse_linear_gathered
from allears.ops.attention.sparse_linear.ops_hopper import sparse_linear_hopper
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.reference import sparse_linear_reference
from allears.ops.constant import constant_in_graphs
from allears.ops.triton_here import interpreted, triton_missing

Run = Callable[..., tuple[Tensor, Tensor]]
_HOPPER_HEAD_SIZE = 128


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be asked for by name.

    Args:
        name: what ``kernel=`` calls it.
        run: ``run(q, k, v, blocks, ratio, options, *, proj, causal, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k)`` to (output, log-sum-exp); ``scale`` is always a number, the rest may be None.
        refuses: why a call with these facts and options does not fit, or ``""``; whether it was asked for by name is
            its third argument.
        missing: what this machine lacks for it, or ``""``.
        trains: whether it has a backward.
        fused: ``run`` also takes ``need_lse`` (False: its second output is empty) and ``statistics``.
    """

    name: str
    run: Run
    refuses: Callable[[Facts, SparseLinear, bool], str]
    missing: Callable[[], str] = nothing_missing
    trains: bool = True
    fused: bool = False

    def objection(self, facts: Facts, options: SparseLinear, named: bool) -> str:
        """Why it does not run this call, or ``""``."""
        missing = self.missing()
        if missing:
            return missing
        if facts.grad and not self.trains:
            return (
                "it has no backward and gradients are asked for; call it under torch.no_grad() or on detached inputs, "
                "or use kernel='triton'"
            )
        return self.refuses(facts, options, named)


def _run_triton(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
    from allears.ops.attention.sparse_linear.triton_run import sparse_linear_triton

    return sparse_linear_triton(*args, **more)


@constant_in_graphs
def _hopper_missing() -> str:
    return nvrtc.available()


def _refuses_hopper(facts: Facts, options: SparseLinear, named: bool) -> str:
    if facts.device != "cuda" or facts.capability is None:
        return f"runs on CUDA GPUs; the tensors are on {facts.device}"
    major, minor = facts.capability
    if major != 9 or minor != 0:  # not "!= (9, 0)", which torch.compile of torch 2.11 cannot trace
        return f"needs compute capability 9.0; this GPU has {major}.{minor}"
    if facts.dtype not in HALF:
        return f"takes float16 and bfloat16, {facts.dtype} given; cast q, k and v"
    if facts.head_dim != _HOPPER_HEAD_SIZE:
        return f"takes head size {_HOPPER_HEAD_SIZE}; {facts.head_dim} given"
    if facts.causal or facts.packed:
        return "takes neither causal nor packed calls; kernel='triton' does"
    if facts.empty:
        return "there are no queries or no keys"
    if options.form != "sla2" or options.block_q != 128:
        given = f"form={options.form!r} with block_q={options.block_q}"
        return f"has form='sla2' with block_q=128 only, {given} given; kernel='triton' has all of them"
    if options.precision != "int8_fp8" or options.feature_map != "softmax":
        given = f"precision={options.precision!r} with feature_map={options.feature_map!r}"
        return (
            f"has precision='int8_fp8' with feature_map='softmax' only, {given} given; kernel='triton' has all of them"
        )
    return ""


def _refuses_triton(facts: Facts, options: SparseLinear, named: bool) -> str:
    if interpreted():
        if not named:
            return "Triton interprets its kernels here, which is slow: only kernel='triton' asks for it"
        if facts.dtype == torch.bfloat16:
            return "its interpreter takes bfloat16 for integers; give float16 or float32"
    elif facts.device != "cuda" or facts.capability is None:
        return f"runs on CUDA GPUs; the tensors are on {facts.device}"
    else:
        needed = (8, 9) if options.precision == "int8_fp8" else (8, 0)
        major, minor = facts.capability  # torch.compile may not follow a comparison of tuples
        if 10 * major + minor < 10 * needed[0] + needed[1]:
            this = f"this GPU has {major}.{minor}"
            return f"precision={options.precision!r} needs compute capability {needed[0]}.{needed[1]}; {this}"
    if facts.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, {facts.dtype} given; cast q, k and v"
    if facts.head_dim > LARGEST_HEAD_SIZE:
        return f"takes head sizes up to {LARGEST_HEAD_SIZE}; {facts.head_dim} given"
    if facts.grad and facts.dtype == torch.float32 and facts.head_dim > 128:
        return f"has no backward for float32 with head sizes above 128; {facts.head_dim} given; cast to bfloat16"
    if facts.lse and facts.grad:
        return "has no gradient of the log-sum-exp; call it with return_lse=False, or use kernel='reference'"
    return lacks_func(facts)


def _refuses_gathered(facts: Facts, options: SparseLinear, named: bool) -> str:
    if facts.device != "cpu" and not named:
        return f"is for CPUs; the tensors are on {facts.device}: only kernel='gathered' asks for it"
    if facts.causal or facts.packed:
        return "takes neither causal nor packed calls"
    if facts.empty:
        return "there are no queries or no keys"
    if options.precision != "exact":
        return f"computes in full precision only, precision={options.precision!r} given"
    return ""


def _refuses_reference(facts: Facts, options: SparseLinear, named: bool) -> str:
    if options.precision == "int8_fp8" and facts.dtype not in DTYPES:
        return f"precision='int8_fp8' takes float16, bfloat16 and float32, {facts.dtype} given; cast q, k and v"
    return "" if options.precision == "exact" else lacks_func(facts)


KERNELS = (
    Kernel("hopper", sparse_linear_hopper, _refuses_hopper, _hopper_missing, trains=False, fused=True),
    Kernel("triton", _run_triton, _refuses_triton, triton_missing),
    Kernel("gathered", sparse_linear_gathered, _refuses_gathered),
    Kernel("reference", sparse_linear_reference, _refuses_reference),
)
"""In the order in which ``kernel="auto"`` tries them."""


def choose(facts: Facts, options: SparseLinear, kernel: str) -> Kernel:
    """The kernel of that name, or for ``"auto"`` the first that can run the call.

    Raises:
        ValueError: the name is unknown, or the kernel cannot run the call, with its reason.
    """
    if kernel == "auto":
        for known in KERNELS:
            if not known.objection(facts, options, False):
                return known
        reasons = "; ".join([f"{known.name}: {known.objection(facts, options, False)}" for known in KERNELS])
        raise ValueError(f"sparse_linear_attention: no kernel can run this call: {reasons}")
    for known in KERNELS:
        if known.name == kernel:
            reason = known.objection(facts, options, True)
            if reason:
                raise ValueError(f"kernel: {kernel!r} cannot run this call: {reason}; or use kernel='auto'")
            return known
    names = ", ".join([known.name for known in KERNELS])
    raise ValueError(f"kernel: {kernel!r} is unknown; known are auto, {names}")
