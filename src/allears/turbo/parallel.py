"""One video over several devices: each holds a stretch of the tokens, and for attention a share of the heads.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): an all-to-all turns (all heads of my tokens) into (all tokens of my
heads) before self-attention, and another turns the output back. Everything else works on each token alone; keys of the
text are on every device. Any number of tokens is split; the number of heads must be a multiple of the devices.

Shapes: B batch, N tokens, n tokens of this rank, H heads, h = H / P heads of this rank, P ranks, D head size, C width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from allears.nn.sparse_linear_attention import SparseLinearAttention
from allears.ops.attention import AttentionSpec, attention
from allears.turbo.swap import Ledger


class Stretch:
    """This rank's part of a sequence and of the heads.

    Args:
        group: of torch.distributed; ``None``: the default one.

    Raises:
        ValueError: torch.distributed is not set up.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("group: torch.distributed is not set up; call torch.distributed.init_process_group first")
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def sizes(self, length: int) -> list[int]:
        """Tokens of each rank: as even as can be, the longer ones first."""
        return [length // self.ranks + (rank < length % self.ranks) for rank in range(self.ranks)]

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank has whole."""
        sizes = self.sizes(x.shape[dim])
        return x.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank])

    def gather(self, x: Tensor, length: int) -> Tensor:
        """x (B, n, C) of all ranks to (B, N, C) on each."""
        sizes = self.sizes(length)
        padded = x.new_zeros(x.shape[0], max(sizes), *x.shape[2:])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def to_heads(self, x: Tensor, length: int) -> Tensor:
        """x (B, n, H, D) to (B, N, h, D)."""
        batch, mine, _, size = x.shape
        sent = x.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()  # (P, B, n, h, D)
        heads = sent.shape[3]
        each = batch * heads * size
        sizes = self.sizes(length)
        flat = x.new_empty(length * each)
        dist.all_to_all_single(
            flat, sent.flatten(), [n * each for n in sizes], [mine * each] * self.ranks, group=self.group
        )
        parts = [part.view(batch, -1, heads, size) for part in flat.split([n * each for n in sizes])]
        return flat.view(1, length, heads, size) if batch == 1 else torch.cat(parts, dim=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """x (B, N, h, D) to (B, n, H, D)."""
        batch, length, heads, size = x.shape
        sizes = self.sizes(length)
        mine, each = sizes[self.rank], batch * heads * size
        sent = torch.cat([part.flatten() for part in x.split(sizes, dim=1)]) if batch > 1 else x.flatten()
        flat = x.new_empty(self.ranks * mine * each)
        dist.all_to_all_single(flat, sent, [mine * each] * self.ranks, [n * each for n in sizes], group=self.group)
        return flat.view(self.ranks, batch, mine, heads, size).permute(1, 2, 0, 3, 4).flatten(2, 3)


def slice_core(core: SparseLinearAttention, stretch: Stretch) -> SparseLinearAttention:
    """A fitted core for this rank's heads alone.

    Raises:
        ValueError: the heads do not split evenly.
    """
    check_heads(core.heads, stretch.ranks)
    check_heads(core.kv_heads, stretch.ranks)
    part = SparseLinearAttention(
        core.heads // stretch.ranks,
        core.head_dim,
        core.keep,
        core.options,
        kv_heads=core.kv_heads // stretch.ranks,
        causal=core.causal,
        scale=core.scale,
        ratio_of_query=core.ratio is not None and core.ratio.weight is not None,
        skip=core.skip,
        temperature=core.temperature,
        kernel=core.kernel,
    )
    state = core.state_dict()
    for name in state:
        if name.startswith(("router.", "ratio.")):
            state[name] = stretch.cut(state[name], 0)
    part.load_state_dict(state)
    return part.to(next(core.parameters(), torch.empty(0)).device)


def check_heads(heads: int, ranks: int) -> None:
    """Raises ValueError where the heads do not split evenly."""
    if heads % ranks:
        fitting = [n for n in range(2, heads + 1) if heads % n == 0]
        raise ValueError(f"group: {ranks} ranks for {heads} heads; wanted one of {fitting} ranks")


def split_tokens(model: Any, stretch: Stretch, ledger: Ledger) -> None:
    """Let a Wan transformer whose layers run on our processors work on this rank's tokens.

    Its input and output are whole on every rank. ``nn`` cores in self-attention must be those of :func:`slice_core`.
    """
    blocks = list(model.blocks)
    length = 0

    def before(index: int) -> Callable[..., Any]:
        def cut(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal length
            hidden, text, temb, rotary = args
            if index == 0:
                length = hidden.shape[1]
                hidden = stretch.cut(hidden).contiguous()
            temb = stretch.cut(temb) if temb.dim() == 4 else temb
            return hidden, text, temb, tuple(stretch.cut(table) for table in rotary)

        return cut

    def after(block: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
        return stretch.gather(hidden, length)

    for index, block in enumerate(blocks):
        ledger.note(block.register_forward_pre_hook(before(index)).remove)
        processor = block.attn1.processor
        inner = processor.attend

        def attend(
            layer: Any,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            spec: AttentionSpec,
            mask: Tensor | None,
            inner: Callable[..., Tensor] | None = inner,
        ) -> Tensor:
            if mask is not None:
                raise ValueError("attention_mask: given, but tokens that are split over devices take none")
            q, k, v = (stretch.to_heads(x, length) for x in (q, k, v))
            y = attention(q, k, v, spec) if inner is None else inner(layer, q, k, v, spec, None)
            return stretch.to_tokens(y)

        ledger.set(processor, "attend", attend)
    ledger.note(blocks[-1].register_forward_hook(after).remove)
