"""Attention behind one door: ``attention(q, k, v, spec=...)``; ``explain`` says which kernel runs and why."""

from allears.ops.attention.dispatch import Backend, Choice, attention, backends, explain
from allears.ops.attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "Backend", "Choice", "attention", "backends", "explain"]
