"""The door: which kernel runs a call. A caller who names a kernel gets that one or an error, never another one."""

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, overload

import torch
from torch import Tensor

from allears.ops.attention.backend import Backend
from allears.ops.attention.call import Facts
from allears.ops.attention.dense.flash4 import flash4_backends
from allears.ops.attention.dense.reference import reference_attention
from allears.ops.attention.dense.sdpa import sdpa_backends
from allears.ops.attention.prepared import AS_SEQUENCES, padded, prepare
from allears.ops.attention.spec import AttentionSpec, Numerics
from allears.ops.constant import constant_in_graphs


@dataclass(frozen=True)
class Choice:
    """The kernel that a call runs.

    Args:
        kernel: its name.
        refused: why each other kernel of the same numerics cannot run the call.
        able: the other kernels that could, in the order of ``auto``.
        form: how lengths of padded entries reach the kernel; ``""`` where there are none.
    """

    kernel: str
    refused: dict[str, str]
    able: tuple[str, ...] = ()
    form: str = ""


def _never(facts: Facts, spec: AttentionSpec) -> str:
    return ""


_DENSE = (*sdpa_backends(), *flash4_backends(), Backend("reference", reference_attention, _never))
_lowbit: dict[str, tuple[Backend, ...]] = {}
_sparse: dict[str, tuple[Backend, ...]] = {}
_PLAIN = AttentionSpec()
_decisions: dict[tuple[AttentionSpec, Facts], Backend] = {}


def backends(numerics: Numerics = "exact", sparse: bool = False) -> tuple[Backend, ...]:
    """Every kernel of these numerics, in the order in which ``kernel="auto"`` tries them.

    Args:
        sparse: those that run a spec with ``sparse``.

    Raises:
        ValueError: this installation has no kernels for them.
    """
    if sparse:
        _load_sparse()
        if numerics not in _sparse:
            raise ValueError(f"numerics: {numerics!r} has no sparse kernels; there are some for {', '.join(_sparse)}")
        return _sparse[numerics]
    if numerics == "exact":
        return _DENSE
    problem = _load_lowbit()
    if problem:
        raise ValueError(
            f"numerics: {numerics!r} has no kernels in this installation ({problem}); use numerics='exact'"
        )
    if not _lowbit.get(numerics):
        raise ValueError(f"numerics: {numerics!r} has no kernels; there are some for exact, {', '.join(_lowbit)}")
    return _lowbit[numerics]


@constant_in_graphs
def _load_lowbit() -> str:
    """Fill ``_lowbit`` from the low-bit families at their first use; why they cannot be imported, or ``""``."""
    if not _lowbit:
        try:
            _lowbit.update(import_module("allears.ops.attention.lowbit.backends").BACKENDS)
        except ImportError as error:
            return str(error)
    return ""


@constant_in_graphs
def _load_sparse() -> None:
    """Fill ``_sparse`` at its first use: the family imports this file."""
    if not _sparse:
        _sparse.update(import_module("allears.ops.attention.sparse_linear.training_free").BACKENDS)


def _known(spec: AttentionSpec) -> tuple[Backend, ...]:
    return backends(spec.numerics, spec.sparse is not None)


def _order(facts: Facts, spec: AttentionSpec) -> list[Backend]:
    """As listed; where others would pad or make a mask, those that need none come first."""
    known = _known(spec)
    if facts.packed or (facts.causal and not facts.square and facts.mask == "none"):
        return [b for b in known if b.ragged] + [b for b in known if not b.ragged]
    return list(known)


def _choose(facts: Facts, spec: AttentionSpec) -> Backend:
    if spec.kernel != "auto":
        for backend in _known(spec):
            if backend.name == spec.kernel:
                reason = backend.objection(facts, spec)
                if reason:
                    raise ValueError(f"kernel: {spec.kernel!r} cannot run this call: {reason}; or use kernel='auto'")
                return backend
        known = ", ".join([backend.name for backend in _known(spec)])
        raise ValueError(f"kernel: {spec.kernel!r} is unknown; known for {spec.numerics!r} are auto, {known}")
    for backend in _order(facts, spec):
        if not backend.objection(facts, spec):
            return backend
    reasons = "; ".join([f"{b.name}: {b.objection(facts, spec)}" for b in _order(facts, spec)])
    raise ValueError(f"attention: no kernel of numerics {spec.numerics!r} can run this call: {reasons}")


def _resolve(facts: Facts, spec: AttentionSpec) -> Backend:
    """:func:`_choose`, once for each (spec, facts); under a tracer sizes are tensors, equal to none, and not kept."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _choose(facts, spec)
    backend = _decisions.get((spec, facts))
    if backend is None:
        backend = _decisions[spec, facts] = _choose(facts, spec)
    return backend


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: softmax(scale * q k^T + mask) v.

    Args:
        q: (B, L_q, H, D), or with ``cu_seqlens_q`` the packed (T_q, H, D): all queries of S sequences in a row.
        k, v: (B, L_k, G, D), or packed (T_k, G, D), with H a multiple of G (grouped-query attention).
        spec: what kind; the default is dense, exact and bidirectional.
        mask: broadcastable to (B, H, L_q, L_k); boolean (True = look) or added to the logits. Not for packed input.
            What is masked must still be finite: its weight is 0, and 0 * NaN is NaN.
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 offsets; sequence s owns rows cu[s] to cu[s + 1].
        max_seqlen_q, max_seqlen_k: the longest sequence; read from the offsets if missing, which waits for a GPU
            and is refused under torch.compile.
        key_lengths: (B,) int: of a padded batch, how many keys of each entry exist; :func:`key_lengths_from_mask` makes
            it of a padding mask. Each entry gives what it gives alone with these, also where kernels take no mask, and
            nobody waits for the numbers; causal alignment is at the end of what exists. What stands behind gets
            gradient 0; in dense exact attention it must be finite. On a GPU the numbers are not checked.
        query_lengths: (B,) int: the same for the queries; ``None``: all exist. Those behind have no keys, and must be
            finite.
        return_lse: also return the log-sum-exp of the logits, differentiable.

    Returns:
        The output, shaped and typed as ``q`` (under autocast in its dtype); a query without keys gives zeros.
        With ``return_lse`` the pair (output, lse): lse natural-log, float32 (float64 for float64), (B, H, L_q) or
        packed (H, T_q), -inf for a query without keys. Inputs are never changed.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the named kernel cannot run the call, or gradients are asked
            of a kernel that has none.
    """
    spec = spec or _PLAIN
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = prepare(q, k, v, spec, mask, packing, key_lengths, query_lengths)
    backend = _resolve(call.facts(return_lse), spec)
    more: dict[str, Any] = {}
    if call.mask is not None:
        more["mask"] = call.mask[(None,) * (4 - call.mask.dim())]
    if call.packing is not None:
        more.update(call.packing._asdict())
    if spec.sparse is not None:
        more["options"] = spec.sparse
    elif spec.numerics != "exact":
        more["options"] = spec.lowbit
    scale = spec.scale if spec.scale is not None else 1 / math.sqrt(q.shape[-1])
    result = backend.run(call.q, call.k, call.v, causal=call.causal, scale=scale, return_lse=return_lse, **more)
    return padded(result, q.shape[:2]) if call.form == AS_SEQUENCES else result


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec | None = None,
    mask: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Choice:
    """Which kernel :func:`attention` would run for the same arguments, and why not each other one."""
    spec = spec or _PLAIN
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    call = prepare(q, k, v, spec, mask, packing, key_lengths, query_lengths)
    facts = call.facts(return_lse)
    chosen = _resolve(facts, spec)
    reasons = {b.name: b.objection(facts, spec) for b in _order(facts, spec) if b is not chosen}
    refused = {name: reason for name, reason in reasons.items() if reason}
    return Choice(chosen.name, refused, tuple(name for name in reasons if name not in refused), call.form)
