"""Attention in 8 and 4 bits. The references in plain PyTorch define the numerics; the kernels follow them."""
