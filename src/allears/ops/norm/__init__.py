"""Norms over the last axis."""
