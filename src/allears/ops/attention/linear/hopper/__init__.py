"""Linear attention for Hopper, in CUDA C++ compiled at first use; see ``README.md``."""
