"""Which key blocks each query block reads exactly, as lists by row, as lists by column, and as maps.

Shapes: B batch (S sequences of a packed one), H query heads, L_q queries, L_k keys (the longest sequences of a packed
batch), N_q and N_k blocks of block_q queries and block_k keys, R width of the row lists.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from allears.ops.attention.call import Packing
from allears.ops.attention.sparse_linear.options import SparseLinear


class Blocks(NamedTuple):
    """The key blocks of each query block.

    Args:
        rows: (B, H, N_q, R) int32, key blocks of the softmax branch in rising order; the first ``count`` are valid, the
            rest is -1.
        count: (B, H, N_q) int32; at least 1 wherever the query block sees any key.
        linear: (B, H, N_q, N_k) bool, key blocks of the linear branch; None is all visible blocks that are not in
            ``rows``.
    """

    rows: Tensor
    count: Tensor
    linear: Tensor | None = None


class Columns(NamedTuple):
    """The query blocks of each key block: those of key block j are ``index[start[b, h, j]:start[b, h, j + 1]]``.

    Args:
        start: (B, H, N_k + 1) int32, positions in ``index``.
        index: (B * H * N_q * R,) int32 query blocks, rising within a column; -1 behind the last column's.
    """

    start: Tensor
    index: Tensor


@dataclass(frozen=True, eq=False)
class Geometry:
    """Lengths and block sizes of a call, and what a query block can see.

    Query i of a sequence sees all its keys, or with ``causal`` those up to i + L_k - L_q.

    Args:
        length_q, length_k: rows of each sequence: ints, or (B,) integer tensors.
        block_q, block_k: rows of a block; the last block of a sequence may be shorter.
        causal: aligned at the bottom right.
        longest_q, longest_k: the longest sequence; needed beside tensors, which are not read back.

    Raises:
        ValueError: lengths are tensors and the longest ones are missing, or a block size is not positive.
    """

    length_q: int | Tensor
    length_k: int | Tensor
    block_q: int
    block_k: int
    causal: bool = False
    longest_q: int | None = None
    longest_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k"):
            length, longest = getattr(self, f"length_{name}"), getattr(self, f"longest_{name}")
            if getattr(self, f"block_{name}") < 1:
                raise ValueError(f"block_{name}: {getattr(self, f'block_{name}')} given; it must be at least 1")
            if longest is None and isinstance(length, Tensor):
                raise ValueError(f"longest_{name}: None given beside a tensor of lengths; give the longest as an int")
            if longest is None:
                object.__setattr__(self, f"longest_{name}", length)

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, options: SparseLinear, causal: bool, packing: Packing | None = None
    ) -> "Geometry":
        """That of a call: q (B, L_q, H, D) and k (B, L_k, G, D), or packed (T_q, H, D) and (T_k, G, D)."""
        sizes = (options.block_q, options.block_k, causal)
        if packing is None:
            return cls(q.shape[1], k.shape[1], *sizes)
        lengths = (packing.cu_seqlens_q.diff(), packing.cu_seqlens_k.diff())
        return cls(*lengths, *sizes, packing.max_seqlen_q, packing.max_seqlen_k)

    @property
    def longest(self) -> tuple[int, int]:
        """L_q and L_k of the longest sequences."""
        assert self.longest_q is not None and self.longest_k is not None
        return self.longest_q, self.longest_k

    @property
    def n_q(self) -> int:
        """Query blocks of the longest sequence."""
        return -(-self.longest[0] // self.block_q)

    @property
    def n_k(self) -> int:
        """Key blocks of the longest sequence."""
        return -(-self.longest[1] // self.block_k)

    def visible(self, device: torch.device | None = None) -> Tensor:
        """(B or 1, 1, N_q, N_k) bool: some row of the query block sees some key of the key block."""
        first, last, start, _, hidden = self._edges(device)
        seen = (first <= last) & (start < _column(self.length_k, device))
        return seen & (start <= last + hidden) if self.causal else seen

    def full(self, device: torch.device | None = None) -> Tensor:
        """(B or 1, 1, N_q, N_k) bool: every row of the query block sees every key of the key block."""
        first, _, _, end, hidden = self._edges(device)
        seen = self.visible(device)
        return seen & (end <= first + hidden) if self.causal else seen

    def partial(self, device: torch.device | None = None) -> Tensor:
        """(B or 1, 1, N_q, N_k) bool: visible, but not in full; the linear branch cannot take such a block."""
        return self.visible(device) & ~self.full(device)

    def forced(self, device: torch.device | None = None) -> Tensor:
        """(B or 1, 1, N_q, N_k) bool: what every router selects: the partial blocks, and the block of the last key that
        the first row sees, so that each row that sees a key has one in the softmax branch. Empty if not causal.
        """
        first, _, start, _, hidden = self._edges(device)
        seen = self.visible(device)
        return seen & (start + self.block_k > first + hidden) if self.causal else torch.zeros_like(seen)

    def tokens(self, device: torch.device | None = None) -> Tensor:
        """(B or 1, 1, L_q, L_k) bool: the query sees the key."""
        longest_q, longest_k = self.longest
        i = torch.arange(longest_q, device=device)[:, None]
        j = torch.arange(longest_k, device=device)
        length_q, length_k = _column(self.length_q, device), _column(self.length_k, device)
        seen = (i < length_q) & (j < length_k)
        return seen & (j <= i + (length_k - length_q)) if self.causal else seen

    def _edges(self, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """First and last row of query blocks, first and last key of key blocks, and L_k - L_q; all broadcast."""
        length_q, length_k = _column(self.length_q, device), _column(self.length_k, device)
        first = torch.arange(self.n_q, device=length_q.device)[:, None] * self.block_q
        start = torch.arange(self.n_k, device=length_q.device) * self.block_k
        last = torch.minimum(first + self.block_q, length_q) - 1
        end = torch.minimum(start + self.block_k, length_k) - 1
        return first, last, start, end, length_k - length_q


def _column(length: int | Tensor, device: torch.device | None) -> Tensor:
    """(B or 1, 1, 1, 1) int64."""
    return torch.as_tensor(length, device=device).long().reshape(-1, 1, 1, 1)


def blocks_from_map(map: Tensor, linear: Tensor | None = None, width: int | None = None) -> Blocks:
    """Row lists of a map.

    Args:
        map: (B, H, N_q, N_k) bool, True where the softmax branch reads the block.
        linear: see :class:`Blocks`.
        width: R, at least the fullest row (not checked on a GPU, where surplus blocks would be lost); N_k if None.

    Raises:
        ValueError: ``map`` is not 4-D bool, or on the CPU ``width`` is too small.
    """
    if map.dim() != 4 or map.dtype != torch.bool:
        raise ValueError(f"map: {map.dtype} of shape {tuple(map.shape)} given; it must be bool (B, H, N_q, N_k)")
    n_k = map.shape[-1]
    width = n_k if width is None else width
    count = map.sum(-1, dtype=torch.int32)
    if map.device.type == "cpu" and count.numel() and not torch.compiler.is_compiling() and int(count.max()) > width:
        raise ValueError(f"width: {width} given, but a row has {int(count.max())} blocks; give at least that, or None")
    order = torch.where(map, torch.arange(n_k, device=map.device, dtype=torch.int32), n_k)
    return Blocks(_ascending(order, n_k)[..., :width].contiguous(), count, linear)


def blocks_from_order(order: Tensor, count: Tensor, n_k: int, linear: Tensor | None = None) -> Blocks:
    """Row lists of the first ``count`` (B, H, N_q) of ``order`` (B, H, N_q, R) key blocks, best first."""
    place = torch.arange(order.shape[-1], device=order.device)
    kept = torch.where(place < count[..., None], order, n_k).to(torch.int32)
    return Blocks(_ascending(kept, n_k), count.to(torch.int32), linear)


def _ascending(rows: Tensor, n_k: int) -> Tensor:
    """Sorted, with what was ``n_k`` as -1 at the end."""
    rows = rows.sort(-1).values
    return rows.masked_fill(rows == n_k, -1)


def map_from_blocks(blocks: Blocks, n_k: int) -> Tensor:
    """(B, H, N_q, N_k) bool, True where the softmax branch reads the block."""
    place = torch.arange(blocks.rows.shape[-1], device=blocks.rows.device)
    valid = place < blocks.count[..., None]
    spare = blocks.rows.new_zeros(*blocks.rows.shape[:-1], n_k + 1, dtype=torch.bool)
    return spare.scatter_(-1, torch.where(valid, blocks.rows, n_k).long(), True)[..., :n_k]


def columns_of(blocks: Blocks, n_k: int) -> Columns:
    """The lists by column; torch operators only, and no wait for the GPU."""
    batch, heads, n_q, width = blocks.rows.shape
    device = blocks.rows.device
    valid = torch.arange(width, device=device) < blocks.count[..., None]
    owner = torch.arange(batch * heads, device=device, dtype=torch.int32).view(batch, heads, 1, 1)
    total = batch * heads * n_k
    column = torch.where(valid, owner * n_k + blocks.rows, total).flatten()
    query = torch.arange(n_q, device=device, dtype=torch.int32)[:, None].expand(batch, heads, n_q, width).flatten()
    column, place = column.sort(dim=0, stable=True)
    index = query[place].masked_fill(column == total, -1)
    ends = torch.searchsorted(column, torch.arange(total + 1, device=device, dtype=torch.int32), out_int32=True)
    last = ends[n_k::n_k] if n_k else ends.expand(batch * heads)
    start = torch.cat((ends[:total].view(batch, heads, n_k), last.reshape(batch, heads, 1)), -1)
    return Columns(start, index)


def linear_weights(blocks: Blocks, geometry: Geometry) -> Tensor:
    """(B, H, N_q, N_k) bool, the key blocks of the linear branch: ``blocks.linear``, or what the rows leave out of the
    blocks that are visible in full.
    """
    full = geometry.full(blocks.rows.device)
    if blocks.linear is not None:
        return blocks.linear & full
    return full & ~map_from_blocks(blocks, geometry.n_k)


def check_blocks(blocks: Blocks, geometry: Geometry) -> None:
    """Read the lists (which waits for a GPU) and raise ValueError where they break a rule of :class:`Blocks`."""
    n_k, device = geometry.n_k, blocks.rows.device
    place = torch.arange(blocks.rows.shape[-1], device=device)
    valid = place < blocks.count[..., None]
    if bool(((blocks.rows >= n_k) | (blocks.rows < 0))[valid].any()) or bool((blocks.count > len(place)).any()):
        raise ValueError(
            f"blocks: rows name key blocks outside 0 to {n_k - 1}, or count exceeds their width {len(place)}; build "
            f"them with block_k={geometry.block_k} for these keys"
        )
    rising = blocks.rows[..., 1:] > blocks.rows[..., :-1]
    if not bool((rising | ~valid[..., 1:]).all()):
        raise ValueError("blocks: rows are not in strictly rising order; build them by blocks_from_map or a router")
    picked = map_from_blocks(blocks, n_k)
    seen, partial = geometry.visible(device), geometry.partial(device)
    if bool((picked & ~seen).any()):
        raise ValueError("blocks: rows hold key blocks that no row of the query block sees; leave them out")
    if bool((seen.any(-1) & (blocks.count == 0)).any()):
        raise ValueError("blocks: a query block that sees keys has count 0; keep at least one block for each")
    if bool((partial & ~picked).any()):
        raise ValueError(
            "blocks: a causal call must read every partly visible key block exactly; add Geometry.forced() to the rows"
        )
    if blocks.linear is not None and bool((blocks.linear & (picked | ~geometry.full(device))).any()):
        raise ValueError("blocks: linear holds blocks that are in rows or not visible in full; leave them out")
