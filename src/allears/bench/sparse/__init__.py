"""The benchmark of sparse attention: whole modules at several sparsities, beside dense attention and its peers.

It is the harness of ``bench.attention``, with systems that are made for a case and judged by their own formula.
"""
