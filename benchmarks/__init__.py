"""Benchmarks: what is measured (cases), on whom (systems), and the results that the README quotes.

Run ``python -m benchmarks --help`` from the repository's root. A case is a file of this package with a dataclass marked
``@case``; a system is a function in ``benchmarks/systems`` marked ``@system``.
"""
