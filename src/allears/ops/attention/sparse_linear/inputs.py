"""What a call of sparse-linear attention is checked for; packed sequences as a padded batch and the other way round.

Shapes: B batch (S sequences of a packed one), L_q queries, L_k keys, T_q and T_k rows of a packed batch, H query heads,
G key heads (H a multiple of G), D head size, N_q and N_k blocks, R width of the row lists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from allears.ops.attention.call import Packing, check_packing, check_tensor, check_tensors
from allears.ops.attention.dense.packing import Rows, locate
from allears.ops.attention.linear.check import check_lengths
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry
from allears.ops.attention.sparse_linear.options import SparseLinear

Projection = tuple[Tensor, Tensor | None]
"""Weight (D, D) and bias (D,) of the ``sla`` form, as of ``nn.Linear``."""


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    ratio: Tensor | None,
    options: SparseLinear,
    proj: Projection | None,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[Geometry, Packing | None]:
    """Lengths and blocks of a call whose shapes, dtypes and devices fit; no value on a GPU is read.

    Raises:
        ValueError: they do not fit, or ratio or projection are missing or given where the form has none.
    """
    check_tensors(q, k, v, None, cu_seqlens_q is not None or cu_seqlens_k is not None)
    packing = check_packing(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    geometry = Geometry.of(q, k, options, causal, packing)
    batch = q.shape[0] if packing is None else packing.cu_seqlens_q.shape[0] - 1
    _check_lists(blocks, (batch, q.shape[-2], geometry.n_q), geometry, options.form, q.device)
    check_mixing(ratio, proj, options, (batch, q.shape[-2], geometry.n_q), q)
    return geometry, packing


def check_heads(
    qkv: tuple[Tensor, Tensor, Tensor], heads: int, kv_heads: int, head_dim: int, packed: bool = False
) -> None:
    """Raise ValueError unless q is (B, L_q, heads, head_dim) and k and v are (B, L_k, kv_heads, head_dim), or if packed
    (T_q, heads, head_dim) and (T_k, kv_heads, head_dim)."""
    for name, x, wanted in zip("qkv", qkv, (heads, kv_heads, kv_heads), strict=True):
        check_tensor(name, x)
        if x.dim() != (3 if packed else 4) or x.shape[-2:] != (wanted, head_dim):
            rows = "T" if packed else "B, L"
            raise ValueError(
                f"{name}: shape {tuple(x.shape)} given; this layer was built for ({rows}, {wanted}, {head_dim}): "
                f"build it with the heads, kv_heads and head_dim of q, k and v"
            )


def shared_packing(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
) -> Packing | None:
    """The packing of packed q (T_q, H, D) and k (T_k, G, D), where offsets of k that are not given are those of q; None
    where there are none.

    Raises:
        ValueError: offsets or maxima do not fit, see ``check_packing``.
    """
    if cu_seqlens is not None and cu_seqlens_k is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"cu_seqlens: given alone with {q.shape[0]} rows of q and {k.shape[0]} of k; give cu_seqlens_k as well"
            )
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen if max_seqlen_k is None else max_seqlen_k
    return check_packing(q, k, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)


def check_mixing(
    ratio: Tensor | None, proj: Projection | None, options: SparseLinear, wanted: tuple[int, int, int], q: Tensor
) -> None:
    """Raise ValueError unless the form has its ratio, broadcastable to ``wanted``, or its projection, and no other."""
    _check_ratio(ratio, options, wanted, q.device)
    _check_projection(proj, options, q)


def _check_lists(
    blocks: Blocks, wanted: tuple[int, int, int], geometry: Geometry, form: str, device: torch.device
) -> None:
    rows, count, linear = blocks
    sizes = f"block_q={geometry.block_q} and block_k={geometry.block_k}"
    fix = f"build blocks from the same q and k with the options of this call ({sizes})"
    if rows.dim() != 4 or tuple(rows.shape[:3]) != wanted:
        raise ValueError(
            f"blocks: rows of shape {tuple(rows.shape)} given; it must be (B, H, N_q, R) = {wanted}; {fix}"
        )
    if tuple(count.shape) != wanted:
        raise ValueError(f"blocks: count of shape {tuple(count.shape)} given; it must be (B, H, N_q) = {wanted}; {fix}")
    if rows.shape[3] > geometry.n_k:
        raise ValueError(f"blocks: rows {rows.shape[3]} wide given, but there are {geometry.n_k} key blocks; {fix}")
    if linear is not None and form == "sla2":
        raise ValueError("blocks: linear given; form='sla2' has all that is not in rows there, leave it None")
    if linear is not None and (linear.dtype != torch.bool or tuple(linear.shape) != (*wanted, geometry.n_k)):
        raise ValueError(
            f"blocks: linear of {linear.dtype} and shape {tuple(linear.shape)} given; it must be bool (B, H, N_q, N_k) "
            f"= {(*wanted, geometry.n_k)}; {fix}"
        )
    if rows.dtype != torch.int32 or count.dtype != torch.int32:
        raise ValueError(f"blocks: rows of {rows.dtype} and count of {count.dtype} given; both must be int32")
    for name, x in zip(blocks._fields, blocks, strict=True):
        if x is not None and x.device != device:
            raise ValueError(f"blocks: {name} is on {x.device}, q on {device}; move it there")


def _check_ratio(
    ratio: Tensor | None, options: SparseLinear, wanted: tuple[int, int, int], device: torch.device
) -> None:
    if options.form != "sla2":
        if ratio is not None:
            raise ValueError(
                f"ratio: given with form {options.form!r}, which has none; leave it out, or use form='sla2'"
            )
        return
    if ratio is None:
        raise ValueError("ratio: None given; form='sla2' mixes its branches by it, give values in (0, 1)")
    if not ratio.is_floating_point() or ratio.device != device:
        raise ValueError(f"ratio: {ratio.dtype} on {ratio.device} given; it must be floating and on q's {device}")
    shape = tuple(ratio.shape)
    fits = len(shape) <= 3 and all(a in (1, b) for a, b in zip(reversed(shape), reversed(wanted), strict=False))
    if not fits:
        raise ValueError(f"ratio: shape {shape} does not broadcast to (B, H, N_q) = {wanted}; (H, 1) is one per head")


def _check_projection(proj: Projection | None, options: SparseLinear, q: Tensor) -> None:
    if options.form != "sla":
        if proj is not None:
            raise ValueError(f"proj: given with form {options.form!r}, which has none; leave it out, or use form='sla'")
        return
    if proj is None:
        raise ValueError(
            "proj: None given; form='sla' projects its linear branch, give (weight (D, D), bias (D,) or None)"
        )
    weight, bias = proj
    size = q.shape[-1]
    if tuple(weight.shape) != (size, size) or (bias is not None and tuple(bias.shape) != (size,)):
        of_bias = None if bias is None else tuple(bias.shape)
        raise ValueError(f"proj: weight {tuple(weight.shape)}, bias {of_bias} given; D = {size} needs (D, D) and (D,)")
    if weight.device != q.device or (bias is not None and bias.device != q.device):
        raise ValueError(f"proj: weight is on {weight.device}, q on {q.device}; move weight and bias there")


class Existing:
    """The rows of a padded batch that exist, packed, and back with zeros behind them.

    Args:
        q: (B, L, H, D).
        k, v: (B, L, G, D).
        lengths: (B,) int, rows of each entry that exist; read, which waits for a GPU.
        packed: the tensors are packed already, which is refused.

    Raises:
        ValueError: lengths do not fit, or q has other lengths than k and v.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, packed: bool = False) -> None:
        check_tensor("lengths", lengths)
        check_lengths(k, lengths, packed)
        if not q.shape[:2] == k.shape[:2] == v.shape[:2]:
            raise ValueError(
                f"lengths: given with q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; they must "
                f"have the same (B, L): for keys of other lengths pack the rows and give cu_seqlens and cu_seqlens_k"
            )
        self._shape = q.shape[:2]
        inside = lengths.clamp(0, q.shape[1])
        listed = inside.tolist()
        offsets = F.pad(inside.cumsum(0), (1, 0)).to(torch.int32)
        longest = max(listed, default=0)
        self.packing = Packing(offsets, offsets, longest, longest)
        self.all = sum(listed) == self._shape.numel()
        self._home = locate(offsets, q.shape[1], sum(listed)).home

    def packed(self, x: Tensor) -> Tensor:
        """(B, L, heads, D) to (T, heads, D)."""
        return x.flatten(0, 1)[self._home]

    def padded(self, x: Tensor) -> Tensor:
        """(T, heads, D) to (B, L, heads, D)."""
        flat = x.new_zeros(self._shape.numel(), *x.shape[1:])
        return flat.index_copy(0, self._home, x).unflatten(0, self._shape)


class Padding:
    """A packed batch as (S, L, heads, D) with zeros behind each sequence, and back; (B, L, heads, D) stays as it is."""

    def __init__(self, q: Tensor, k: Tensor, packing: Packing | None) -> None:
        self._q: Rows | None = None
        self._k: Rows | None = None
        if packing is not None:
            self._q = locate(packing.cu_seqlens_q, packing.max_seqlen_q, q.shape[0])
            self._k = locate(packing.cu_seqlens_k, packing.max_seqlen_k, k.shape[0])

    def queries(self, x: Tensor) -> Tensor:
        """(T_q, H, D) to (S, L_q, H, D)."""
        return _pad(x, self._q)

    def keys(self, x: Tensor) -> Tensor:
        """(T_k, G, D) to (S, L_k, G, D)."""
        return _pad(x, self._k)

    def packed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(S, L_q, H, D) and (S, H, L_q) to (T_q, H, D) and (H, T_q)."""
        if self._q is None:
            return out, lse
        return out.flatten(0, 1)[self._q.home], lse.transpose(0, 1).flatten(1, 2)[:, self._q.home]


def _pad(x: Tensor, rows: Rows | None) -> Tensor:
    return x if rows is None else x[rows.source].masked_fill(~rows.filled[..., None, None], 0.0)
