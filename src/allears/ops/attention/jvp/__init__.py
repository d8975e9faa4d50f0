"""Attention and its tangent in one pass, for forward-mode differentiation; see ``README.md``."""
