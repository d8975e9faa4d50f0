"""Which kernel runs a call. A caller who names a kernel gets that one or an error, never another one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from allears.ops.attention.dense.reference import reference_attention
from allears.ops.attention.dense.sdpa import sdpa_attention
from allears.ops.attention.spec import AttentionSpec

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor]


@dataclass(frozen=True)
class Backend:
    """A kernel, whether this machine can run it at all, and why not if not."""

    name: str
    run: Kernel
    refuses: Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionSpec], str]
    available: bool = True
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The kernel that a call runs, and the reason against each kernel that was passed over."""

    kernel: str
    refused: dict[str, str]


def _sdpa_refuses(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> str:
    if spec.causal and q.shape[1] > k.shape[1]:
        return (
            "with more queries than keys, causal attention leaves the first queries without a key, where it gives NaN"
        )
    return ""


def _never(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> str:
    return ""


_BACKENDS = (Backend("sdpa", sdpa_attention, _sdpa_refuses), Backend("reference", reference_attention, _never))


def backends() -> tuple[Backend, ...]:
    """Every kernel, in the order in which ``kernel="auto"`` tries them."""
    return _BACKENDS


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} given; attention takes (B, L, H, D)")
    if k.shape != v.shape:
        raise ValueError(f"v: shape {tuple(v.shape)} differs from k's {tuple(k.shape)}; both must be (B, L_k, G, D)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"k: shape {tuple(k.shape)} does not fit q's {tuple(q.shape)}; B and D must be equal")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k: {k.shape[2]} heads do not divide q's {q.shape[2]}; grouped-query attention needs a multiple"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} given; all three must be one floating dtype")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"mask: dtype {mask.dtype} given; use bool (True = look) or a float added to the logits")
        wanted = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        try:
            fits = torch.broadcast_shapes(mask.shape, wanted) == wanted
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to (B, H, L_q, L_k) = {wanted}")


def _choose(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> tuple[Backend, dict[str, str]]:
    if spec.kernel != "auto":
        named = next((backend for backend in _BACKENDS if backend.name == spec.kernel), None)
        if named is None:
            known = ", ".join(backend.name for backend in _BACKENDS)
            raise ValueError(f"kernel: {spec.kernel!r} is unknown; known are auto, {known}")
        reason = named.reason or named.refuses(q, k, v, mask, spec)
        if reason:
            raise ValueError(f"kernel: {spec.kernel!r} cannot run this call: {reason}; use kernel='auto'")
        return named, {}
    refused: dict[str, str] = {}
    for backend in _BACKENDS:
        reason = backend.reason or backend.refuses(q, k, v, mask, spec)
        if not reason:
            return backend, refused
        refused[backend.name] = reason
    raise ValueError(f"attention: no kernel can run this call: {refused}")


def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec | None = None, mask: Tensor | None = None) -> Tensor:
    """Softmax attention.

    Args:
        q: (B, L_q, H, D).
        k, v: (B, L_k, G, D) with H a multiple of G (grouped-query attention).
        spec: what kind; the default is dense and bidirectional.
        mask: broadcastable to (B, H, L_q, L_k); boolean (True = look) or added to the logits.
            Each query must keep at least one key.

    Returns:
        (B, L_q, H, D), in the dtype of ``q``. Inputs are never changed.

    Raises:
        ValueError: shapes or dtypes do not fit, or the named kernel cannot run the call.
    """
    spec = spec or AttentionSpec()
    _check(q, k, v, mask)
    backend, _ = _choose(q, k, v, mask, spec)
    return backend.run(q, k, v, mask, spec.causal, spec.scale)


def explain(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec | None = None, mask: Tensor | None = None) -> Choice:
    """Which kernel :func:`attention` would run, and why each earlier one was passed over."""
    spec = spec or AttentionSpec()
    _check(q, k, v, mask)
    backend, refused = _choose(q, k, v, mask, spec)
    return Choice(backend.name, refused)
