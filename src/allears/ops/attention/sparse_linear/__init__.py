"""Sparse-linear attention: a softmax over chosen key blocks beside linear attention over the rest."""

from allears.ops.attention.sparse_linear.blocks import (
    Blocks,
    Columns,
    Geometry,
    blocks_from_map,
    columns_of,
    linear_weights,
    map_from_blocks,
)
from allears.ops.attention.sparse_linear.call import (
    explain_sparse_linear,
    fused_statistics,
    sparse_linear_attention,
)
from allears.ops.attention.sparse_linear.ops_hopper import Statistics
from allears.ops.attention.sparse_linear.options import SparseLinear
from allears.ops.attention.sparse_linear.routers import (
    block_scores,
    key_mean,
    pool_blocks,
    pooled_scores,
    pools,
    select_mass,
    select_top_k,
    sla_blocks,
)
from allears.ops.attention.sparse_linear.soft_reference import soft_map, soft_sparse_linear
from allears.ops.attention.sparse_linear.soft_top_k import soft_top_k
from allears.ops.attention.sparse_linear.spargeattn import spargeattn_blocks

__all__ = [
    "Blocks",
    "Columns",
    "Geometry",
    "SparseLinear",
    "Statistics",
    "block_scores",
    "blocks_from_map",
    "columns_of",
    "explain_sparse_linear",
    "fused_statistics",
    "key_mean",
    "linear_weights",
    "map_from_blocks",
    "pool_blocks",
    "pooled_scores",
    "pools",
    "select_mass",
    "select_top_k",
    "sla_blocks",
    "soft_map",
    "soft_sparse_linear",
    "soft_top_k",
    "spargeattn_blocks",
    "sparse_linear_attention",
]
