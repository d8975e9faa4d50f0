"""A call of attention, checked, and reduced to the facts that decide its kernel.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads (H a multiple of G), D head size; T_q and T_k
are all queries and keys of a packed batch of S sequences.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from allears.ops.constant import constant_in_graphs

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TAKES_NO_MASK = (
    "takes no mask; use {}, causal where that says the same, or for padded keys key_lengths=key_lengths_from_mask(mask)"
)
"""What a kernel without masks says, with the spec that has some."""


class Packing(NamedTuple):
    """Where the sequences of a packed batch begin, and how long the longest one is.

    Args:
        cu_seqlens_q, cu_seqlens_k: (S + 1,) int32; sequence ``s`` owns rows ``cu[s]`` to ``cu[s + 1]``.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's number of queries, and of keys.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class Facts(NamedTuple):
    """All that a kernel's refusal may depend on; equal facts always get the same kernel.

    Args:
        device: type of the device, such as ``"cpu"`` or ``"cuda"``.
        capability: compute capability of a CUDA device, else ``None``.
        dtype: of q, k and v.
        head_dim: D.
        grouped: fewer key/value heads than query heads.
        mask: none, boolean, added to the logits, or added and asked for its gradient (``"learned"``).
        causal: as asked for.
        square: L_q equals L_k (of a packed batch: unknown, and False).
        blind: causal alignment leaves the first queries without a key (of a packed batch: unknown, and False).
        empty: there is no query, or no key.
        packed: sequences of several lengths in one row, by cu_seqlens.
        lse: the log-sum-exp is asked for.
        grad: gradients of q, k or v are asked for.
        tracing: torch.compile traces the call.
        func: the gradients are asked for by a transform of ``torch.func``, for which torch has none of our operators'.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    grouped: bool
    mask: Literal["none", "bool", "float", "learned"]
    causal: bool
    square: bool
    blind: bool
    empty: bool
    packed: bool
    lse: bool
    grad: bool
    tracing: bool
    func: bool = False


@constant_in_graphs
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def gather_facts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, packed: bool, lse: bool) -> Facts:
    """The facts of a checked call; see :func:`check_tensors` for the shapes."""
    of_q, of_k, device, grad = q.shape, k.shape, q.device, torch.is_grad_enabled()
    func = grad and func_differentiates(q, k, v)
    queries, keys = of_q[-3], of_k[-3]
    kind: Literal["none", "bool", "float", "learned"] = "none"
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "learned" if grad and mask.requires_grad else "float"
    return Facts(
        device=device.type,
        capability=_capability(device.index) if device.type == "cuda" else None,
        dtype=q.dtype,
        head_dim=of_q[-1],
        grouped=of_q[-2] != of_k[-2],
        mask=kind,
        causal=causal,
        square=not packed and queries == keys,
        blind=causal and not packed and queries > keys,
        empty=queries == 0 or keys == 0 or of_q[0] == 0,
        packed=packed,
        lse=lse,
        grad=func or (grad and (q.requires_grad or k.requires_grad or v.requires_grad)),
        tracing=torch.compiler.is_compiling(),
        func=func,
    )


def func_differentiates(*tensors: Tensor) -> bool:
    """Whether ``torch.func`` (grad, vjp, jacrev) asks for the gradient of one, at whatever depth of its transforms."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    layers = torch._C._functorch
    for x in tensors:
        while layers.is_functorch_wrapped_tensor(x):
            if layers.is_gradtrackingtensor(x) and x.requires_grad:
                return True
            x = layers.get_unwrapped(x)
    return False


def lacks_func(facts: Facts) -> str:
    """What a kernel says whose operator is of our own where ``torch.func`` differentiates, or ``""``."""
    if facts.func:
        return "torch.func has no gradient of its operator; use backward() or torch.autograd.grad"
    return ""


def autocast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under ``torch.autocast``, q, k and v in its dtype as torch's own attention does (float64 stays).

    Raises:
        ValueError: one of them is no tensor, or has no values.
    """
    check_values(q, k, v)
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (x.to(dtype) if x.dtype in narrow else x for x in (q, k, v))
    return q, k, v


def check_tensor(name: str, x: object) -> None:
    """Raise ValueError unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: {type(x).__name__} given; it must be a torch.Tensor: use torch.as_tensor")


def check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are tensors, and q is on a device that holds values."""
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    if q.is_meta:
        raise ValueError("q: on the device 'meta' given, which holds no values; move q, k and v to a CPU or a GPU")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, packed: bool) -> None:
    """Raise ValueError unless q (B, L_q, H, D), k and v (B, L_k, G, D), or packed q (T_q, H, D), k and v (T_k, G, D),
    fit one another, and the mask broadcasts to (B, H, L_q, L_k).
    """
    of_q, of_k, of_v, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    rank = 3 if packed else 4
    if len(of_q) != rank or len(of_k) != rank or len(of_v) != rank:
        name, shape = next((n, tuple(s)) for n, s in (("q", of_q), ("k", of_k), ("v", of_v)) if len(s) != rank)
        layout = "(T, H, D), all sequences in a row, with cu_seqlens" if packed else "(B, L, H, D)"
        raise ValueError(f"{name}: shape {shape} given; attention takes {layout}")
    if of_k != of_v:
        raise ValueError(f"v: shape {tuple(of_v)} differs from k's {tuple(of_k)}; both must be (B, L_k, G, D)")
    if of_q[-1] != of_k[-1] or (not packed and of_q[0] != of_k[0]):
        raise ValueError(f"k: shape {tuple(of_k)} does not fit q's {tuple(of_q)}; B and D must be equal")
    if of_q[-1] == 0 or of_q[-2] == 0 or of_k[-2] == 0:
        raise ValueError(f"q, k: shapes {tuple(of_q)}, {tuple(of_k)} given; heads and head size must not be 0")
    if of_q[-2] % of_k[-2]:
        raise ValueError(f"k: {of_k[-2]} heads do not divide q's {of_q[-2]}; grouped-query attention needs a multiple")
    if not dtype == k.dtype == v.dtype or dtype not in DTYPES:
        raise ValueError(
            f"q, k, v: dtypes {dtype}, {k.dtype}, {v.dtype} given; all three must be one of float16, bfloat16, "
            f"float32 and float64"
        )
    if not device == k.device == v.device:
        raise ValueError(f"q, k, v: devices {device}, {k.device}, {v.device} given; move all three to one device")
    if mask is not None:
        _check_mask(q, k, mask, packed)


def _check_mask(q: Tensor, k: Tensor, mask: Tensor, packed: bool) -> None:
    check_tensor("mask", mask)
    if packed:
        raise ValueError("mask: packed sequences (cu_seqlens) take none; use causal, or pad to (B, L, H, D)")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask: dtype {mask.dtype} given; use bool (True = look) or a float added to the logits")
    if mask.device != q.device:
        raise ValueError(f"mask: device {mask.device} given, q is on {q.device}; move the mask there")
    wanted = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    given = tuple(mask.shape)
    fits = len(given) <= 4 and all(a in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False))
    if not fits:
        raise ValueError(f"mask: shape {given} does not broadcast to (B, H, L_q, L_k) = {wanted}")


def check_packing(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Packing | None:
    """The packing of a call, or None for (B, L, H, D) tensors.

    A missing maximum is read from the offsets, which waits for the GPU; torch.compile needs it given. The values of
    offsets are checked on the CPU only, where that costs no waiting.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        if max_seqlen_q is not None or max_seqlen_k is not None:
            raise ValueError(
                "max_seqlen_q, max_seqlen_k: given without cu_seqlens_q and cu_seqlens_k; give all of them"
            )
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q, cu_seqlens_k: one given without the other; self-attention gives the same twice")
    check_tensor("cu_seqlens_q", cu_seqlens_q)
    check_tensor("cu_seqlens_k", cu_seqlens_k)
    longest_q = _check_offsets("q", q, cu_seqlens_q, max_seqlen_q)
    longest_k = _check_offsets("k", k, cu_seqlens_k, max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: {cu_seqlens_k.shape[0]} offsets, cu_seqlens_q has {cu_seqlens_q.shape[0]}; both must hold "
            f"one more than there are sequences"
        )
    return Packing(cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32), longest_q, longest_k)


def _check_offsets(name: str, tensor: Tensor, offsets: Tensor, longest: int | None) -> int:
    if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens_{name}: {offsets.dtype} of shape {tuple(offsets.shape)} given; it must be int32 or int64 of "
            f"shape (S + 1,) for S >= 1 sequences"
        )
    if offsets.device != tensor.device:
        raise ValueError(
            f"cu_seqlens_{name}: device {offsets.device} given, {name} is on {tensor.device}; move it there"
        )
    if torch.compiler.is_compiling():
        if longest is None:
            raise ValueError(f"max_seqlen_{name}: torch.compile cannot read it from the offsets; give it as an int")
        return longest
    if offsets.device.type == "cpu":
        ends = offsets.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        if ends[0] != 0 or ends[-1] != tensor.shape[0] or min(lengths) < 0:
            raise ValueError(
                f"cu_seqlens_{name}: {ends} given; it must rise from 0 to the number of rows of {name}, "
                f"{tensor.shape[0]}"
            )
        if longest is not None and longest < max(lengths):
            raise ValueError(f"max_seqlen_{name}: {longest} given; the longest sequence has {max(lengths)} rows")
        return max(lengths) if longest is None else min(longest, tensor.shape[0])
    return int(offsets.diff().max()) if longest is None else min(longest, tensor.shape[0])
