"""The kernels of each low-bit numerics as the door sees them: Hopper's, Triton's, and the reference.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key heads, D head size; packed T_q, T_k rows of S sequences.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops import nvrtc
from allears.ops.attention.backend import Backend, Run, always_trains
from allears.ops.attention.call import TAKES_NO_MASK, Facts, lacks_func
from allears.ops.attention.lowbit.inputs import DTYPES, LARGEST_HEAD_SIZE
from allears.ops.attention.lowbit.ops import int8_attention_hopper, int8_attention_triton, nvfp4_attention_triton
from allears.ops.attention.lowbit.ops_reference import lowbit_attention_reference
from allears.ops.attention.lowbit.ops_sagebwd import sagebwd_hopper, sagebwd_triton
from allears.ops.attention.lowbit.ops_sagebwd_reference import sagebwd_reference
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.spec import AttentionSpec
from allears.ops.constant import constant_in_graphs
from allears.ops.triton_here import interpreted, triton_missing

Result = Tensor | tuple[Tensor, Tensor]
Trains = Callable[[AttentionSpec], bool]
HALF = (torch.float16, torch.bfloat16)
_HOPPER_HEAD_SIZES = (64, 128)
_SMOOTH_Q = "does not smooth Q; {} does, or leave LowBit(smooth_q=None)"


# --- runs


def _hopper_padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads with zeros up to 64 or 128: exact, as the scale of the logits is given."""
    spare = next(known for known in _HOPPER_HEAD_SIZES if q.shape[-1] <= known) - q.shape[-1]
    if not spare:
        return q, k, v
    return F.pad(q, (0, spare)), F.pad(k, (0, spare)), F.pad(v, (0, spare))


def run_int8_hopper(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, return_lse: bool, options: LowBit
) -> Result:
    """int8_fp8 on Hopper: q (B, L_q, H, D), k and v (B, L_k, G, D), D up to 128."""
    padded = _hopper_padded(q, k, v)
    out, lse = int8_attention_hopper(*padded, causal, scale, options.smooth_k, return_lse)
    out = out[..., : q.shape[-1]]
    return (out, lse) if return_lse else out


def run_sagebwd_hopper(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, return_lse: bool, options: LowBit
) -> Result:
    """sagebwd on Hopper, differentiable without ``return_lse``; shapes as :func:`run_int8_hopper`."""
    train = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    padded = _hopper_padded(q, k, v)
    out, lse, *_ = sagebwd_hopper(*padded, causal, scale, options.smooth_k, return_lse, train)
    out = out[..., : q.shape[-1]]
    return (out, lse) if return_lse else out


def run_int8_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    fp8: bool,
    causal: bool,
    scale: float,
    return_lse: bool,
    options: LowBit,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Result:
    """int8_fp8 or int8_fp16 by Triton: q (B, L_q, H, D) or (T_q, H, D), k and v (B, L_k, G, D) or (T_k, G, D)."""
    out, lse = int8_attention_triton(
        q, k, v, cu_seqlens_q, cu_seqlens_k, fp8, causal, scale, options.smooth_k, return_lse
    )
    return (out, lse) if return_lse else out


def run_sagebwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    op: Callable[..., tuple[Tensor, ...]],
    causal: bool,
    scale: float,
    return_lse: bool,
    options: LowBit,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Result:
    """sagebwd by Triton or the reference, which ``op`` is; shapes as :func:`run_int8_triton`."""
    rest = (causal, scale, options.smooth_k, bool(options.smooth_q), options.grad_scales)
    out, lse, *_ = op(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest)
    return (out, lse) if return_lse else out


def run_nvfp4_triton(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, return_lse: bool, options: LowBit
) -> Result:
    """nvfp4 by Triton: q (B, L_q, H, D), k and v (B, L_k, G, D), D up to 128."""
    smooth_q = options.smooth_q is not False
    out, lse = nvfp4_attention_triton(q, k, v, causal, scale, options.smooth_k, smooth_q, options.two_level_p)
    return (out, lse) if return_lse else out


def run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    numerics: str,
    causal: bool,
    scale: float,
    return_lse: bool,
    options: LowBit,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> Result:
    """int8_fp8, int8_fp16 or nvfp4 by the reference; shapes as :func:`run_int8_triton`."""
    how = (options.smooth_k, options.smooth_q, options.two_level_p, options.backward)
    out, lse = lowbit_attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, numerics, causal, scale, *how)
    return (out, lse) if return_lse else out


# --- what is missing


@constant_in_graphs
def hopper_missing() -> str:
    """Why kernels for Hopper cannot be compiled here, or ``""``."""
    return nvrtc.available()


# --- what is refused


def _refuses_all(facts: Facts) -> str:
    """What no kernel of these families takes."""
    if facts.mask != "none":
        return TAKES_NO_MASK.format("numerics='exact'")
    return lacks_func(facts)


def _refuses_reference(facts: Facts, spec: AttentionSpec) -> str:
    if facts.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, {facts.dtype} given; cast q, k and v, or use numerics='exact'"
    if facts.head_dim > LARGEST_HEAD_SIZE:
        return f"takes head sizes up to {LARGEST_HEAD_SIZE}; {facts.head_dim} given; use numerics='exact'"
    return _refuses_all(facts)


def _refuses_hopper(facts: Facts, spec: AttentionSpec) -> str:
    if facts.device != "cuda" or facts.capability is None:
        return f"runs on CUDA GPUs; the tensors are on {facts.device}"
    major, minor = facts.capability
    if major != 9 or minor != 0:  # not "!= (9, 0)", which torch.compile of torch 2.11 cannot trace
        return f"needs compute capability 9.0; this GPU has {major}.{minor}"
    if facts.dtype not in HALF:
        return f"takes float16 and bfloat16, {facts.dtype} given; cast q, k and v"
    if facts.head_dim > _HOPPER_HEAD_SIZES[-1]:
        return f"takes head sizes up to {_HOPPER_HEAD_SIZES[-1]}; {facts.head_dim} given"
    if facts.packed:
        return "takes no packed sequences; kernel='triton' does"
    if facts.empty:
        return "there are no queries or no keys"
    if spec.lowbit.smooth_q:
        return _SMOOTH_Q.format("kernel='triton'" if spec.numerics == "sagebwd" else "kernel='reference'")
    if spec.numerics == "sagebwd":
        if spec.lowbit.grad_scales != "row":
            return f"has grad_scales='row' only, {spec.lowbit.grad_scales!r} given; kernel='triton' has both"
        if facts.lse and facts.grad:
            return "has no gradient of the log-sum-exp; call it with return_lse=False, or use kernel='triton'"
    return _refuses_all(facts)


def _refuses_triton(facts: Facts, spec: AttentionSpec) -> str:
    if interpreted():
        reason = _refuses_interpreter(facts, spec)
    elif facts.device != "cuda" or facts.capability is None:
        reason = f"runs on CUDA GPUs; the tensors are on {facts.device}"
    else:
        reason = _lacks_products(facts.capability, spec.numerics)
    if reason:
        return reason
    if spec.numerics == "nvfp4":
        return _refuses_nvfp4(facts)
    if spec.lowbit.smooth_q and spec.numerics != "sagebwd":
        return _SMOOTH_Q.format("kernel='reference'")
    if spec.lowbit.smooth_q and facts.packed:
        return "smooths Q of dense batches alone; kernel='reference' takes packed sequences, or leave smooth_q None"
    if facts.grad and spec.lowbit.grad_scales == "tile" and facts.head_dim > 128 and not interpreted():
        return (
            f"has grad_scales='tile' up to head size 128, as registers do not hold its tiles; {facts.head_dim} given; "
            "use grad_scales='row'"
        )
    return _refuses_reference(facts, spec)


def _refuses_interpreter(facts: Facts, spec: AttentionSpec) -> str:
    if spec.kernel == "auto":
        return "Triton interprets its kernels here, which is slow: only kernel='triton' asks for it"
    if spec.numerics == "nvfp4":
        return "its interpreter has no FP4 products"
    if facts.dtype == torch.bfloat16:
        return "its interpreter takes bfloat16 for integers; give float16 or float32"
    return ""


def _lacks_products(capability: tuple[int, int], numerics: str) -> str:
    this = f"this GPU has {capability[0]}.{capability[1]}"
    if numerics == "nvfp4":
        return "" if capability[0] >= 10 else f"FP4 products need compute capability 10.0; {this}"
    if capability < (8, 0):
        return f"INT8 products need compute capability 8.0; {this}"
    if numerics == "int8_fp8" and capability < (8, 9):
        return f"FP8 products need compute capability 8.9; {this}; use numerics='int8_fp16'"
    return ""


def _refuses_nvfp4(facts: Facts) -> str:
    if facts.dtype not in HALF:
        return f"takes float16 and bfloat16, {facts.dtype} given; cast q, k and v"
    if facts.head_dim > 128:
        return f"takes head sizes up to 128; {facts.head_dim} given"
    if facts.packed:
        return "takes no packed sequences; kernel='reference' does"
    return _refuses_all(facts)


# --- what trains


def _never_trains(spec: AttentionSpec) -> bool:
    return False


def _trains_fake_quantised(spec: AttentionSpec) -> bool:
    return spec.lowbit.backward != "none"


def _hopper(run: Run, trains: Trains = always_trains) -> Backend:
    return Backend("hopper", run, _refuses_hopper, hopper_missing, trains, ragged=True)


def _triton(run: Run, trains: Trains = always_trains) -> Backend:
    return Backend("triton", run, _refuses_triton, triton_missing, trains, ragged=True)


def _reference(run: Run, trains: Trains = always_trains) -> Backend:
    return Backend("reference", run, _refuses_reference, trains=trains, ragged=True)


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "int8_fp8": (
        _hopper(run_int8_hopper, _never_trains),
        _triton(partial(run_int8_triton, fp8=True), _never_trains),
        _reference(partial(run_reference, numerics="int8_fp8"), _trains_fake_quantised),
    ),
    "int8_fp16": (
        _triton(partial(run_int8_triton, fp8=False), _never_trains),
        _reference(partial(run_reference, numerics="int8_fp16"), _never_trains),
    ),
    "sagebwd": (
        _hopper(run_sagebwd_hopper),
        _triton(partial(run_sagebwd, op=sagebwd_triton)),
        _reference(partial(run_sagebwd, op=sagebwd_reference)),
    ),
    "nvfp4": (
        _triton(run_nvfp4_triton, _never_trains),
        _reference(partial(run_reference, numerics="nvfp4"), _trains_fake_quantised),
    ),
}
"""By numerics, in the order in which ``kernel="auto"`` tries them."""
