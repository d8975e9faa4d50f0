"""The attention benchmark: cases x systems, a check against float32 before any speed, rows and a figure.

``settings`` says what to run, ``run.measure`` runs it; ``cases`` and ``systems`` are the two tables.
"""
