"""Benchmarks that an installed copy can run: ``allears bench``.

What needs test sets lives in the repository's ``benchmarks/``.
"""
