"""8-bit attention for Hopper (compute capability 9.0) in CUDA C++, compiled at first use; ``host.py`` launches it."""
