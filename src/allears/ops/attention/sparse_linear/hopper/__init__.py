"""Sparse-linear attention for Hopper, in CUDA C++ compiled at first use; see ``lowbit/hopper/README.md``."""
