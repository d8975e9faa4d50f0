"""Sparse-linear attention that learns which blocks to read and how to mix its two branches (SLA2, arXiv 2602.12675).

Each block of queries reads its best key blocks exactly; all others reach it through linear attention. A router picks
the blocks from pooled, projected queries and keys; a ratio says how much attention mass the picked blocks have.

Training has two stages (section 5 of the paper). ``stage="soft"``: router and ratio are fitted to recorded q, k, v of
a dense model, through a differentiable map. ``stage="hard"``: the map is the top-k one that inference uses, the router
is frozen, and the model around it trains. The stage is set by hand; ``train()`` and ``eval()`` do not change it.

Shapes: B batch, L_q queries, L_k keys, H query heads, G key/value heads, D head size, N_q and N_k their blocks; packed
T_q queries and T_k keys of S sequences (B is S where blocks are counted).
"""

import json
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from allears.core.errors import WeightsError
from allears.nn.sparse_router import BlockRouter, MixingRatio
from allears.ops.attention import AttentionSpec, attention
from allears.ops.attention.call import Packing
from allears.ops.attention.sparse_linear import SparseLinear, Statistics, fused_statistics, sparse_linear_attention
from allears.ops.attention.sparse_linear.blocks import Blocks, Geometry
from allears.ops.attention.sparse_linear.call import attend_measured
from allears.ops.attention.sparse_linear.inputs import Existing, check_heads, shared_packing
from allears.ops.attention.sparse_linear.routers import (
    best_blocks,
    pool_blocks,
    pools,
    select_top_k,
    sequences,
    sla_blocks,
)
from allears.ops.attention.sparse_linear.scores import projected_scores
from allears.ops.attention.sparse_linear.soft_reference import soft_map, soft_sparse_linear

Stage = Literal["soft", "hard"]
_STATE_BYTES = 512


class SparseLinearAttention(nn.Module):
    """q (B, L_q, H, D), k and v (B, L_k, G, D), after projections and positions, to (B, L_q, H, D); or packed ones.

    Blocks, keep, form and feature map are part of its state: a checkpoint of others is refused, since a router that was
    trained for other blocks picks the wrong ones.

    Args:
        heads, head_dim: H and D.
        keep: share of the key blocks that a query block reads exactly, in (0, 1]; at least one is read.
        options: form, block sizes, feature map, numbers; see :class:`SparseLinear`. The form ``sla`` (the paper's SLA,
            for comparison) has no router to train and no ratio, but a projection of the linear branch that starts at 0;
            ``sparse`` has a router alone.
        kv_heads: G; ``None``: G = H.
        causal: a query sees itself and what came before.
        scale: factor on the logits; ``None``: 1 / sqrt(D).
        ratio_of_query: see :class:`MixingRatio`.
        skip: of the form ``sla``: share of key blocks that neither branch reads.
        temperature: of the soft map.
        kernel: see :func:`sparse_linear_attention`.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        keep: float = 0.05,
        options: SparseLinear | None = None,
        *,
        kv_heads: int | None = None,
        causal: bool = False,
        scale: float | None = None,
        ratio_of_query: bool = False,
        skip: float = 0.1,
        temperature: float = 0.1,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep: {keep} given; wanted a share of the key blocks in (0, 1]")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, head_dim
        self.keep, self.skip, self.temperature, self.kernel = keep, skip, temperature, kernel
        self.options = options or SparseLinear()
        self.causal, self.scale = causal, head_dim**-0.5 if scale is None else scale
        self.router = BlockRouter(heads, head_dim, kv_heads) if self.options.form != "sla" else None
        self.ratio = MixingRatio(heads, head_dim, ratio_of_query) if self.options.form == "sla2" else None
        self.proj = nn.Linear(head_dim, head_dim) if self.options.form == "sla" else None
        if self.proj is not None:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)
        self.stage: Stage = "hard"
        self.set_stage("hard")

    def set_stage(self, stage: Stage) -> None:
        """``soft``: fit router and ratio on recorded q, k, v. ``hard``: tune the model, or infer; the router is frozen.

        Raises:
            ValueError: neither.
        """
        if stage not in get_args(Stage):
            raise ValueError(f"stage: {stage!r} given; wanted 'soft' (fit the router) or 'hard' (top-k map)")
        self.stage = stage
        if self.router is not None:
            self.router.requires_grad_(stage == "soft")

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attend. In the soft stage it computes in full precision, whatever ``options.precision``, and costs memory and
        time of L_q * L_k: give it some blocks of queries at a time.

        Sequences of different lengths give in the hard stage what each gives alone, pools and smoothing included.

        Args:
            q: (B, L_q, H, D), or packed (T_q, H, D).
            k, v: (B, L_k, G, D), or packed (T_k, G, D).
            mask: None; others are refused.
            lengths: (B,) int, how many rows of q, k and v of each entry exist; L_q and L_k are equal. What stands
                behind changes nothing, and the output there is 0. The numbers are read, which waits for a GPU, and if
                any rows are missing the others are packed for the call.
            cu_seqlens: (S + 1,) int offsets of packed sequences.
            max_seqlen: the longest of them; ``None`` reads it, which waits for a GPU. torch.compile needs it.
            cu_seqlens_k, max_seqlen_k: those of k and v; ``None``: as of q.

        Raises:
            ValueError: a mask or other heads are given, lengths or offsets do not fit or come in the soft stage; or
                what :func:`sparse_linear_attention` refuses.
        """
        if mask is not None:
            raise ValueError(
                "mask: given, but sparse-linear attention takes none; leave this layer dense, or give the lengths of a "
                "padded batch: lengths=key_lengths_from_mask(mask)"
            )
        packed = cu_seqlens is not None or cu_seqlens_k is not None
        check_heads((q, k, v), self.heads, self.kv_heads, self.head_dim, packed)
        packing = shared_packing(q, k, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
        if self.stage == "soft" and self.router is not None:
            if packed or lengths is not None:
                raise ValueError(
                    f"{'cu_seqlens' if packed else 'lengths'}: given in the soft stage, which takes sequences of one "
                    "length; call it for each sequence, or set_stage('hard')"
                )
            return self._attend_softly(q, k, v)
        if lengths is None:
            return self._attend_hard(q, k, v, packing)
        rows = Existing(q, k, v, lengths, packed)
        if rows.all:
            return self._attend_hard(q, k, v)
        return rows.padded(self._attend_hard(rows.packed(q), rows.packed(k), rows.packed(v), rows.packing))

    def _attend_hard(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None) -> Tensor:
        if packing is not None:
            return self._attend(q, k, v, self.route(q, k, packing=packing), self._ratio(q, packing=packing), packing)
        trains = self.ratio is not None and self.ratio.trains
        found = fused_statistics(q, k, v, self.options, trains=trains, causal=self.causal, kernel=self.kernel)
        blocks, ratio = self.route(q, k, found), self._ratio(q, found)
        if found is None or ratio is None:
            return self._attend(q, k, v, blocks, ratio)
        found = found.without_pools()
        return attend_measured(q, k, v, blocks, ratio, self.options, scale=self.scale, statistics=found)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        """Attend with these blocks, whatever the stage."""
        return self._attend(q, k, v, blocks, self._ratio(q))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, ratio: Tensor | None, packing: Packing | None = None
    ) -> Tensor:
        proj = None if self.proj is None else (self.proj.weight, self.proj.bias)
        return sparse_linear_attention(
            q,
            k,
            v,
            blocks,
            ratio,
            self.options,
            proj=proj,
            causal=self.causal,
            scale=self.scale,
            kernel=self.kernel,
            **({} if packing is None else packing._asdict()),
        )

    @torch.no_grad()
    def route(
        self, q: Tensor, k: Tensor, statistics: Statistics | None = None, packing: Packing | None = None
    ) -> Blocks:
        """The blocks that the router picks: its best ones, ``keep`` of those that can be seen."""
        scores = self.scores(q, k, statistics, packing)
        if statistics is not None:  # of a bidirectional call on a GPU
            return best_blocks(scores, self.keep, self.options, q.shape[1], k.shape[1])
        geometry = self.geometry(q, k, packing)
        if self.options.form == "sla":
            return sla_blocks(scores, self.keep, self.skip, geometry=geometry)
        return select_top_k(scores, self.keep, geometry=geometry)

    def scores(
        self, q: Tensor, k: Tensor, statistics: Statistics | None = None, packing: Packing | None = None
    ) -> Tensor:
        """The router's logits (B, H, N_q, N_k) in float32; without a router those of the pooled q and k."""
        if statistics is None:
            (q_pool, k_pool), k_mean = pools(q, k, self.options, causal=self.causal, packing=packing), None
        else:
            q_pool, k_pool, k_mean = statistics.q_pool, statistics.k_pool, statistics.k_mean
        if self.router is None:
            return projected_scores(q_pool, k_pool, k_mean, None, None, self.scale)
        return self.router(q_pool, k_pool, self.scale, k_mean)

    @torch.no_grad()
    def mass(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention mass of the picked blocks for each query, (B, H, L_q) float32 in [0, 1]; NaN without a key."""
        q, k, v = (x.float() for x in (q, k, v))
        options = SparseLinear(form="sparse", block_q=self.options.block_q, block_k=self.options.block_k)
        _, of_picked = sparse_linear_attention(
            q, k, v, self.route(q, k), options=options, causal=self.causal, scale=self.scale, return_lse=True
        )
        _, of_all = attention(q, k, v, AttentionSpec(causal=self.causal, scale=self.scale), return_lse=True)
        return (of_picked - of_all).exp().clamp(max=1.0)

    def init_from(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Start the ratio of each head at the mass that the picked blocks have on these q, k, v, meaned over rows.

        Raises:
            ValueError: this form has no ratio.
        """
        if self.ratio is None:
            raise ValueError(f"form: {self.options.form!r} has no ratio to start; use form='sla2'")
        self.ratio.set(self.mass(q, k, v).nanmean((0, 2)))

    def get_extra_state(self) -> Tensor:
        """What must be alike where the state is loaded, as JSON in bytes: a tensor, so that safetensors holds it."""
        text = json.dumps(self._identity()).encode()
        return torch.tensor(list(text.ljust(_STATE_BYTES)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare with a checkpoint's.

        Raises:
            WeightsError: it was trained with other blocks, keep, form or feature map.
        """
        found = json.loads(bytes(state.tolist()))
        for name, wanted in self._identity().items():
            if found.get(name) != wanted:
                raise WeightsError(
                    f"sparse-linear attention: the checkpoint was trained with {name}={found.get(name)!r}, this module "
                    f"has {name}={wanted!r}; build it with the checkpoint's"
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._identity().items())

    def _identity(self) -> dict[str, Any]:
        options = self.options
        facts: dict[str, Any] = {
            "form": options.form,
            "block_q": options.block_q,
            "block_k": options.block_k,
            "keep": self.keep,
            "feature_map": options.feature_map,
            "smooth_k": options.smooth_k,
            "causal": self.causal,
        }
        return facts | ({"skip": self.skip} if options.form == "sla" else {})

    def geometry(self, q: Tensor, k: Tensor, packing: Packing | None = None) -> Geometry:
        return Geometry.of(q, k, self.options, self.causal, packing)

    def _ratio(self, q: Tensor, statistics: Statistics | None = None, packing: Packing | None = None) -> Tensor | None:
        if self.ratio is None:
            return None
        if self.ratio.weight is None:
            return self.ratio()
        if statistics is not None:
            return self.ratio(statistics.q_pool)
        return self.ratio(pool_blocks(q, self.options.block_q, *sequences(packing)[0]))

    def _attend_softly(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        soft = soft_map(self.scores(q, k), self.keep, geometry=self.geometry(q, k), temperature=self.temperature)
        options = replace(self.options, precision="exact")
        return soft_sparse_linear(q, k, v, soft, self._ratio(q), options, causal=self.causal, scale=self.scale)
