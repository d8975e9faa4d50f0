"""Attention behind one door: ``attention(q, k, v, spec=...)``; ``explain`` says which kernel runs and why."""

from allears.ops.attention.backend import Backend
from allears.ops.attention.call import Facts
from allears.ops.attention.dispatch import Choice, attention, backends, explain
from allears.ops.attention.lengths import key_lengths_from_mask
from allears.ops.attention.linear.call import explain_linear, linear_attention
from allears.ops.attention.linear.options import LinearOptions
from allears.ops.attention.linear.state import LinearState
from allears.ops.attention.lowbit.options import LowBit
from allears.ops.attention.sparse_linear import (
    Blocks,
    SparseLinear,
    explain_sparse_linear,
    sparse_linear_attention,
)
from allears.ops.attention.sparsity import Sparsity
from allears.ops.attention.spec import AttentionSpec, Numerics

__all__ = [
    "AttentionSpec",
    "Backend",
    "Blocks",
    "Choice",
    "Facts",
    "LinearOptions",
    "LinearState",
    "LowBit",
    "Numerics",
    "SparseLinear",
    "Sparsity",
    "attention",
    "backends",
    "explain",
    "explain_linear",
    "explain_sparse_linear",
    "key_lengths_from_mask",
    "linear_attention",
    "sparse_linear_attention",
]
